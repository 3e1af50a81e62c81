// Microkernels over R weight rows and N tokens, accumulated in float32: dot_rows() and axpy_rows().
// Each reads a row once for all N tokens, and prefetches the rows that are read next.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/macros/Macros.h>
#include <c10/util/BFloat16.h>

#include <cstdint>
#include <tuple>
#include <type_traits>

#include "dispatch.h"
#include "vec.h"

namespace popc {

// The rows that are read next, of `width` values each: maybe fewer than the current rows have. Rows
// of a list are anywhere in memory, so the hardware does not prefetch them.
template <typename T>
struct NextRows {
  const T* const* rows;
  int64_t width;

  // Prefetches R rows at offset k, unless that is past their end. Always inline: GCC takes a
  // function of prefetches for one without effect, and may drop the call.
  template <int R>
  C10_ALWAYS_INLINE void prefetch(int64_t k) const {
    if (k + pair_lanes > width) return;
    for (int r = 0; r < R; ++r) popc::prefetch(rows[r] + k);
  }
};

// Rows per dot_rows() call for N tokens: as many accumulators as the registers hold, for several
// memory streams at once, and as each load of x then serves all rows.
template <int N>
constexpr int dot_row_block = lanes == 16 ? (N <= 4 ? 4 : 3) : N <= 2 ? 4 : N <= 4 ? 2 : 1;

#if defined(__AVX512BF16__) && defined(__AVX512F__)
// Both operands in bfloat16, 32 products an instruction; returns the k of the tail.
template <int N, int R>
inline int64_t dot_rows_bf16(
    const at::BFloat16* x, int64_t width, const at::BFloat16* const* rows,
    NextRows<at::BFloat16> next, float (*out)[N]) {
  __m512 acc[R][N];
  unroll<R>([&](auto r) { unroll<N>([&](auto n) { acc[r][n] = _mm512_setzero_ps(); }); });
  int64_t k = 0;
  for (; k + 32 <= width; k += 32) {
    next.template prefetch<R>(k);
    unroll<R>([&](auto r) {
      const __m512bh w = (__m512bh)_mm512_loadu_si512(rows[r] + k);
      unroll<N>([&](auto n) {
        const __m512bh token = (__m512bh)_mm512_loadu_si512(x + n * width + k);
        acc[r][n] = _mm512_dpbf16_ps(acc[r][n], token, w);
      });
    });
  }
  unroll<R>([&](auto r) {
    unroll<N>([&](auto n) { out[r][n] = _mm512_reduce_add_ps(acc[r][n]); });
  });
  return k;
}
#endif

// out[r][n] += x[n, k:] · rows[r, k:], value by value.
template <typename T, int N, int R>
inline void dot_tail(
    const float* x, int64_t k, int64_t width, const T* const* rows, float (*out)[N]) {
  for (; k < width; ++k) {
    for (int r = 0; r < R; ++r) {
      const float value = static_cast<float>(rows[r][k]);
      for (int n = 0; n < N; ++n) out[r][n] += value * x[n * width + k];
    }
  }
}

// out[r][n] = x[n] · rows[r]; x is `stored`, [N, width], widened by widen().
template <typename T, int N, int R>
inline void dot_rows(
    const float* x, const T* stored, int64_t width, const T* const* rows, NextRows<T> next,
    float (*out)[N]) {
  int64_t k = 0;
  bool done = false;
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    k = dot_rows_bf16<N, R>(stored, width, rows, next, out);
    done = true;
  }
#endif
  if (!done) {
    constexpr int chains = N * R <= 4 ? 2 : 1;  // few accumulators would wait for each other
    Vec acc[R][N][chains];
    unroll<R>([&](auto r) {
      unroll<N>([&](auto n) { unroll<chains>([&](auto c) { acc[r][n][c] = Vec(0.0f); }); });
    });
    for (; k + pair_lanes <= width; k += pair_lanes) {
      next.template prefetch<R>(k);
      unroll<R>([&](auto r) {
        const auto pair = load_pair(rows[r] + k);
        unroll<N>([&](auto n) {
          const float* token = x + n * width + k;
          Vec& low = acc[r][n][0];
          Vec& high = acc[r][n][chains - 1];
          low = at::vec::fmadd(std::get<0>(pair), Vec::loadu(token), low);
          high = at::vec::fmadd(std::get<1>(pair), Vec::loadu(token + lanes), high);
        });
      });
    }
    unroll<R>([&](auto r) {
      unroll<N>([&](auto n) {
        out[r][n] =
            reduce_add(chains == 2 ? acc[r][n][0] + acc[r][n][chains - 1] : acc[r][n][0]);
      });
    });
  }
  dot_tail<T, N, R>(x, k, width, rows, out);
}

