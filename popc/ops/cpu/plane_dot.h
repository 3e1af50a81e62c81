// Dot products of a few tokens with output-major rows of nibbles.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "dispatch.h"
#include "plane_axpy.h"
#include "plane_expand.h"
#include "plane_rows.h"
#include "vec.h"

namespace popc {

#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
// Nibbles become bfloat16 as in PairKernel: those of the two halves of a dword side by side, so that
// tokens are stored in this order once.
template <typename T>
class DotTokens {
  static constexpr bool split = std::is_same_v<T, float>;
  using Kernel = PairKernel<split>;
  static constexpr int64_t parts = Kernel::parts;
  static constexpr int64_t half_nibbles = dword_nibbles / 2;
  // Of a chunk of a token, in dwords: pairs of values, and the sum of the values of each lane.
  static constexpr int64_t pair_dwords = parts * half_nibbles * chunk_lanes;
  static constexpr int64_t token_dwords = pair_dwords + chunk_lanes;

 public:
  DotTokens(const T* x, int64_t tokens, int64_t inputs)
      : tokens_(tokens), chunks_((inputs + chunk_values - 1) / chunk_values),
        dwords_(new uint32_t[tokens * chunks_ * token_dwords]) {
    for (int64_t n = 0; n < tokens; ++n) {
      for (int64_t c = 0; c < chunks_; ++c) {
        arrange(x + n * inputs, inputs, c * chunk_values, at(c, n));
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
  uint32_t* at(int64_t chunk, int64_t n) const {
    return dwords_.get() + (chunk * tokens_ + n) * token_dwords;
  }

  static void arrange(const T* x, int64_t inputs, int64_t first, uint32_t* to) {
    const auto value = [&](int64_t block, int64_t nibble, int64_t dword) {
      const int64_t i = first + block * block_values + nibble * block_dwords + dword;
      return i < inputs ? static_cast<float>(x[i]) : 0.0f;
    };
    const auto bits = [](float v) { return static_cast<uint32_t>(at::BFloat16(v).x); };
    float sums[chunk_lanes];
    for (int64_t lane = 0; lane < chunk_lanes; ++lane) {
      sums[lane] = 0.0f;
      for (int64_t j = 0; j < half_nibbles; ++j) {
        float pair[2];
        for (int64_t half = 0; half < 2; ++half) {
          pair[half] = value(lane / block_dwords, j + half * half_nibbles, lane % block_dwords);
        }
        for (int64_t part = 0; part < parts; ++part) {
          to[(part * half_nibbles + j) * chunk_lanes + lane] = bits(pair[0]) | bits(pair[1]) << 16;
          for (float& v : pair) {
            const float used = static_cast<float>(at::BFloat16(v));
            sums[lane] += used;
            v -= used;
          }
        }
      }
    }
    std::memcpy(to + pair_dwords, sums, sizeof(sums));
  }

  POPC_INLINE static __m512i load(const uint8_t* from, __mmask16 mask) {
    return _mm512_maskz_loadu_epi32(mask, from);
  }

  template <int N, bool has_low>
  POPC_INLINE void add_chunk(
      const RowView& row, const RowView& next, int64_t k, int64_t blocks, __m512* sum) const {
    constexpr int planes = has_low ? 2 : 1;
    const int64_t offset = plane_bytes * k, left = std::min(chunk_blocks, blocks - k);
    const __mmask16 mask = _cvtu32_mask16((1u << (block_dwords * left)) - 1u);
    __builtin_prefetch(next.high + offset, 0, 2);
    if (has_low) __builtin_prefetch(next.low + offset, 0, 2);
    if (k % (4 * chunk_blocks) == 0) __builtin_prefetch(next.scales + scale_bytes * k, 0, 2);
    __m512bh nibbles[planes][half_nibbles];
    const __m512i high = load(row.high + offset, mask);
    unroll<half_nibbles>([&](auto j) POPC_INLINE {
      nibbles[0][j] = Kernel::template expand<j>(high);
    });
    if constexpr (has_low) {
      const __m512i low = load(row.low + offset, mask);
      unroll<half_nibbles>([&](auto j) POPC_INLINE {
        nibbles[1][j] = Kernel::template expand<j>(low);
      });
    }
    const __m512 scale = lane_scales(row.scales + scale_bytes * k, left);
    // What is taken from each high nibble, so that a low one is as it is.
    const float multiplier = has_low ? 16.0f : row.multiplier;
    const float offset_of_both =
        row.zero / multiplier + Kernel::base + (has_low ? Kernel::base / multiplier : 0.0f);
    const __m512 taken = _mm512_set1_ps(-offset_of_both);
    const uint32_t* token = at(k / chunk_blocks, 0);
#pragma GCC unroll 1
    for (int n = 0; n < N; ++n, token += token_dwords) {
      __m512 products[planes];
      products[0] = _mm512_mul_ps(taken, _mm512_loadu_ps(token + pair_dwords));
      if constexpr (has_low) products[1] = _mm512_setzero_ps();
      unroll<planes>([&](auto plane) POPC_INLINE {
        unroll<half_nibbles>([&](auto j) POPC_INLINE {
          unroll<parts>([&](auto part) POPC_INLINE {
            const __m512bh x =
                (__m512bh)_mm512_loadu_si512(token + (part * half_nibbles + j) * chunk_lanes);
            products[plane] = _mm512_dpbf16_ps(products[plane], nibbles[plane][j], x);
          });
        });
      });
      __m512 value = _mm512_mul_ps(products[0], _mm512_set1_ps(multiplier));
      if constexpr (has_low) value = _mm512_add_ps(value, products[1]);
      sum[n] = _mm512_fmadd_ps(value, scale, sum[n]);
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
  std::unique_ptr<uint32_t[]> dwords_;
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
