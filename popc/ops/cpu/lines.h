// Products with listed lines of a weight, over ATen's threads.
//
// A weight is read by whichever of its dims lies in memory value by value:
// - by output channel, a dot product for each listed row ("rows" lists save bytes);
// - by input channel, a sum of scaled rows of the transposed weight ("columns" lists save bytes).
// A list along the other dim is honoured, but saves nothing.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "tiles.h"

namespace popc {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// A thread's least share, in bytes: of the weight, and of sums, which are still in a cache.
constexpr int64_t grain_bytes = 1 << 15, grain_cached = 1 << 17;

// A list of channels, checked; all of `size` channels where there is none.
struct List {
  const int64_t* at = nullptr;
  int64_t count = 0;
  bool given = false;

  List(const int64_t* listed, int64_t n, int64_t size, const char* name)
      : at(listed), count(n), given(true) {
    check_channels(listed, n, size, name);
  }
  explicit List(int64_t size) : count(size) {}

  int64_t operator[](int64_t i) const { return given ? at[i] : i; }
  bool all() const { return !given; }
};

// `rows` with each channel once, in `kept` if that is not what they are: threads share rows, and no
// two of them may write to one output.
inline List without_repeats(const List& rows, int64_t size, std::vector<int64_t>& kept) {
  if (rows.all()) return rows;
  std::vector<uint8_t> seen(size);
  bool repeats = false;
  for (int64_t i = 0; i < rows.count; ++i) repeats |= std::exchange(seen[rows[i]], 1);
  if (!repeats) return rows;
  for (int64_t i = 0; i < rows.count; ++i) {
    if (std::exchange(seen[rows[i]], 0)) kept.push_back(rows[i]);
  }
  return List(kept.data(), kept.size(), size, "rows");
}

// One weight as it lies in memory: `lines` lines of `width` values each.
template <typename T>
struct Lines {
  const T* data;
  int64_t stride;
  int64_t width;
  bool by_output;  // a line is an output channel

  const T* line(int64_t i) const { return data + i * stride; }
};

template <typename F>
void by_tokens(int64_t tokens, F&& run) {
  switch (tokens) {
    case 1: return run(std::integral_constant<int, 1>());
    case 2: return run(std::integral_constant<int, 2>());
    case 3: return run(std::integral_constant<int, 3>());
    case 4: return run(std::integral_constant<int, 4>());
    case 5: return run(std::integral_constant<int, 5>());
    case 6: return run(std::integral_constant<int, 6>());
    case 7: return run(std::integral_constant<int, 7>());
    default: return run(std::integral_constant<int, 8>());
  }
}

inline int64_t threads_for(int64_t lines, int64_t line_bytes) {
  if (at::in_parallel_region()) return 1;
  const int64_t most = lines * line_bytes / grain_bytes;
  return std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), most));
}

// Tokens [count, width] in each way that dot products read them.
template <typename T>
struct Tokens {
  const T* stored;
  int64_t count;
  std::vector<float> wide;      // as widen() makes them
  std::vector<uint32_t> pairs;  // as paired() does; none where tiles do not serve

  Tokens(const T* x, int64_t tokens, int64_t width)
      : stored(x), count(tokens), wide(tokens * width) {
    for (int64_t n = 0; n < count; ++n) widen(x + n * width, wide.data() + n * width, width);
    if constexpr (is_tiled<T>) {
      if (count >= least_dotted_tiled && has_tiles()) pairs = paired(x, count, width);
    }
  }
};

// Dot products with lines `rows[first:last]`, R of them side by side; the first not done.
template <typename T, int N, int R>
int64_t dot_lines(
    const Tokens<T>& x, const Lines<T>& weight, const List& rows, int64_t first, int64_t last,
    const T* bias, T* y, int64_t outputs) {
  float out[R][N];
  const T* lines[R];
  const T* next[R];
  int64_t i = first;
  for (; i + R <= last; i += R) {
    for (int r = 0; r < R; ++r) {
      lines[r] = weight.line(rows[i + r]);
      next[r] = i + R + r < last ? weight.line(rows[i + R + r]) : lines[r];
    }
    if constexpr (is_tiled<T> && R == rows_dotted_tiled) {
      dot_tiles<N>(x.wide.data(), x.pairs.data(), weight.width, lines, next, out);
    } else {
      const Next<T> after{next, weight.width};
      dot<T, N, R>(x.wide.data(), x.stored, weight.width, lines, after, out);
    }
    for (int r = 0; r < R; ++r) {
      const int64_t row = rows[i + r];
      const float plus = bias ? static_cast<float>(bias[row]) : 0.0f;
      for (int n = 0; n < N; ++n) y[n * outputs + row] = static_cast<T>(out[r][n] + plus);
    }
  }
  return i;
}

