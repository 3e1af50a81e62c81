// What reads the weights: a dot product per row, and a sum of scaled rows. Both stream each row once
// for up to `most_tokens` tokens, in float32, by at::vec: AVX-512, AVX2, NEON or portable, as the
// flags of the build say.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <tuple>
#include <type_traits>

namespace popc {

using Lanes = at::vec::Vectorized<float>;
constexpr int64_t lanes = Lanes::size();
constexpr int64_t step = 2 * lanes;  // values in a vector of 16-bit floats
constexpr int64_t most_tokens = 8;

template <typename T>
inline std::tuple<Lanes, Lanes> load_pair(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return {Lanes::loadu(from), Lanes::loadu(from + lanes)};
  } else {
    return at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from));
  }
}

template <typename T>
inline void widen(const T* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + step <= n; i += step) {
    const auto [low, high] = load_pair(from + i);
    low.store(to + i);
    high.store(to + i + lanes);
  }
  for (; i < n; ++i) to[i] = static_cast<float>(from[i]);
}

inline float sum(const Lanes& values) {
  return at::vec::vec_reduce_all<float>(
      [](Lanes a, Lanes b) { return a + b; }, values);
}

// A row's successor in the list is anywhere in memory: asked for while this row is read.
template <typename T>
inline void prefetch(const T* next, int64_t at) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(next + at);
#endif
}

#if defined(__AVX512BF16__) && defined(__AVX512F__)
// Both operands as they are stored: 32 products an instruction.
template <int N>
inline int64_t dot_bf16(
    const at::BFloat16* x, int64_t width, const at::BFloat16* row, const at::BFloat16* next,
    float* out) {
  __m512 acc[N];
  for (int n = 0; n < N; ++n) acc[n] = _mm512_setzero_ps();
  int64_t k = 0;
  for (; k + 32 <= width; k += 32) {
    prefetch(next, k);
    const __m512bh w = (__m512bh)_mm512_loadu_si512(row + k);
    for (int n = 0; n < N; ++n) {
      acc[n] = _mm512_dpbf16_ps(acc[n], (__m512bh)_mm512_loadu_si512(x + n * width + k), w);
    }
  }
  for (int n = 0; n < N; ++n) out[n] = _mm512_reduce_add_ps(acc[n]);
  return k;
}
#endif

// out[n] = x[n] · row, for N tokens; x is [N, width] in float32 and, as `stored`, in T.
template <typename T, int N>
inline void dot(
    const float* x, const T* stored, int64_t width, const T* row, const T* next, float* out) {
  int64_t k = 0;
  for (int n = 0; n < N; ++n) out[n] = 0.0f;
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    k = dot_bf16<N>(stored, width, row, next, out);
  }
#endif
  if (k == 0) {
    constexpr int parts = N == 1 ? 2 : 1;  // one token alone would wait for its own sums
    Lanes acc[N][2 * parts];
    for (int n = 0; n < N; ++n) {
      for (int p = 0; p < 2 * parts; ++p) acc[n][p] = Lanes(0.0f);
    }
    for (; k + parts * step <= width; k += parts * step) {
      for (int p = 0; p < parts; ++p) {
        const int64_t at = k + p * step;
        prefetch(next, at);
        const auto [low, high] = load_pair(row + at);
        for (int n = 0; n < N; ++n) {
          const float* token = x + n * width + at;
          acc[n][2 * p] = at::vec::fmadd(low, Lanes::loadu(token), acc[n][2 * p]);
          acc[n][2 * p + 1] = at::vec::fmadd(high, Lanes::loadu(token + lanes), acc[n][2 * p + 1]);
        }
      }
    }
    for (int n = 0; n < N; ++n) {
      Lanes total = acc[n][0] + acc[n][1];
      for (int p = 1; p < parts; ++p) total = total + acc[n][2 * p] + acc[n][2 * p + 1];
      out[n] = sum(total);
    }
  }
  for (; k < width; ++k) {
    const float value = static_cast<float>(row[k]);
    for (int n = 0; n < N; ++n) out[n] += value * x[n * width + k];
  }
}

// acc[n] += Σ_r scale[r][n] · rows[r], for N tokens and R rows; acc is [N, width].
template <typename T, int N, int R>
inline void add_scaled(
    const T* const* rows, const T* const* next, const float (*scale)[most_tokens], int64_t width,
    float* acc) {
  int64_t k = 0;
  for (; k + step <= width; k += step) {
    Lanes low[R], high[R];
    for (int r = 0; r < R; ++r) {
      prefetch(next[r], k);
      std::tie(low[r], high[r]) = load_pair(rows[r] + k);
    }
    for (int n = 0; n < N; ++n) {
      float* to = acc + n * width + k;
      Lanes a = Lanes::loadu(to), b = Lanes::loadu(to + lanes);
      for (int r = 0; r < R; ++r) {
        const Lanes by(scale[r][n]);
        a = at::vec::fmadd(low[r], by, a);
        b = at::vec::fmadd(high[r], by, b);
      }
      a.store(to);
      b.store(to + lanes);
    }
  }
  for (; k < width; ++k) {
    for (int n = 0; n < N; ++n) {
      for (int r = 0; r < R; ++r) acc[n * width + k] += scale[r][n] * static_cast<float>(rows[r][k]);
    }
  }
}

}  // namespace popc
