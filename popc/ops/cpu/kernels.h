// What reads the weights: a dot product per row, and a sum of scaled rows. Both stream each row once
// for up to `most_tokens` tokens, in float32, by at::vec: AVX-512, AVX2, NEON or portable, as the
// flags of the build say.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/core/ScalarType.h>
#include <c10/macros/Macros.h>
#include <c10/util/Exception.h>
#include <c10/util/Unroll.h>

#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

namespace popc {

using Lanes = at::vec::Vectorized<float>;
constexpr int64_t lanes = Lanes::size();
constexpr int64_t step = 2 * lanes;  // values in a vector of 16-bit floats
constexpr int64_t most_tokens = 8;

// The types that the kernels are made for; others are left to the reference.
inline bool is_served_type(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

// run(T()) for the C++ type of a served one.
template <typename F>
void by_type(at::ScalarType type, F&& run) {
  if (type == at::kFloat) return run(float());
  if (type == at::kBFloat16) return run(at::BFloat16());
  return run(at::Half());
}

inline void check_channels(const int64_t* listed, int64_t n, int64_t size, const char* name) {
  for (int64_t i = 0; i < n; ++i) {
    TORCH_CHECK_INDEX(
        listed[i] >= 0 && listed[i] < size, "popc: ", name, " lists channel ", listed[i], " of ",
        size);
  }
}

// Whether a pair holds the even values and the odd ones, not the first and the last: for bfloat16 a
// shift and a mask then make float32 of them, without a shuffle.
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
template <typename T>
constexpr bool dealt = std::is_same_v<T, at::BFloat16>;
#else
template <typename T>
constexpr bool dealt = false;
#endif

// `step` values as float32.
template <typename T>
inline std::tuple<Lanes, Lanes> load_plain(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return {Lanes::loadu(from), Lanes::loadu(from + lanes)};
  } else {
    return at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from));
  }
}

template <typename T>
inline void store_plain(const Lanes& low, const Lanes& high, T* to) {
  if constexpr (std::is_same_v<T, float>) {
    low.store(to);
    high.store(to + lanes);
  } else {
    at::vec::convert_from_float<T>(low, high).store(to);
  }
}

// The same in the order of dealt<T>, the same for all that is read so.
template <typename T>
inline std::tuple<Lanes, Lanes> load_pair(const T* from) {
  if constexpr (!dealt<T>) {
    return load_plain(from);
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    const __m512i both = _mm512_loadu_si512(from);
    const __m512i odd = _mm512_and_si512(both, _mm512_set1_epi32(0xffff0000));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), _mm512_castsi512_ps(odd)};
#elif defined(CPU_CAPABILITY_AVX2)
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i odd = _mm256_and_si256(both, _mm256_set1_epi32(0xffff0000));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)), _mm256_castsi256_ps(odd)};
#endif
  }
}

// n values as float32, whole steps of them in the order of load_pair.
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

// f(0), ..., f(N - 1), unrolled: sums that a loop indexes would live in memory.
template <int N, typename F>
inline void each(const F& f) {
  c10::ForcedUnroll<N>{}(f);
}

inline float sum(const Lanes& values) {
  return at::vec::vec_reduce_all<float>(
      [](Lanes a, Lanes b) { return a + b; }, values);
}

// A row's successor in the list is anywhere in memory: `step` values of it are asked for while as
// many of this row are read. They come into the second cache, which has more requests under way than
// the first; past both (as if not needed again) a core has half the bandwidth.
template <typename T>
C10_ALWAYS_INLINE void prefetch(const T* next, int64_t at) {
#if defined(__GNUC__) || defined(__clang__)
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < step; i += line) __builtin_prefetch(next + at + i, 0, 2);
#endif
}

// Rows that are read next, of `size` values: fewer, it may be, than those that are read now.
template <typename T>
struct Next {
  const T* const* rows;
  int64_t size;

  // Asks for a step of R of them, unless it were past their ends. Always inline: to GCC a function
  // that does nothing else has no effect, and a call of it may be left out.
  template <int R>
  C10_ALWAYS_INLINE void prefetch(int64_t at) const {
    if (at + step > size) return;
    for (int r = 0; r < R; ++r) popc::prefetch(rows[r], at);
  }
};

