// Microkernels that add up scaled rows of nibbles, for up to max_tokens tokens.
//
// Rows come in pairs: the planes of one row, or the high planes of two. Of each chunk of outputs, a
// sum of nibbles is kept for each lane and position in a dword; `base` is added to each nibble on
// the way, as is cheapest, and what stands for more or less than its nibble is accounted for in
// `corrections`, one for each block.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "dispatch.h"
#include "plane_rows.h"
#include "vec.h"

namespace popc {

constexpr int64_t chunk_blocks = 4, chunk_lanes = chunk_blocks * block_dwords;
constexpr int64_t chunk_values = chunk_blocks * block_values;
constexpr int64_t factor_blocks = 16;  // factors are made for a multiple of these

// One row of nibbles: its values are (nibble + offset) · scale · multiplier.
struct NibbleRow {
  const uint8_t* scales;
  const uint8_t* plane;
};

// Of one token, the factor of a row, and what is to be taken from each of its nibbles. A factor of
// zero takes the row for zeros, whatever its scales are.
struct RowFactor {
  float factor = 0.0f, offset = 0.0f;
};

// Pairs of rows that one pass over the sums adds up, for N tokens: as many as registers hold.
template <int N>
constexpr int pair_block = N == 1 ? 8 : 4;

template <int R>
struct PairBlock {
  NibbleRow rows[2 * R];
  RowFactor factors[max_tokens][2 * R];
};

// The sums of one thread: `values` [tokens, chunks, nibble, lane], `corrections` [tokens, blocks].
struct PlaneSums {
  float* values;
  float* corrections;
  int64_t value_stride, correction_stride;
};

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
// Not inlined, a lambda would keep the caller's registers in memory.
#define POPC_INLINE __attribute__((always_inline))

// Nibble n becomes the bfloat16 base + n, by bits alone, next to that of the other row of the pair:
// 32 products an instruction. Factors are bfloat16; where they are split, two parts of it.
template <bool split>
struct PairKernel {
  static constexpr float base = split ? 16.0f : 128.0f;  // the less, the more exact sums are
  static constexpr int64_t parts = split ? 2 : 1;

  static int64_t scratch_size(int64_t tokens, int64_t pairs, int64_t blocks) {
    return tokens * pairs * parts * round_up(blocks, factor_blocks) * sizeof(uint32_t);
  }

  POPC_INLINE static __m512 scaled(const uint8_t* scales, __mmask16 mask, float factor) {
    const __m256i bits = _mm256_maskz_loadu_epi16(mask, scales);
    const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    return factor == 0.0f ? _mm512_setzero_ps() : _mm512_mul_ps(scale, _mm512_set1_ps(factor));
  }

