// Values of quantised rows, for GEMMs and for whatever no other kernel takes.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "constants.h"
#include "plane_rows.h"
#include "vec.h"

namespace popc {

// One row: its planes, of which the low one is read or not, and what its values are measured from.
struct RowView {
  const uint8_t* scales;
  const uint8_t* high;
  const uint8_t* low;  // nullptr where it is not read
  float multiplier;    // of a high nibble
  float zero;          // value = (multiplier · high + low - zero) · scale

  RowView(const PlaneRows& rows, int64_t row, bool read_low)
      : scales(rows.scales ? rows.scales + row * rows.stride : nullptr),
        high(rows.high + row * rows.stride),
        low(rows.has_low() && read_low ? rows.low + row * rows.stride : nullptr),
        multiplier(rows.has_low() ? 16.0f : 1.0f), zero(rows.zero()) {
    if (rows.has_low() && !read_low) zero -= static_cast<float>(constants::midpoint);
  }
};

// The 32 values of block b, before or after its scale.
template <bool scaled>
inline void expand_block(const RowView& row, int64_t b, float* to) {
  const float scale = scaled ? load_scale(row.scales + scale_bytes * b) : 1.0f;
  const float high_scale = row.multiplier * scale, offset = row.zero * scale;
  const uint8_t* high = row.high + plane_bytes * b;
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i shifts = _mm512_set_epi32(12, 12, 12, 12, 8, 8, 8, 8, 4, 4, 4, 4, 0, 0, 0, 0);
  const __m512i mask = _mm512_set1_epi32(15), half = _mm512_set1_epi32(16);
  const auto nibbles = [&](const uint8_t* plane, __m512i by) {
    const __m512i dwords =
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(plane)));
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srlv_epi32(dwords, by), mask));
  };
  for (int i = 0; i < 2; ++i) {
    const __m512i by = i == 0 ? shifts : _mm512_add_epi32(shifts, half);
    __m512 values = _mm512_fmsub_ps(
        nibbles(high, by), _mm512_set1_ps(high_scale), _mm512_set1_ps(offset));
    if (row.low) {
      const __m512 low = nibbles(row.low + plane_bytes * b, by);
      values = _mm512_fmadd_ps(low, _mm512_set1_ps(scale), values);
    }
    _mm512_storeu_ps(to + 16 * i, values);
  }
#else
  uint32_t dwords[2][block_dwords] = {};
  std::memcpy(dwords[0], high, plane_bytes);
  if (row.low) std::memcpy(dwords[1], row.low + plane_bytes * b, plane_bytes);
  for (int64_t j = 0; j < dword_nibbles; ++j) {
    for (int64_t i = 0; i < block_dwords; ++i) {
      const auto nibble = [&](int plane) {
        return static_cast<float>(static_cast<int32_t>(dwords[plane][i] >> (4 * j) & 15u));
      };
      const float value = nibble(0) * high_scale - offset;
      to[block_dwords * j + i] = value + nibble(1) * scale;
    }
  }
#endif
}

// n values of block b, in T.
template <typename T, bool scaled>
inline void expand_values(const RowView& row, int64_t b, int64_t n, T* to) {
  if constexpr (std::is_same_v<T, float>) {
    if (n == block_values) return expand_block<scaled>(row, b, to);
  }
  alignas(64) float values[block_values];
  expand_block<scaled>(row, b, values);
  if (n < block_values) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(values[i]);
    return;
  }
  for (int64_t i = 0; i < block_values; i += pair_lanes) {
    store_ordered_pair(Vec::loadu(values + i), Vec::loadu(values + i + lanes), to + i);
  }
}

// The values of blocks [first, last) of row r; `row_dim` says which dim of the weight has rows.
template <typename T>
void expand_row(
    const PlaneRows& rows, const ScaleGroups& groups, int64_t row_dim, int64_t r, int64_t first,
    int64_t last, bool read_low, T* to) {
  const RowView row(rows, r, read_low);
  for (int64_t b = first; b < last; ++b, to += block_values) {
    const int64_t start = b * block_values, n = std::min(block_values, rows.length - start);
    if (!groups.scale) {
      expand_values<T, true>(row, b, n, to);
      continue;
    }
    float values[block_values];
    expand_block<false>(row, b, values);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t input = row_dim == 1 ? r : start + i, output = row_dim == 1 ? start + i : r;
      const int64_t at = input / groups.inputs * groups.outputs + output;
      const float moved = groups.zero ? groups.zero[at] - rows.zero() : 0.0f;
      to[i] = static_cast<T>((values[i] - moved) * groups.scale[at]);
    }
  }
}

}  // namespace popc