// How many rows to read side by side for N tokens: as many sums as the registers hold, for several
// streams of memory at once, and as each load of x then serves them all.
template <int N>
constexpr int rows_at_once = lanes == 16 ? (N <= 4 ? 4 : 3) : N <= 2 ? 4 : N <= 4 ? 2 : 1;

#if defined(__AVX512BF16__) && defined(__AVX512F__)
// Both operands as they are stored: 32 products an instruction.
template <int N, int R>
inline int64_t dot_bf16(
    const at::BFloat16* x, int64_t width, const at::BFloat16* const* rows,
    Next<at::BFloat16> next, float (*out)[N]) {
  __m512 acc[R][N];
  each<R>([&](auto r) { each<N>([&](auto n) { acc[r][n] = _mm512_setzero_ps(); }); });
  int64_t k = 0;
  for (; k + 32 <= width; k += 32) {
    next.template prefetch<R>(k);
    each<R>([&](auto r) {
      const __m512bh w = (__m512bh)_mm512_loadu_si512(rows[r] + k);
      each<N>([&](auto n) {
        const __m512bh token = (__m512bh)_mm512_loadu_si512(x + n * width + k);
        acc[r][n] = _mm512_dpbf16_ps(acc[r][n], token, w);
      });
    });
  }
  each<R>([&](auto r) { each<N>([&](auto n) { out[r][n] = _mm512_reduce_add_ps(acc[r][n]); }); });
  return k;
}
#endif

// out[r][n] += x[n, k:] · rows[r, k:], of less than a step.
template <typename T, int N, int R>
inline void dot_rest(
    const float* x, int64_t k, int64_t width, const T* const* rows, float (*out)[N]) {
  for (; k < width; ++k) {
    for (int r = 0; r < R; ++r) {
      const float value = static_cast<float>(rows[r][k]);
      for (int n = 0; n < N; ++n) out[r][n] += value * x[n * width + k];
    }
  }
}

// out[r][n] = x[n] · rows[r]; x is [N, width] as widen() makes it of `stored`.
template <typename T, int N, int R>
inline void dot(
    const float* x, const T* stored, int64_t width, const T* const* rows, Next<T> next,
    float (*out)[N]) {
  int64_t k = 0;
  bool done = false;
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    k = dot_bf16<N, R>(stored, width, rows, next, out);
    done = true;
  }
#endif
  if (!done) {
    constexpr int halves = N * R <= 4 ? 2 : 1;  // few sums alone would wait for each other
    Lanes acc[R][N][halves];
    each<R>([&](auto r) {
      each<N>([&](auto n) { each<halves>([&](auto h) { acc[r][n][h] = Lanes(0.0f); }); });
    });
    for (; k + step <= width; k += step) {
      next.template prefetch<R>(k);
      each<R>([&](auto r) {
        const auto pair = load_pair(rows[r] + k);
        each<N>([&](auto n) {
          const float* token = x + n * width + k;
          Lanes& low = acc[r][n][0];
          Lanes& high = acc[r][n][halves - 1];
          low = at::vec::fmadd(std::get<0>(pair), Lanes::loadu(token), low);
          high = at::vec::fmadd(std::get<1>(pair), Lanes::loadu(token + lanes), high);
        });
      });
    }
    each<R>([&](auto r) {
      each<N>([&](auto n) {
        out[r][n] = sum(halves == 2 ? acc[r][n][0] + acc[r][n][halves - 1] : acc[r][n][0]);
      });
    });
  }
  dot_rest<T, N, R>(x, k, width, rows, out);
}

// How many rows to add up for N tokens at a time: the sums of many tokens outgrow the first cache,
// and are read and written once for all these rows. With fewer registers than AVX-512's, four.
template <int N>
constexpr int rows_added = N >= 4 && lanes == 16 ? 8 : 4;

// Whether to multiply bfloat16 by pairs of rows. Cores that have AMX multiply float32 as fast, and
// pairs must be interleaved first.
#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512) && !defined(__AMX_TILE__)
#define POPC_ADDS_PAIRS
#endif

