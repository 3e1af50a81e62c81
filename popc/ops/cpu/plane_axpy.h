// Microkernels that add up scaled rows of integers, for up to max_tokens tokens: nibbles of one plane,
// or bytes of both.
//
// A group of rows is added in one pass over the sums. What stands for less or more than its integer
// is accounted for in `corrections`, one for each block of outputs.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "dispatch.h"
#include "plane_rows.h"
#include "vec.h"

namespace popc {

constexpr int64_t chunk_blocks = 4, chunk_lanes = chunk_blocks * block_dwords;
constexpr int64_t chunk_values = chunk_blocks * block_values;
constexpr int64_t chunk_bytes = chunk_blocks * plane_bytes;  // of a plane
constexpr int64_t factor_blocks = 16;  // factors are made for as many at a time
constexpr int quad_rows = 4;           // that products are added up of in one instruction
constexpr int group_rows = 16;

// One row: its values are (integer - center) · scale, times a token's factor. An integer is a nibble
// of the high plane, or a byte where the low one is read too.
struct PlaneRow {
  const uint8_t* scales;
  const uint8_t* high;
  const uint8_t* low;
};

// The sums of one thread: `values` [tokens, chunks, half of a byte, dword, lane], of which lane
// 4·block + byte, and `corrections` [tokens, blocks], both padded.
struct PlaneSums {
  float* values;
  float* corrections;
  int64_t value_stride, correction_stride;  // between tokens

  PlaneSums token(int64_t n) const {
    return {values + n * value_stride, corrections + n * correction_stride, value_stride,
            correction_stride};
  }
  PlaneSums from_block(int64_t b) const {
    return {values + b * block_values, corrections + b, value_stride, correction_stride};
  }
};

// Up to group_rows rows of one weight, in quads, and the sums that they are added to. A factor of zero
// takes its row for zeros, whatever its scales are.
struct RowGroup {
  PlaneRow rows[group_rows];
  float factors[max_tokens][group_rows];
  int count, quads;
  bool has_low;  // of all rows, or of none
  uint8_t center;
  float center_unit;  // center · center_unit is taken from each integer
  int64_t blocks;
  PlaneSums sums;
};

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Where the sum of value i of a block stands, from that of its value 0 on.
constexpr int64_t sum_offset(int64_t i) {
  return (i / block_dwords % 2 * block_dwords + i % block_dwords) * chunk_lanes + i / 8;
}
// Where the sum of value 0 of block b stands.
constexpr int64_t sum_start(int64_t b) {
  return b / chunk_blocks * chunk_values + b % chunk_blocks * block_dwords;
}

#if defined(__AVX512VNNI__) && defined(CPU_CAPABILITY_AVX512)
// Not inlined, a lambda would keep the caller's registers in memory.
#define POPC_INLINE __attribute__((always_inline))

// The bits of `a` where the mask's are set, else those of `b`.
POPC_INLINE inline __m512i select_bits(__m512i mask, __m512i a, __m512i b) {
  return _mm512_ternarylogic_epi32(mask, a, b, 0xca);
}

// Factors become integers of 15 bits, in units that a group's rows share in each block, in two parts
// of 8: `upper` · 128 + `lower`. Integers of four rows stand side by side, so that an instruction
// adds up 64 products, exactly.
class RowAdder {
 public:
  // Prefetches the next group on the way.
  static void add(const RowGroup& group, const RowGroup& next, int64_t tokens) {
    Factors factors[max_tokens];
    for (int64_t first = 0; first < group.blocks; first += factor_blocks) {
      for (int64_t n = 0; n < tokens; ++n) {
        make_factors(group, n, first, factors[n], group.sums.token(n).corrections);
      }
      for (int r = 0; r < next.count; ++r) {
        prefetch_bytes(next.rows[r].scales + scale_bytes * first, scale_bytes * factor_blocks);
      }
      const int64_t last = std::min(first + factor_blocks, group.blocks);
      for (int64_t k = first; k < last; k += chunk_blocks) {
        for (int r = 0; next.has_low && r < next.count; ++r) {
          prefetch_bytes(next.rows[r].low + plane_bytes * k, chunk_bytes);
        }
        if (group.has_low) {
          add_chunk<true>(group, next, k, factors, k - first, tokens);
        } else {
          add_chunk<false>(group, next, k, factors, k - first, tokens);
        }
      }
    }
  }

