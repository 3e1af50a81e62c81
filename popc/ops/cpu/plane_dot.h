// Dot products of a few tokens with output-major rows of nibbles.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "dispatch.h"
#include "plane_axpy.h"
#include "plane_expand.h"
#include "plane_rows.h"
#include "vec.h"

namespace popc {

#if defined(__AVX512VNNI__) && defined(CPU_CAPABILITY_AVX512)
// Tokens become integers of 15 bits, in units of a block of 32 values, in two parts of 8: `upper` ·
// 128 + `lower`. They stand as nibbles do: first those of the lower halves of a chunk's bytes, then
// those of the upper halves.
class DotTokens {
 public:
  DotTokens(const float* x, int64_t tokens, int64_t inputs, bool two_planes)
      : tokens_(tokens), chunks_((inputs + chunk_values - 1) / chunk_values),
        chunk_tokens_(tokens * chunks_) {
    const float zero = two_planes ? constants::zero : constants::plane_zero;
    for (int64_t n = 0; n < tokens; ++n) {
      for (int64_t c = 0; c < chunks_; ++c) {
        const int64_t first = c * chunk_values;
        chunk_tokens_[c * tokens_ + n] =
            arrange(x + n * inputs + first, std::min(chunk_values, inputs - first), zero);
      }
    }
  }

  // out[n] = x[n] · row, for all N tokens.
  template <int N>
  void multiply(const RowView& row, const RowView& next, int64_t blocks, float* out) const {
    __m512 sum[N];
    for (int n = 0; n < N; ++n) sum[n] = _mm512_setzero_ps();
    for (int64_t k = 0; k < blocks; k += chunk_blocks) {
      if (row.low) {
        add_chunk<N, true>(row, next, k, blocks, sum);
      } else {
        add_chunk<N, false>(row, next, k, blocks, sum);
      }
    }
    for (int n = 0; n < N; ++n) out[n] = _mm512_reduce_add_ps(sum[n]);
  }

 private:
  // 128 values of a token.
  struct ChunkToken {
    alignas(64) int8_t upper[2][64];
    alignas(64) int8_t lower[2][64];
    alignas(64) int32_t start[chunk_lanes];  // what zeros add to twice the products
    alignas(64) float unit[chunk_lanes];     // half of that of each lane's block
  };

  static ChunkToken arrange(const float* x, int64_t count, float zero) {
    constexpr float top = 127.0f * 128.0f;
    ChunkToken to = {};
    for (int64_t b = 0; b * block_values < count; ++b) {
      const float* block = x + b * block_values;
      const int64_t values = std::min(block_values, count - b * block_values);
      float largest = 0.0f;
      for (int64_t i = 0; i < values; ++i) {
        const float size = std::fabs(block[i]);
        if (!(size <= largest)) largest = size;  // a NaN stays
        if (std::isnan(largest)) break;
      }
      std::fill_n(to.unit + b * block_dwords, block_dwords, largest / (2 * top));
      if (!(largest >= 1e-30f && largest <= 3e38f)) continue;  // nothing, or no number
      for (int64_t i = 0; i < values; ++i) {
        const auto value = static_cast<int32_t>(std::nearbyint(block[i] * (top / largest)));
        const int32_t upper = (value + 64) >> 7;
        const int64_t half = i / block_dwords % 2, lane = b * block_dwords + i % block_dwords;
        const int64_t at = quad_rows * lane + i / 8;
        to.upper[half][at] = static_cast<int8_t>(upper);
        to.lower[half][at] = static_cast<int8_t>(value - (upper << 7));
        to.start[lane] -= static_cast<int32_t>(2 * zero) * value;
      }
    }
    return to;
  }