#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
// A step of two rows with every value beside its like of the other row: the even ones, the odd ones.
inline std::pair<__m512i, __m512i> interleaved(const at::BFloat16* one, const at::BFloat16* two) {
  const __m512i a = _mm512_loadu_si512(one), b = _mm512_loadu_si512(two);
  const __m512i odds = _mm512_set1_epi32(0xffff0000);
  return {
      _mm512_mask_mov_epi16(a, 0xaaaaaaaa, _mm512_slli_epi32(b, 16)),
      _mm512_or_si512(_mm512_srli_epi32(a, 16), _mm512_and_si512(b, odds))};
}
#endif

#ifdef POPC_ADDS_PAIRS
// Rows two by two, and their scales as bfloat16, which they are: 32 products an instruction.
template <int N, int R>
inline int64_t add_scaled_bf16(
    const at::BFloat16* const* rows, Next<at::BFloat16> next,
    const float (*scale)[most_tokens], int64_t width, float* acc) {
  static_assert(R % 2 == 0);
  constexpr int pairs = R / 2;
  uint32_t by[N][pairs];
  for (int n = 0; n < N; ++n) {
    for (int p = 0; p < pairs; ++p) {
      const uint32_t first = at::BFloat16(scale[2 * p][n]).x;
      const uint32_t second = at::BFloat16(scale[2 * p + 1][n]).x;
      by[n][p] = second << 16 | first;
    }
  }
  int64_t k = 0;
  for (; k + step <= width; k += step) {
    __m512bh even[pairs], odd[pairs];
    next.template prefetch<R>(k);
    each<pairs>([&](auto p) {
      const auto both = interleaved(rows[2 * p] + k, rows[2 * p + 1] + k);
      even[p] = (__m512bh)both.first;
      odd[p] = (__m512bh)both.second;
    });
    each<N>([&](auto n) {
      float* to = acc + n * width + k;
      __m512 low = _mm512_loadu_ps(to), high = _mm512_loadu_ps(to + lanes);
      each<pairs>([&](auto p) {
        const __m512bh both = (__m512bh)_mm512_set1_epi32(static_cast<int>(by[n][p]));
        low = _mm512_dpbf16_ps(low, even[p], both);
        high = _mm512_dpbf16_ps(high, odd[p], both);
      });
      _mm512_storeu_ps(to, low);
      _mm512_storeu_ps(to + lanes, high);
    });
  }
  return k;
}
#endif

// acc[n, k:] += Σ_r scale[r][n] · rows[r, k:], of less than a step.
template <typename T, int N, int R>
inline void add_rest(
    const T* const* rows, const float (*scale)[most_tokens], int64_t k, int64_t width,
    float* acc) {
  for (; k < width; ++k) {
    for (int n = 0; n < N; ++n) {
      for (int r = 0; r < R; ++r) acc[n * width + k] += scale[r][n] * static_cast<float>(rows[r][k]);
    }
  }
}

// acc[n] += Σ_r scale[r][n] · rows[r], for N tokens and R rows; acc is [N, width], in the order of
// load_pair.
template <typename T, int N, int R>
inline void add_scaled(
    const T* const* rows, Next<T> next, const float (*scale)[most_tokens], int64_t width,
    float* acc) {
  int64_t k = 0;
#ifdef POPC_ADDS_PAIRS
  if constexpr (std::is_same_v<T, at::BFloat16> && R % 2 == 0) {
    k = add_scaled_bf16<N, R>(rows, next, scale, width, acc);
  }
#endif
  for (; k + step <= width; k += step) {
    Lanes low[R], high[R];
    next.template prefetch<R>(k);
    each<R>([&](auto r) {
      std::tie(low[r], high[r]) = load_pair(rows[r] + k);
    });
    each<N>([&](auto n) {
      float* to = acc + n * width + k;
      Lanes a = Lanes::loadu(to), b = Lanes::loadu(to + lanes);
      each<R>([&](auto r) {
        const Lanes by(scale[r][n]);
        a = at::vec::fmadd(low[r], by, a);
        b = at::vec::fmadd(high[r], by, b);
      });
      a.store(to);
      b.store(to + lanes);
    });
  }
  add_rest<T, N, R>(rows, scale, k, width, acc);
}

}  // namespace popc