 private:
  static constexpr int quads = group_rows / quad_rows;
  static constexpr int bytes_of_quad = 2 * block_dwords;  // registers of bytes
  static constexpr float top = 127.0f * 128.0f;

  // Of one token; a dword holds those of a quad's rows for one block.
  struct Factors {
    alignas(64) uint32_t upper[quads][factor_blocks];
    alignas(64) uint32_t lower[quads][factor_blocks];
    alignas(64) float unit[factor_blocks];
  };

  // The factors of one token for blocks [first, first + factor_blocks); adds to its corrections.
  static void make_factors(
      const RowGroup& group, int64_t token, int64_t first, Factors& to, float* corrections) {
    const int64_t left = std::min(factor_blocks, group.blocks - first);
    const __mmask16 mask = _cvtu32_mask16((1u << left) - 1u);
    __m512 values[group_rows];
    __m512i largest = _mm512_setzero_si512();  // as bits, so that a NaN is the largest
    for (int r = 0; r < quad_rows * group.quads; ++r) {
      const float factor = group.factors[token][r];
      const __m256i bits = _mm256_maskz_loadu_epi16(
          factor == 0.0f ? __mmask16(0) : mask, group.rows[r].scales + scale_bytes * first);
      const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
      values[r] = factor == 0.0f ? scale : _mm512_mul_ps(scale, _mm512_set1_ps(factor));
      const __m512i size = _mm512_castps_si512(_mm512_abs_ps(values[r]));
      largest = _mm512_max_epu32(largest, size);
    }
    const __m512 range = _mm512_castsi512_ps(largest);
    // What is next to nothing counts as nothing: its inverse is not a number.
    const __mmask16 used = _mm512_cmp_ps_mask(range, _mm512_set1_ps(1e-30f), _CMP_NLT_UQ);
    const __m512 inverse = _mm512_maskz_div_ps(used, _mm512_set1_ps(top), range);
    const __m512 unit = _mm512_maskz_mul_ps(used, range, _mm512_set1_ps(1.0f / top));
    _mm512_store_ps(to.unit, unit);
    __m512i upper_sum = _mm512_setzero_si512(), lower_sum = _mm512_setzero_si512();
    for (int q = 0; q < group.quads; ++q) {
      const auto integers = [&](int row) POPC_INLINE {
        return _mm512_cvtps_epi32(_mm512_mul_ps(values[quad_rows * q + row], inverse));
      };
      const __m512i first_two = _mm512_packs_epi32(integers(0), integers(1));
      const __m512i last_two = _mm512_packs_epi32(integers(2), integers(3));
      const __m512i upper_first = upper_part(first_two), upper_last = upper_part(last_two);
      const __m512i upper = by_block(upper_first, upper_last);
      const __m512i lower =
          by_block(lower_part(first_two, upper_first), lower_part(last_two, upper_last));
      _mm512_store_si512(to.upper[q], upper);
      _mm512_store_si512(to.lower[q], lower);
      const __m512i center = _mm512_set1_epi8(static_cast<char>(group.center));
      upper_sum = _mm512_dpbusd_epi32(upper_sum, center, upper);
      lower_sum = _mm512_dpbusd_epi32(lower_sum, center, lower);
    }
    const __m512 sum = _mm512_mul_ps(both_parts(upper_sum, lower_sum), unit);
    const __m512 before = _mm512_loadu_ps(corrections + first);
    _mm512_storeu_ps(
        corrections + first, _mm512_fmadd_ps(sum, _mm512_set1_ps(group.center_unit), before));
  }
  POPC_INLINE static __m512i upper_part(__m512i words) {
    return _mm512_srai_epi16(_mm512_add_epi16(words, _mm512_set1_epi16(64)), 7);
  }
  POPC_INLINE static __m512i lower_part(__m512i words, __m512i upper) {
    return _mm512_sub_epi16(words, _mm512_slli_epi16(upper, 7));
  }
  POPC_INLINE static __m512 both_parts(__m512i upper, __m512i lower) {
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(upper, 7), lower));
  }
  // Words of two rows and two more, four blocks of each side by side: as bytes, by block.
  POPC_INLINE static __m512i by_block(__m512i first_two, __m512i last_two) {
    const __m512i order = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return _mm512_shuffle_epi8(_mm512_packs_epi16(first_two, last_two), order);
  }

  // Four blocks' dwords, each in the lanes of its block.
  POPC_INLINE static __m512 in_lanes(const void* dwords) {
    const __m512i block_of_lane =
        _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const __m512 four = _mm512_broadcast_f32x4(_mm_loadu_ps(static_cast<const float*>(dwords)));
    return _mm512_permutevar_ps(four, block_of_lane);
  }

  // The bytes of a quad's rows, those of one output side by side: of byte 4i + p of each block,
  // register i has them in lane p.
  POPC_INLINE static void interleave(const __m512i* rows, __m512i* to) {
    const __m512i first = _mm512_unpacklo_epi8(rows[0], rows[1]);
    const __m512i second = _mm512_unpacklo_epi8(rows[2], rows[3]);
    const __m512i first_end = _mm512_unpackhi_epi8(rows[0], rows[1]);
    const __m512i second_end = _mm512_unpackhi_epi8(rows[2], rows[3]);
    to[0] = _mm512_unpacklo_epi16(first, second);
    to[1] = _mm512_unpackhi_epi16(first, second);
    to[2] = _mm512_unpacklo_epi16(first_end, second_end);
    to[3] = _mm512_unpackhi_epi16(first_end, second_end);
  }

  // The integers of a quad's rows, interleaved: first those in the lower halves of bytes.
  template <bool has_low>
  POPC_INLINE static void load_quad(
      const PlaneRow* rows, const PlaneRow* next, int64_t offset, __mmask16 mask, __m512i* to) {
    const __m512i mask15 = _mm512_set1_epi8(15);
    __m512i high[quad_rows];
    unroll<quad_rows>([&](auto r) POPC_INLINE {
      prefetch_bytes(next[r].high + offset, chunk_bytes);
      high[r] = _mm512_maskz_loadu_epi32(mask, rows[r].high + offset);
    });
    if constexpr (has_low) {
      __m512i first[quad_rows], second[quad_rows];
      unroll<quad_rows>([&](auto r) POPC_INLINE {
        const __m512i low = _mm512_maskz_loadu_epi32(mask, rows[r].low + offset);
        first[r] = select_bits(mask15, low, _mm512_slli_epi16(high[r], 4));
        second[r] = select_bits(mask15, _mm512_srli_epi16(low, 4), high[r]);
      });
      interleave(first, to);
      interleave(second, to + block_dwords);
    } else {
      __m512i bytes[block_dwords];
      interleave(high, bytes);
      unroll<block_dwords>([&](auto i) POPC_INLINE {
        to[i] = _mm512_and_si512(bytes[i], mask15);
        to[i + block_dwords] = _mm512_and_si512(_mm512_srli_epi16(bytes[i], 4), mask15);
      });
    }
  }

  struct ChunkSums {
    __m512i upper[bytes_of_quad], lower[bytes_of_quad];

    POPC_INLINE ChunkSums() {
      unroll<bytes_of_quad>([&](auto i) POPC_INLINE {
        upper[i] = lower[i] = _mm512_setzero_si512();
      });
    }
    POPC_INLINE void add(const __m512i* integers, const Factors& factors, int q, int64_t k) {
      const __m512i of_upper = _mm512_castps_si512(in_lanes(factors.upper[q] + k));
      const __m512i of_lower = _mm512_castps_si512(in_lanes(factors.lower[q] + k));
      unroll<bytes_of_quad>([&](auto i) POPC_INLINE {
        upper[i] = _mm512_dpbusd_epi32(upper[i], integers[i], of_upper);
        lower[i] = _mm512_dpbusd_epi32(lower[i], integers[i], of_lower);
      });
    }
    POPC_INLINE void add_to(float* to, const Factors& factors, int64_t k) const {
      const __m512 unit = in_lanes(factors.unit + k);
      unroll<bytes_of_quad>([&](auto i) POPC_INLINE {
        float* sum = to + i * chunk_lanes;
        _mm512_storeu_ps(
            sum, _mm512_fmadd_ps(both_parts(upper[i], lower[i]), unit, _mm512_loadu_ps(sum)));
      });
    }
  };

  template <bool has_low>
  static void add_chunk(
      const RowGroup& group, const RowGroup& next, int64_t block, const Factors* factors, int64_t k,
      int64_t tokens) {
    const int64_t left = std::min(chunk_blocks, group.blocks - block);
    const __mmask16 mask = _cvtu32_mask16((1u << (block_dwords * left)) - 1u);
    const int64_t offset = plane_bytes * block;
    if (tokens == 1) {
      ChunkSums chunk;
      for (int q = 0; q < group.quads; ++q) {
        __m512i integers[bytes_of_quad];
        load_quad<has_low>(
            group.rows + quad_rows * q, next.rows + quad_rows * q, offset, mask, integers);
        chunk.add(integers, factors[0], q, k);
      }
      chunk.add_to(group.sums.values + block * block_values, factors[0], k);
      return;
    }
    __m512i integers[quads][bytes_of_quad];
    for (int q = 0; q < group.quads; ++q) {
      load_quad<has_low>(
          group.rows + quad_rows * q, next.rows + quad_rows * q, offset, mask, integers[q]);
    }
    for (int64_t n = 0; n < tokens; ++n) {
      ChunkSums chunk;
      for (int q = 0; q < group.quads; ++q) chunk.add(integers[q], factors[n], q, k);
      chunk.add_to(group.sums.token(n).values + block * block_values, factors[n], k);
    }
  }
};
#else
// Each row by itself, in float32.
class RowAdder {
 public:
  // Prefetches the next group on the way.
  static void add(const RowGroup& group, const RowGroup& next, int64_t tokens) {
    for (int64_t k = 0; k < group.blocks; k += chunk_blocks) {
      for (int r = 0; r < group.count; ++r) {
        prefetch_bytes(next.rows[r].high + plane_bytes * k, chunk_bytes);
        add_chunk(group, r, tokens, k, std::min(chunk_blocks, group.blocks - k));
      }
    }
  }

