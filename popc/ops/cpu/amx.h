// AMX versions of row_kernels.h, for several tokens in bfloat16. A tile is up to 16 rows of 64
// bytes. With vectors, the products of eight tokens take longer than reading the weights; with
// tiles they do not.
#pragma once

#include <ATen/cpu/Utils.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <tuple>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "row_kernels.h"
#include "vec.h"

namespace popc {

// Whether the CPU has AMX and the operating system lets this process use it.
inline bool has_amx() {
  static const bool allowed = at::cpu::init_amx();
  return allowed;
}

// Rows per call, and the number of tokens from which AMX is faster than vectors.
constexpr int amx_dot_row_block = 16, amx_axpy_row_block = 32;
constexpr int amx_dot_min_tokens = 4, amx_axpy_min_tokens = 5;

#if defined(__AMX_BF16__) && defined(CPU_CAPABILITY_AVX512)
template <typename T>
constexpr bool uses_amx = std::is_same_v<T, at::BFloat16>;

// To GCC a tile load takes an address, not the memory there, so it may move stores past it.
inline void compiler_barrier() { __asm__ volatile("" ::: "memory"); }

// Configures this thread's tiles, until it is destroyed.
class TileConfig {
 public:
  struct Shape {
    int rows, row_bytes;
  };
  explicit TileConfig(std::initializer_list<Shape> shapes) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    int tile = 0;
    for (const Shape& shape : shapes) {
      config.rows[tile] = shape.rows;
      config.row_bytes[tile++] = shape.row_bytes;
    }
    compiler_barrier();
    _tile_loadconfig(&config);
  }
  ~TileConfig() { _tile_release(); }
  TileConfig(const TileConfig&) = delete;
};

// Prefetches R rows a fixed distance ahead; past their ends, the rows that are read next.
template <int R>
class RowPrefetcher {
 public:
  RowPrefetcher(const at::BFloat16* const* rows, const at::BFloat16* const* next, int64_t end)
      : rows_(rows), next_(next), end_(end) {}
  void seek(int64_t k) {
    k += distance;
    from_ = k < end_ ? rows_ : next_;
    k_ = k < end_ ? k : std::min(k - end_, end_ - pair_lanes);  // rows may be shorter than distance
  }
  void prefetch(int r) const { __builtin_prefetch(from_[r] + k_); }

 private:
  static constexpr int64_t distance = 3 * pair_lanes;
  const at::BFloat16* const* rows_;
  const at::BFloat16* const* next_;
  const at::BFloat16* const* from_ = nullptr;
  int64_t end_, k_ = 0;
};

// x [count, width] as dot_rows_amx() takes it, [width / 2, count]: values 2p and 2p + 1 as a word.
inline std::vector<uint32_t> pack_token_pairs(
    const at::BFloat16* x, int64_t count, int64_t width) {
  std::vector<uint32_t> pairs(width / 2 * count);
  for (int64_t n = 0; n < count; ++n) {
    for (int64_t p = 0; p < width / 2; ++p) {
      std::memcpy(&pairs[p * count + n], x + n * width + 2 * p, sizeof(uint32_t));
    }
  }
  return pairs;
}

// As dot_rows(), for amx_dot_row_block rows; x is widened, for the tail, and packed in pairs.
template <int N>
inline void dot_rows_amx(
    const float* x, const uint32_t* pairs, int64_t width, const at::BFloat16* const* rows,
    const at::BFloat16* const* next, float (*out)[N]) {
  constexpr int R = amx_dot_row_block, token_bytes = N * sizeof(float);
  const TileConfig config({{R, token_bytes}, {R, 64}, {pair_lanes / 2, token_bytes}});
  alignas(64) __m512i block[R];
  const int64_t end = width - width % pair_lanes;
  RowPrefetcher<R> prefetcher(rows, next, end);
  _tile_zero(0);
  for (int64_t k = 0; k < end; k += pair_lanes) {
    prefetcher.seek(k);
    for (int r = 0; r < R; ++r) {
      prefetcher.prefetch(r);
      block[r] = _mm512_loadu_si512(rows[r] + k);
    }
    compiler_barrier();
    _tile_loadd(1, block, 64);
    _tile_loadd(2, pairs + k / 2 * N, token_bytes);
    _tile_dpbf16ps(0, 1, 2);
  }
  _tile_stored(0, out, token_bytes);
  compiler_barrier();
  dot_tail<at::BFloat16, N, R>(x, end, width, rows, out);
}

// As axpy_rows(), for amx_axpy_row_block rows.
template <int N>
inline void axpy_rows_amx(
    const at::BFloat16* const* rows, const at::BFloat16* const* next,
    const float (*scale)[max_tokens], int64_t width, float* acc) {
  constexpr int R = amx_axpy_row_block, pairs = R / 2;
  const TileConfig config({{N, 64}, {N, 64}, {N, 64}, {pairs, 64}, {pairs, 64}});
  alignas(64) at::BFloat16 token_scales[N][R];
  alignas(64) __m512i even[pairs], odd[pairs];
  for (int n = 0; n < N; ++n) {
    for (int r = 0; r < R; ++r) token_scales[n][r] = scale[r][n];
  }
  compiler_barrier();
  _tile_loadd(2, token_scales, 64);
  const int64_t end = width - width % pair_lanes;
  RowPrefetcher<R> prefetcher(rows, next, end);
  for (int64_t k = 0; k < end; k += pair_lanes) {
    prefetcher.seek(k);
    for (int p = 0; p < pairs; ++p) {
      prefetcher.prefetch(2 * p);
      prefetcher.prefetch(2 * p + 1);
      std::tie(even[p], odd[p]) = interleave_rows(rows[2 * p] + k, rows[2 * p + 1] + k);
    }
    compiler_barrier();
    float* to = acc + k;
    _tile_loadd(0, to, width * sizeof(float));
    _tile_loadd(1, to + lanes, width * sizeof(float));
    _tile_loadd(3, even, 64);
    _tile_loadd(4, odd, 64);
    _tile_dpbf16ps(0, 2, 3);
    _tile_dpbf16ps(1, 2, 4);
    _tile_stored(0, to, width * sizeof(float));
    _tile_stored(1, to + lanes, width * sizeof(float));
  }
  compiler_barrier();
  axpy_tail<at::BFloat16, N, R>(rows, scale, end, width, acc);
}

#else
template <typename T>
constexpr bool uses_amx = false;  // callers test it by if constexpr: no AMX code is compiled
#endif

}  // namespace popc
