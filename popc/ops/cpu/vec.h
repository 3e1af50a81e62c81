// SIMD helpers on at::vec: AVX-512, AVX2, NEON or portable code, as the build's flags select.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/macros/Macros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Unroll.h>

#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

namespace popc {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t lanes = Vec::size();
constexpr int64_t pair_lanes = 2 * lanes;  // of a pair of Vec, and of one vector of 16-bit floats

// Whether load_pair() returns the even values and the odd ones, not the first half and the second:
// bfloat16 then becomes float32 by a shift and a mask, without a shuffle.
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
template <typename T>
constexpr bool is_deinterleaved = std::is_same_v<T, at::BFloat16>;
#else
template <typename T>
constexpr bool is_deinterleaved = false;
#endif

// `pair_lanes` values as float32, in memory order.
template <typename T>
inline std::tuple<Vec, Vec> load_ordered_pair(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return {Vec::loadu(from), Vec::loadu(from + lanes)};
  } else {
    return at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from));
  }
}

template <typename T>
inline void store_ordered_pair(const Vec& low, const Vec& high, T* to) {
  if constexpr (std::is_same_v<T, float>) {
    low.store(to);
    high.store(to + lanes);
  } else {
    at::vec::convert_from_float<T>(low, high).store(to);
  }
}

// `pair_lanes` values as float32 in lane order: even values first where is_deinterleaved<T>. Dot
// products and sums may use it, as all their operands are in the same order.
template <typename T>
inline std::tuple<Vec, Vec> load_pair(const T* from) {
  if constexpr (!is_deinterleaved<T>) {
    return load_ordered_pair(from);
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

// n values as float32, in lane order but for the tail.
template <typename T>
inline void widen(const T* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + pair_lanes <= n; i += pair_lanes) {
    const auto [low, high] = load_pair(from + i);
    low.store(to + i);
    high.store(to + i + lanes);
  }
  for (; i < n; ++i) to[i] = static_cast<float>(from[i]);
}

// f(0), ..., f(N - 1), unrolled, so that arrays of accumulators stay in registers.
template <int N, typename F>
C10_ALWAYS_INLINE void unroll(const F& f) {
  c10::ForcedUnroll<N>{}(f);
}

inline float reduce_add(const Vec& values) {
  return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, values);
}

inline void add_into(const float* __restrict from, int64_t n, float* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

// Prefetches `pair_lanes` values into L2, which has more requests in flight than L1; non-temporal
// prefetches, past both, halve a core's bandwidth.
template <typename T>
C10_ALWAYS_INLINE void prefetch(const T* from) {
#if defined(__GNUC__) || defined(__clang__)
  constexpr int64_t cache_line = 64 / sizeof(T);
  for (int64_t i = 0; i < pair_lanes; i += cache_line) __builtin_prefetch(from + i, 0, 2);
#endif
}

// The same for `size` bytes.
C10_ALWAYS_INLINE void prefetch_bytes(const uint8_t* from, int64_t size) {
#if defined(__GNUC__) || defined(__clang__)
  for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(from + i, 0, 2);
#endif
}

#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
// `pair_lanes` values of two rows as pairs (first[k], second[k]): those of even k, those of odd k.
inline std::pair<__m512i, __m512i> interleave_rows(
    const at::BFloat16* first, const at::BFloat16* second) {
  const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
  const __m512i high_halves = _mm512_set1_epi32(0xffff0000);
  return {
      _mm512_mask_mov_epi16(a, 0xaaaaaaaa, _mm512_slli_epi32(b, 16)),
      _mm512_or_si512(_mm512_srli_epi32(a, 16), _mm512_and_si512(b, high_halves))};
}
#endif

}  // namespace popc