  // Two rows' values as pairs of bfloat16.
  POPC_INLINE static __m512i pairs_of(__m512 first, __m512 second) {
    const __m512i order = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
        19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first));
  }
  POPC_INLINE static __m512 first_of(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  }
  POPC_INLINE static __m512 second_of(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
  }

  // The factors of one pair for one token, block by block; adds to its corrections.
  POPC_INLINE static void make_factors(
      const NibbleRow* rows, const RowFactor* factors, int64_t blocks, uint32_t* to,
      int64_t part_stride, float* corrections) {
    for (int64_t k = 0; k < blocks; k += factor_blocks) {
      const __mmask16 mask = _cvtu32_mask16(
          blocks - k >= factor_blocks ? 0xffffu : (1u << (blocks - k)) - 1u);
      const __m512 first = scaled(rows[0].scales + scale_bytes * k, mask, factors[0].factor);
      const __m512 second = scaled(rows[1].scales + scale_bytes * k, mask, factors[1].factor);
      const __m512i pairs = pairs_of(first, second);
      __m512 used_first = first_of(pairs), used_second = second_of(pairs);
      _mm512_storeu_si512(to + k, pairs);
      if constexpr (split) {
        const __m512i rest =
            pairs_of(_mm512_sub_ps(first, used_first), _mm512_sub_ps(second, used_second));
        _mm512_storeu_si512(to + part_stride + k, rest);
        used_first = _mm512_add_ps(used_first, first_of(rest));
        used_second = _mm512_add_ps(used_second, second_of(rest));
      }
      __m512 sum = _mm512_loadu_ps(corrections + k);
      sum = _mm512_fmadd_ps(used_first, _mm512_set1_ps(factors[0].offset + base), sum);
      sum = _mm512_fmadd_ps(used_second, _mm512_set1_ps(factors[1].offset + base), sum);
      _mm512_storeu_ps(corrections + k, sum);
    }
  }

  // The factors of a chunk's blocks, each in the lanes of its block.
  struct LaneFactors {
    __m512bh part[parts];

    POPC_INLINE LaneFactors(const uint32_t* factors, int64_t part_stride) {
      const __m512i block_of_lane =
          _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
      unroll<parts>([&](auto i) POPC_INLINE {
        const float* from = reinterpret_cast<const float*>(factors + i * part_stride);
        const __m512 four = _mm512_broadcast_f32x4(_mm_loadu_ps(from));
        part[i] = (__m512bh)_mm512_permutevar_ps(four, block_of_lane);
      });
    }
    POPC_INLINE __m512 multiply(__m512 sum, __m512bh nibbles) const {
      unroll<parts>([&](auto i) POPC_INLINE { sum = _mm512_dpbf16_ps(sum, nibbles, part[i]); });
      return sum;
    }
  };

  // The nibbles of position J in either half of dwords.
  template <int J>
  POPC_INLINE static __m512bh expand(__m512i halves) {
    constexpr int shift = 4 * J - (split ? 3 : 0);
    if constexpr (shift < 0) {
      halves = _mm512_slli_epi32(halves, -shift);
    } else if constexpr (shift > 0) {
      halves = _mm512_srli_epi32(halves, shift);
    }
    const __m512i mask = _mm512_set1_epi32(split ? 0x00780078 : 0x000f000f);
    const __m512i one = _mm512_set1_epi32(split ? 0x41804180 : 0x43004300);
    return (__m512bh)_mm512_ternarylogic_epi32(halves, mask, one, 0xea);  // halves & mask | one
  }

  // The low halves of two registers' dwords side by side, and the high ones.
  POPC_INLINE static __m512i low_halves(__m512i a, __m512i b) {
    const __m512i mask = _mm512_set1_epi32(0xffff);
    return _mm512_ternarylogic_epi32(a, mask, _mm512_slli_epi32(b, 16), 0xea);
  }
  POPC_INLINE static __m512i high_halves(__m512i a, __m512i b) {
    const __m512i mask = _mm512_set1_epi32(0xffff0000);
    return _mm512_ternarylogic_epi32(b, mask, _mm512_srli_epi32(a, 16), 0xea);
  }

  // Adds R pairs of rows to the sums; prefetches the next ones.
  template <int N, int R>
  static void add(
      const PairBlock<R>& block, const PairBlock<R>& next, int64_t blocks, PlaneSums sums,
      uint8_t* scratch) {
    const int64_t factor_stride = round_up(blocks, factor_blocks);
    const int64_t part_stride = N * R * factor_stride;
    uint32_t* factors = reinterpret_cast<uint32_t*>(scratch);
    for (int n = 0; n < N; ++n) {
      for (int p = 0; p < R; ++p) {
        make_factors(
            block.rows + 2 * p, block.factors[n] + 2 * p, blocks,
            factors + (n * R + p) * factor_stride, part_stride,
            sums.corrections + n * sums.correction_stride);
      }
    }
    int64_t k = 0;
    for (; k + chunk_blocks <= blocks; k += chunk_blocks) {
      add_chunk<N, R>(block, next, k, 0xffff, factors, factor_stride, sums);
    }
    if (k < blocks) {
      const __mmask16 mask = _cvtu32_mask16((1u << (block_dwords * (blocks - k))) - 1u);
      add_chunk<N, R>(block, next, k, mask, factors, factor_stride, sums);
    }
  }

  template <int N, int R>
  POPC_INLINE static void add_chunk(
      const PairBlock<R>& block, const PairBlock<R>& next, int64_t k, __mmask16 mask,
      const uint32_t* factors, int64_t factor_stride, PlaneSums sums) {
    const int64_t offset = plane_bytes * k, part_stride = N * R * factor_stride;
    float* to = sums.values + k * block_values;
    const auto load = [&](int row) POPC_INLINE {
      __builtin_prefetch(next.rows[row].plane + offset, 0, 2);
      return _mm512_maskz_loadu_epi32(mask, block.rows[row].plane + offset);
    };
    if constexpr (N == 1) {
      __m512 sum[dword_nibbles];
      unroll<dword_nibbles>([&](auto j) POPC_INLINE { sum[j] = _mm512_loadu_ps(to + j * chunk_lanes); });
      unroll<R>([&](auto p) POPC_INLINE {
        const LaneFactors own(factors + p * factor_stride + k, part_stride);
        const __m512i a = load(2 * p), b = load(2 * p + 1);
        const __m512i low = low_halves(a, b), high = high_halves(a, b);
        unroll<4>([&](auto j) POPC_INLINE {
          sum[j] = own.multiply(sum[j], expand<j>(low));
          sum[j + 4] = own.multiply(sum[j + 4], expand<j>(high));
        });
      });
      unroll<dword_nibbles>([&](auto j) POPC_INLINE { _mm512_storeu_ps(to + j * chunk_lanes, sum[j]); });
    } else {
      __m512i a[R], b[R];
      unroll<R>([&](auto p) POPC_INLINE {
        a[p] = load(2 * p);
        b[p] = load(2 * p + 1);
      });
      unroll<2>([&](auto half) POPC_INLINE {
        __m512bh nibbles[R][4];
        unroll<R>([&](auto p) POPC_INLINE {
          const __m512i halves = half ? high_halves(a[p], b[p]) : low_halves(a[p], b[p]);
          unroll<4>([&](auto j) POPC_INLINE { nibbles[p][j] = expand<j>(halves); });
        });
#pragma GCC unroll 1
        for (int n = 0; n < N; ++n) {
          float* token = to + n * sums.value_stride + half * 4 * chunk_lanes;
          __m512 sum[4];
          unroll<4>([&](auto j) POPC_INLINE { sum[j] = _mm512_loadu_ps(token + j * chunk_lanes); });
          unroll<R>([&](auto p) POPC_INLINE {
            const LaneFactors own(factors + (n * R + p) * factor_stride + k, part_stride);
            unroll<4>([&](auto j) POPC_INLINE { sum[j] = own.multiply(sum[j], nibbles[p][j]); });
          });
          unroll<4>([&](auto j) POPC_INLINE { _mm512_storeu_ps(token + j * chunk_lanes, sum[j]); });
        }
      });
    }
  }
};
#else
// Each row by itself, in float32.
template <bool split>
struct PairKernel {
  static constexpr float base = 0.0f;