 private:
  static constexpr int64_t vectors = chunk_values / lanes;

  static void add_chunk(
      const RowGroup& group, int r, int64_t tokens, int64_t first, int64_t blocks) {
    const PlaneRow& row = group.rows[r];
    uint8_t high[chunk_bytes] = {}, low[chunk_bytes] = {};
    std::memcpy(high, row.high + plane_bytes * first, plane_bytes * blocks);
    if (group.has_low) std::memcpy(low, row.low + plane_bytes * first, plane_bytes * blocks);
    float scales[chunk_lanes] = {};
    for (int64_t b = 0; b < blocks; ++b) {
      std::fill_n(
          scales + b * block_dwords, block_dwords,
          load_scale(row.scales + scale_bytes * (first + b)));
    }
    const int shift = group.has_low ? 4 : 0;
    float integers[chunk_values];  // as sums are
    for (int64_t i = 0; i < block_dwords; ++i) {
      for (int64_t lane = 0; lane < chunk_lanes; ++lane) {
        const int64_t byte = lane / block_dwords * plane_bytes + i * 4 + lane % block_dwords;
        float* to = integers + i * chunk_lanes + lane;
        to[0] = static_cast<float>(((high[byte] & 15) << shift) + (low[byte] & 15));
        to[chunk_values / 2] = static_cast<float>(((high[byte] >> 4) << shift) + (low[byte] >> 4));
      }
    }
    for (int64_t n = 0; n < tokens; ++n) {
      const float factor = group.factors[n][r];
      if (factor == 0.0f) continue;
      const PlaneSums to = group.sums.token(n);
      float factors[chunk_lanes];
      for (int64_t lane = 0; lane < chunk_lanes; ++lane) factors[lane] = factor * scales[lane];
      for (int64_t b = 0; b < blocks; ++b) {
        to.corrections[first + b] += factors[b * block_dwords] * group.center * group.center_unit;
      }
      float* values = to.values + first * block_values;
      for (int64_t v = 0; v < vectors; ++v) {
        const Vec own = Vec::loadu(factors + v * lanes % chunk_lanes);
        const Vec sum = Vec::loadu(values + v * lanes);
        at::vec::fmadd(Vec::loadu(integers + v * lanes), own, sum).store(values + v * lanes);
      }
    }
  }
};
#endif

}  // namespace popc