// Rows per axpy_rows() call for N tokens: the accumulators of many tokens outgrow L1, and are read
// and written once for all these rows. Four where there are fewer registers than in AVX-512.
template <int N>
constexpr int axpy_row_block = N >= 4 && lanes == 16 ? 8 : 4;

// Whether to multiply bfloat16 by pairs of rows. Not with AMX: cores that have it multiply float32
// as fast, and pairs must be interleaved first.
#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512) && !defined(__AMX_TILE__)
#define POPC_AXPY_BF16_PAIRS
#endif

#ifdef POPC_AXPY_BF16_PAIRS
// Rows in pairs, 32 products an instruction; returns the k of the tail. Scales are rounded to
// bfloat16, which activations are already.
template <int N, int R>
inline int64_t axpy_rows_bf16(
    const at::BFloat16* const* rows, NextRows<at::BFloat16> next,
    const float (*scale)[max_tokens], int64_t width, float* acc) {
  static_assert(R % 2 == 0);
  constexpr int pairs = R / 2;
  uint32_t scale_pairs[N][pairs];
  for (int n = 0; n < N; ++n) {
    for (int p = 0; p < pairs; ++p) {
      const uint32_t first = at::BFloat16(scale[2 * p][n]).x;
      const uint32_t second = at::BFloat16(scale[2 * p + 1][n]).x;
      scale_pairs[n][p] = second << 16 | first;
    }
  }
  int64_t k = 0;
  for (; k + pair_lanes <= width; k += pair_lanes) {
    __m512bh even[pairs], odd[pairs];
    next.template prefetch<R>(k);
    unroll<pairs>([&](auto p) {
      const auto interleaved = interleave_rows(rows[2 * p] + k, rows[2 * p + 1] + k);
      even[p] = (__m512bh)interleaved.first;
      odd[p] = (__m512bh)interleaved.second;
    });
    unroll<N>([&](auto n) {
      float* to = acc + n * width + k;
      __m512 low = _mm512_loadu_ps(to), high = _mm512_loadu_ps(to + lanes);
      unroll<pairs>([&](auto p) {
        const __m512bh scales =
            (__m512bh)_mm512_set1_epi32(static_cast<int>(scale_pairs[n][p]));
        low = _mm512_dpbf16_ps(low, even[p], scales);
        high = _mm512_dpbf16_ps(high, odd[p], scales);
      });
      _mm512_storeu_ps(to, low);
      _mm512_storeu_ps(to + lanes, high);
    });
  }
  return k;
}
#endif

// acc[n, k:] += Σ_r scale[r][n] · rows[r, k:], value by value.
template <typename T, int N, int R>
inline void axpy_tail(
    const T* const* rows, const float (*scale)[max_tokens], int64_t k, int64_t width,
    float* acc) {
  for (; k < width; ++k) {
    for (int n = 0; n < N; ++n) {
      for (int r = 0; r < R; ++r) {
        acc[n * width + k] += scale[r][n] * static_cast<float>(rows[r][k]);
      }
    }
  }
}

// acc[n] += Σ_r scale[r][n] · rows[r]; acc is [N, width] in lane order.
template <typename T, int N, int R>
inline void axpy_rows(
    const T* const* rows, NextRows<T> next, const float (*scale)[max_tokens], int64_t width,
    float* acc) {
  int64_t k = 0;
#ifdef POPC_AXPY_BF16_PAIRS
  if constexpr (std::is_same_v<T, at::BFloat16> && R % 2 == 0) {
    k = axpy_rows_bf16<N, R>(rows, next, scale, width, acc);
  }
#endif
  for (; k + pair_lanes <= width; k += pair_lanes) {
    Vec low[R], high[R];
    next.template prefetch<R>(k);
    unroll<R>([&](auto r) {
      std::tie(low[r], high[r]) = load_pair(rows[r] + k);
    });
    unroll<N>([&](auto n) {
      float* to = acc + n * width + k;
      Vec a = Vec::loadu(to), b = Vec::loadu(to + lanes);
      unroll<R>([&](auto r) {
        const Vec factor(scale[r][n]);
        a = at::vec::fmadd(low[r], factor, a);
        b = at::vec::fmadd(high[r], factor, b);
      });
      a.store(to);
      b.store(to + lanes);
    });
  }
  axpy_tail<T, N, R>(rows, scale, k, width, acc);
}

}  // namespace popc