  static int64_t scratch_size(int64_t tokens, int64_t pairs, int64_t blocks) {
    return tokens * 2 * pairs * round_up(blocks, factor_blocks) * sizeof(float);
  }

  static void make_factors(
      const NibbleRow& row, RowFactor factor, int64_t blocks, float* to, float* corrections) {
    if (factor.factor == 0.0f) {
      std::fill_n(to, round_up(blocks, factor_blocks), 0.0f);
      return;
    }
    for (int64_t k = 0; k < blocks; ++k) {
      to[k] = load_scale(row.scales + scale_bytes * k) * factor.factor;
      corrections[k] += to[k] * factor.offset;
    }
    std::fill(to + blocks, to + round_up(blocks, factor_blocks), 0.0f);
  }

  template <int N, int R>
  static void add(
      const PairBlock<R>& block, const PairBlock<R>& next, int64_t blocks, PlaneSums sums,
      uint8_t* scratch) {
    const int64_t factor_stride = round_up(blocks, factor_blocks);
    float* factors = reinterpret_cast<float*>(scratch);
    for (int n = 0; n < N; ++n) {
      for (int r = 0; r < 2 * R; ++r) {
        make_factors(
            block.rows[r], block.factors[n][r], blocks, factors + (n * 2 * R + r) * factor_stride,
            sums.corrections + n * sums.correction_stride);
      }
    }
    for (int64_t k = 0; k < blocks; k += chunk_blocks) {
      add_chunk<N, R>(block, next, k, blocks, factors, factor_stride, sums);
    }
  }

  template <int N, int R>
  static void add_chunk(
      const PairBlock<R>& block, const PairBlock<R>& next, int64_t k, int64_t blocks,
      const float* factors, int64_t factor_stride, PlaneSums sums) {
    constexpr int rows = 2 * R;
    constexpr int vectors = chunk_lanes / lanes;
    uint32_t dwords[rows][chunk_lanes] = {};
    float lane_factors[N][rows][chunk_lanes];
    const int64_t bytes = plane_bytes * std::min(chunk_blocks, blocks - k);
    for (int r = 0; r < rows; ++r) {
#if defined(__GNUC__) || defined(__clang__)
      __builtin_prefetch(next.rows[r].plane + plane_bytes * k, 0, 2);
#endif
      std::memcpy(dwords[r], block.rows[r].plane + plane_bytes * k, bytes);
      for (int n = 0; n < N; ++n) {
        const float* from = factors + (n * rows + r) * factor_stride + k;
        for (int64_t lane = 0; lane < chunk_lanes; ++lane) {
          lane_factors[n][r][lane] = from[lane / block_dwords];
        }
      }
    }
    for (int j = 0; j < dword_nibbles; ++j) {
      float nibbles[rows][chunk_lanes];
      for (int r = 0; r < rows; ++r) {
        for (int64_t lane = 0; lane < chunk_lanes; ++lane) {
          const int32_t nibble = static_cast<int32_t>(dwords[r][lane] >> (4 * j) & 15u);
          nibbles[r][lane] = static_cast<float>(nibble);
        }
      }
      for (int n = 0; n < N; ++n) {
        float* to = sums.values + n * sums.value_stride + k * block_values + j * chunk_lanes;
        for (int v = 0; v < vectors; ++v) {
          Vec sum = Vec::loadu(to + v * lanes);
          for (int r = 0; r < rows; ++r) {
            sum = at::vec::fmadd(
                Vec::loadu(nibbles[r] + v * lanes), Vec::loadu(lane_factors[n][r] + v * lanes),
                sum);
          }
          sum.store(to + v * lanes);
        }
      }
    }
  }
};
#endif

}  // namespace popc