// y[n, rows] = x[n] · W[rows] + bias, for up to most_tokens tokens; y holds zeros elsewhere.
template <typename T>
void dots(
    const Tokens<T>& x, const Lines<T>& weight, const List& rows, const T* bias, T* y,
    int64_t outputs) {
  const int64_t threads = threads_for(rows.count, weight.width * sizeof(T));
  by_tokens(x.count, [&](auto count) {
    constexpr int N = decltype(count)::value;
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      const int64_t last = rows.count * end / threads;
      int64_t i = rows.count * begin / threads;
      if constexpr (is_tiled<T> && N >= least_dotted_tiled) {
        if (!x.pairs.empty()) {
          i = dot_lines<T, N, rows_dotted_tiled>(x, weight, rows, i, last, bias, y, outputs);
        }
      }
      i = dot_lines<T, N, rows_at_once<N>>(x, weight, rows, i, last, bias, y, outputs);
      dot_lines<T, N, 1>(x, weight, rows, i, last, bias, y, outputs);
    });
  });
}

// Sums of scaled lines `columns[first:last]` into acc [tokens, width], R of them side by side; the
// first not done.
template <typename T, int N, int R>
int64_t add_lines(
    const T* x, int64_t inputs, const Lines<T>& weight, const List& columns, int64_t first,
    int64_t last, float* acc) {
  float scale[R][most_tokens];
  const T* rows[R];
  const T* next[R];
  int64_t i = first;
  for (; i + R <= last; i += R) {
    for (int r = 0; r < R; ++r) {
      const int64_t column = columns[i + r];
      rows[r] = weight.line(column);
      next[r] = weight.line(i + R + r < last ? columns[i + R + r] : column);
      for (int n = 0; n < N; ++n) scale[r][n] = static_cast<float>(x[n * inputs + column]);
    }
    if constexpr (is_tiled<T> && R == rows_added_tiled) {
      add_tiles<N>(rows, next, scale, weight.width, acc);
    } else {
      add_scaled<T, N, R>(rows, Next<T>{next, weight.width}, scale, weight.width, acc);
    }
  }
  return i;
}

inline void add(const float* __restrict from, int64_t n, float* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

// y = total + bias + base, where total is in the order of load_pair.
template <typename T>
void write(const float* total, int64_t width, const T* bias, const float* base, T* y) {
  int64_t i = 0;
  for (; i + step <= width; i += step) {
    float plain[step];
    for (int64_t j = 0; j < step; ++j) {
      plain[j] = total[i + (dealt<T> ? j / 2 + j % 2 * lanes : j)];
    }
    auto [low, high] = load_plain(plain);
    const auto add = [&](const auto* from) {
      const auto [first, second] = load_plain(from + i);
      low = low + first;
      high = high + second;
    };
    if (bias) add(bias);
    if (base) add(base);
    store_plain(low, high, y + i);
  }
  for (; i < width; ++i) {
    float value = total[i];
    if (bias) value += static_cast<float>(bias[i]);
    if (base) value += base[i];
    y[i] = static_cast<T>(value);
  }
}

// What a sum over one weight needs, and where it goes: y[n] = Σ_c x[n, c] · Wᵀ[c] + bias + base(n).
template <typename T, typename F>
struct Sum {
  Lines<T> weight;
  const T* bias;
  F base;
  T* y;
};

// All of `wanted` over the listed columns c, in one go; each thread sums its own columns.
template <typename T, typename F>
void sums(
    const T* x, int64_t inputs, int64_t tokens, const List& columns,
    const std::vector<Sum<T, F>>& wanted) {
  int64_t size = 0;
  for (const auto& sum : wanted) size += tokens * sum.weight.width;
  const int64_t threads = threads_for(columns.count, size / tokens * sizeof(T));
  const std::unique_ptr<float[]> acc(new float[threads * size]);
  by_tokens(tokens, [&](auto count) {
    constexpr int N = decltype(count)::value;
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first = columns.count * t / threads;
        const int64_t last = columns.count * (t + 1) / threads;
        float* to = acc.get() + t * size;
        std::fill_n(to, size, 0.0f);
        for (const auto& sum : wanted) {
          int64_t i = first;
          if constexpr (is_tiled<T> && N >= least_added_tiled) {
            if (has_tiles()) {
              i = add_lines<T, N, rows_added_tiled>(x, inputs, sum.weight, columns, i, last, to);
            }
          }
          i = add_lines<T, N, rows_added<N>>(x, inputs, sum.weight, columns, i, last, to);
          add_lines<T, N, 1>(x, inputs, sum.weight, columns, i, last, to);
          to += N * sum.weight.width;
        }
      }
    });
  });
  const int64_t rows = tokens * wanted.size();  // of y, one linear's after the other's
  const int64_t grain = 1 + rows * grain_cached / (threads * size * sizeof(float));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    float* from = acc.get();
    int64_t row = 0;
    for (const auto& sum : wanted) {
      const int64_t width = sum.weight.width;
      for (int64_t n = 0; n < tokens; ++n, ++row, from += width) {
        if (row < begin || row >= end) continue;
        for (int64_t t = 1; t < threads; ++t) add(from + t * size, width, from);
        write(from, width, sum.bias, sum.base(n), sum.y + n * width);
      }
    }
  });
}