  template <int N, bool has_low>
  POPC_INLINE void add_chunk(
      const RowView& row, const RowView& next, int64_t k, int64_t blocks, __m512* sum) const {
    const int64_t offset = plane_bytes * k, left = std::min(chunk_blocks, blocks - k);
    const __mmask16 mask = _cvtu32_mask16((1u << (block_dwords * left)) - 1u);
    __builtin_prefetch(next.high + offset, 0, 2);
    if (has_low) __builtin_prefetch(next.low + offset, 0, 2);
    if (k % (4 * chunk_blocks) == 0) __builtin_prefetch(next.scales + scale_bytes * k, 0, 2);
    // The integers of a chunk as bytes: both nibbles, or one.
    const __m512i mask15 = _mm512_set1_epi8(15);
    const __m512i high = _mm512_maskz_loadu_epi32(mask, row.high + offset);
    __m512i first, second = _mm512_srli_epi16(high, 4);
    if constexpr (has_low) {
      const __m512i low = _mm512_maskz_loadu_epi32(mask, row.low + offset);
      first = select_bits(mask15, low, _mm512_slli_epi16(high, 4));
      second = select_bits(mask15, _mm512_srli_epi16(low, 4), high);
    } else {
      first = _mm512_and_si512(high, mask15);
      second = _mm512_and_si512(second, mask15);
    }
    const __m512 scale = lane_scales(row.scales + scale_bytes * k, left);
    const ChunkToken* token = &chunk_tokens_[k / chunk_blocks * tokens_];
#pragma GCC unroll 1
    for (int n = 0; n < N; ++n, ++token) {
      __m512i upper = _mm512_setzero_si512(), lower = _mm512_setzero_si512();
      upper = _mm512_dpbusd_epi32(upper, first, _mm512_load_si512(token->upper[0]));
      lower = _mm512_dpbusd_epi32(lower, first, _mm512_load_si512(token->lower[0]));
      upper = _mm512_dpbusd_epi32(upper, second, _mm512_load_si512(token->upper[1]));
      lower = _mm512_dpbusd_epi32(lower, second, _mm512_load_si512(token->lower[1]));
      // Twice the products, as the zero of one plane is 7.5.
      __m512i twice = _mm512_add_epi32(_mm512_slli_epi32(upper, 8), _mm512_slli_epi32(lower, 1));
      twice = _mm512_add_epi32(twice, _mm512_load_si512(token->start));
      const __m512 unit = _mm512_mul_ps(scale, _mm512_load_ps(token->unit));
      sum[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(twice), unit, sum[n]);
    }
  }
  // The scales of up to four blocks, each in the lanes of its block.
  POPC_INLINE static __m512 lane_scales(const uint8_t* scales, int64_t blocks) {
    uint64_t four = 0;
    std::memcpy(&four, scales, scale_bytes * blocks);
    const __m512i words = _mm512_set1_epi64(static_cast<int64_t>(four));
    const __m512i in_high_halves = _mm512_set_epi16(
        3, 31, 3, 31, 3, 31, 3, 31, 2, 31, 2, 31, 2, 31, 2, 31, 1, 31, 1, 31, 1, 31, 1, 31, 0, 31,
        0, 31, 0, 31, 0, 31);
    return _mm512_castsi512_ps(
        _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, in_high_halves, words));
  }

  int64_t tokens_, chunks_;
  std::vector<ChunkToken> chunk_tokens_;
};
#endif

// A row of any format, expanded to float32.
template <int N>
inline void dot_expanded(const float* row, const float* x, int64_t inputs, float* out) {
  for (int n = 0; n < N; ++n) {
    const float* token = x + n * inputs;
    Vec low(0.0f), high(0.0f);
    int64_t k = 0;
    for (; k + pair_lanes <= inputs; k += pair_lanes) {
      low = at::vec::fmadd(Vec::loadu(row + k), Vec::loadu(token + k), low);
      high = at::vec::fmadd(Vec::loadu(row + k + lanes), Vec::loadu(token + k + lanes), high);
    }
    out[n] = reduce_add(low + high);
    for (; k < inputs; ++k) out[n] += row[k] * token[k];
  }
}

}  // namespace popc
