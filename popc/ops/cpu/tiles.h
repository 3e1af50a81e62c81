// What kernels.h does, for several tokens in bfloat16 by AMX, whose tiles hold 16 rows of 64 bytes.
// With vectors the products of eight tokens take longer than their weights take to be read; with
// tiles they do not.
#pragma once

#include <ATen/cpu/Utils.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace popc {

// Whether the system lets this process use them.
inline bool has_tiles() {
  static const bool allowed = at::cpu::init_amx();
  return allowed;
}

// How many rows a tile takes, and for how many tokens that is faster than vectors.
constexpr int rows_dotted_tiled = 16, rows_added_tiled = 32;
constexpr int least_dotted_tiled = 4, least_added_tiled = 5;

#if defined(__AMX_BF16__) && defined(CPU_CAPABILITY_AVX512)
template <typename T>
constexpr bool is_tiled = std::is_same_v<T, at::BFloat16>;

// To GCC a load of a tile is one of an address, not of what was stored there: it must be told.
inline void await_stores() { __asm__ volatile("" ::: "memory"); }

// The sizes of tiles, of this thread and for as long as this lives.
class Tiles {
 public:
  struct Size {
    int rows, bytes;  // in each row
  };
  explicit Tiles(std::initializer_list<Size> sizes) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    int tile = 0;
    for (const Size& size : sizes) {
      config.rows[tile] = size.rows;
      config.bytes[tile++] = size.bytes;
    }
    await_stores();
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

// Asks for what lies a little further on in `rows` than at k, and after their ends for `next`.
template <int R>
class Ahead {
 public:
  Ahead(const at::BFloat16* const* rows, const at::BFloat16* const* next, int64_t end)
      : rows_(rows), next_(next), end_(end) {}
  void at(int64_t k) {
    k += distance;
    from_ = k < end_ ? rows_ : next_;
    k_ = k < end_ ? k : std::min(k - end_, end_ - step);  // rows may be shorter than the distance
  }
  void prefetch(int r) const { __builtin_prefetch(from_[r] + k_); }

 private:
  static constexpr int64_t distance = 3 * step;
  const at::BFloat16* const* rows_;
  const at::BFloat16* const* next_;
  const at::BFloat16* const* from_ = nullptr;
  int64_t end_, k_ = 0;
};

// Tokens [count, width] as dot_tiles takes them, [width / 2, count]: neighbours as one number.
inline std::vector<uint32_t> paired(const at::BFloat16* x, int64_t count, int64_t width) {
  std::vector<uint32_t> pairs(width / 2 * count);
  for (int64_t n = 0; n < count; ++n) {
    for (int64_t p = 0; p < width / 2; ++p) {
      std::memcpy(&pairs[p * count + n], x + n * width + 2 * p, sizeof(uint32_t));
    }
  }
  return pairs;
}

// As dot() for 16 rows.
template <int N>
inline void dot_tiles(
    const float* x, const uint32_t* pairs, int64_t width, const at::BFloat16* const* rows,
    const at::BFloat16* const* next, float (*out)[N]) {
  constexpr int R = rows_dotted_tiled, size = N * sizeof(float);
  const Tiles tiles({{R, size}, {R, 64}, {step / 2, size}});
  alignas(64) __m512i part[R];
  const int64_t end = width - width % step;
  Ahead<R> ahead(rows, next, end);
  _tile_zero(0);
  for (int64_t k = 0; k < end; k += step) {
    ahead.at(k);
    for (int r = 0; r < R; ++r) {
      ahead.prefetch(r);
      part[r] = _mm512_loadu_si512(rows[r] + k);
    }
    await_stores();
    _tile_loadd(1, part, 64);
    _tile_loadd(2, pairs + k / 2 * N, size);
    _tile_dpbf16ps(0, 1, 2);
  }
  _tile_stored(0, out, size);
  await_stores();
  dot_rest<at::BFloat16, N, R>(x, end, width, rows, out);
}

// As add_scaled() for 32 rows.
template <int N>
inline void add_tiles(
    const at::BFloat16* const* rows, const at::BFloat16* const* next,
    const float (*scale)[most_tokens], int64_t width, float* acc) {
  constexpr int R = rows_added_tiled, pairs = R / 2;
  const Tiles tiles({{N, 64}, {N, 64}, {N, 64}, {pairs, 64}, {pairs, 64}});
  alignas(64) at::BFloat16 by[N][R];
  alignas(64) __m512i even[pairs], odd[pairs];
  for (int n = 0; n < N; ++n) {
    for (int r = 0; r < R; ++r) by[n][r] = scale[r][n];
  }
  await_stores();
  _tile_loadd(2, by, 64);
  const int64_t end = width - width % step;
  Ahead<R> ahead(rows, next, end);
  for (int64_t k = 0; k < end; k += step) {
    ahead.at(k);
    for (int p = 0; p < pairs; ++p) {
      ahead.prefetch(2 * p);
      ahead.prefetch(2 * p + 1);
      std::tie(even[p], odd[p]) = interleaved(rows[2 * p] + k, rows[2 * p + 1] + k);
    }
    await_stores();
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
  await_stores();
  add_rest<at::BFloat16, N, R>(rows, scale, end, width, acc);
}

#else
template <typename T>
constexpr bool is_tiled = false;  // what needs tiles is not compiled
#endif

}  // namespace popc