// y[n] = Σ_c x[n, c] · Wᵀ[c] + bias over the listed columns c.
template <typename T>
void sums(
    const T* x, int64_t inputs, int64_t tokens, const Lines<T>& weight, const List& columns,
    const T* bias, T* y) {
  const auto none = [](int64_t) -> const float* { return nullptr; };
  sums(x, inputs, tokens, columns, std::vector<Sum<T, decltype(none)>>{{weight, bias, none, y}});
}

// Up to most_tokens tokens that share one weight and one pair of lists.
template <typename T>
void block(
    const T* x, int64_t tokens, int64_t inputs, int64_t outputs, const Lines<T>& weight,
    const List& rows, const List& columns, const T* bias, T* y) {
  std::vector<T> kept;
  const T* stored = x;
  if (weight.by_output && !columns.all()) {
    kept.assign(tokens * inputs, T(0));
    for (int64_t n = 0; n < tokens; ++n) {
      for (int64_t i = 0; i < columns.count; ++i) {
        kept[n * inputs + columns[i]] += x[n * inputs + columns[i]];
      }
    }
    stored = kept.data();
  }
  if (weight.by_output) {
    if (!rows.all()) std::fill_n(y, tokens * outputs, T(0));
    std::vector<int64_t> some;
    const List once = without_repeats(rows, outputs, some);
    return dots(Tokens<T>(stored, tokens, inputs), weight, once, bias, y, outputs);
  }
  if (rows.all()) return sums(x, inputs, tokens, weight, columns, bias, y);
  std::vector<T> whole(tokens * outputs);
  sums(x, inputs, tokens, weight, columns, bias, whole.data());
  std::fill_n(y, tokens * outputs, T(0));
  for (int64_t n = 0; n < tokens; ++n) {
    for (int64_t i = 0; i < rows.count; ++i) {
      y[n * outputs + rows[i]] = whole[n * outputs + rows[i]];
    }
  }
}

// The sizes of x with `outputs` in the last place.
inline std::vector<int64_t> output_sizes(const Tensor& x, int64_t outputs) {
  auto sizes = x.sizes().vec();
  sizes.back() = outputs;
  return sizes;
}

template <typename T>
Lines<T> lines_of(const Tensor& weight, int64_t out_dim) {
  const int64_t in_dim = 1 - out_dim;
  // A single input or output has any stride.
  const bool by_output = weight.stride(in_dim) == 1 || weight.size(in_dim) == 1;
  const int64_t across = by_output ? out_dim : in_dim;
  return {weight.const_data_ptr<T>(), weight.stride(across), weight.size(1 - across), by_output};
}

inline bool lies_in_lines(const Tensor& weight) {
  const int64_t rank = weight.dim();
  for (int64_t d : {rank - 1, rank - 2}) {
    if (weight.stride(d) == 1 || weight.size(d) == 1) return true;
  }
  return false;
}

inline bool is_served(const Tensor& x, const Tensor& weight) {
  const auto type = x.scalar_type();
  return weight.device().is_cpu() && lies_in_lines(weight) && weight.scalar_type() == type &&
      is_served_type(type);
}

}  // namespace popc
