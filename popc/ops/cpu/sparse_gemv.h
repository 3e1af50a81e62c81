// Sparse GEMV: products of a few tokens with the listed rows or columns of a weight, over ATen's
// threads.
//
// A weight is read along whichever of its dims is contiguous:
// - output-major, a dot product per output row (dot_gemv): a list of rows saves bytes;
// - input-major, scaled columns added up (axpy_gemv): a list of columns saves bytes.
// A list along the other dim is honoured, but saves nothing.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "amx.h"
#include "dispatch.h"
#include "index_list.h"
#include "row_kernels.h"
#include "vec.h"

namespace popc {

// A thread's least share, in bytes: of a weight, and of partial sums, which are still in a cache.
constexpr int64_t weight_grain_bytes = 1 << 15, sum_grain_bytes = 1 << 17;

inline int64_t threads_for(int64_t rows, int64_t row_bytes) {
  if (at::in_parallel_region()) return 1;
  const int64_t limit = rows * row_bytes / weight_grain_bytes;
  return std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), limit));
}

// A weight as contiguous rows in memory, of `width` values each: its output channels if
// output_major, else its input channels.
template <typename T>
struct WeightRows {
  const T* data;
  int64_t stride;
  int64_t width;
  bool output_major;

  const T* row(int64_t i) const { return data + i * stride; }
};

// Tokens [count, width] in each form that the dot kernels read.
template <typename T>
struct TokenBlock {
  const T* stored;
  int64_t count;
  std::vector<float> widened;   // by widen()
  std::vector<uint32_t> pairs;  // by pack_token_pairs(); empty where AMX is not used

  TokenBlock(const T* x, int64_t tokens, int64_t width)
      : stored(x), count(tokens), widened(tokens * width) {
    for (int64_t n = 0; n < count; ++n) widen(x + n * width, widened.data() + n * width, width);
    if constexpr (uses_amx<T>) {
      if (count >= amx_dot_min_tokens && has_amx()) pairs = pack_token_pairs(x, count, width);
    }
  }
};

// Dot products with `rows[first:last]` in blocks of R; returns the first index left over.
template <typename T, int N, int R>
int64_t dot_row_blocks(
    const TokenBlock<T>& x, const WeightRows<T>& weight, const IndexList& rows, int64_t first,
    int64_t last, const T* bias, T* y, int64_t outputs) {
  float out[R][N];
  const T* block[R];
  const T* next_block[R];
  int64_t i = first;
  for (; i + R <= last; i += R) {
    for (int r = 0; r < R; ++r) {
      block[r] = weight.row(rows[i + r]);
      next_block[r] = i + R + r < last ? weight.row(rows[i + R + r]) : block[r];
    }
    if constexpr (uses_amx<T> && R == amx_dot_row_block) {
      dot_rows_amx<N>(x.widened.data(), x.pairs.data(), weight.width, block, next_block, out);
    } else {
      const NextRows<T> next{next_block, weight.width};
      dot_rows<T, N, R>(x.widened.data(), x.stored, weight.width, block, next, out);
    }
    for (int r = 0; r < R; ++r) {
      const int64_t row = rows[i + r];
      const float offset = bias ? static_cast<float>(bias[row]) : 0.0f;
      for (int n = 0; n < N; ++n) y[n * outputs + row] = static_cast<T>(out[r][n] + offset);
    }
  }
  return i;
}

// y[n, rows] = x[n] · W[rows] + bias for up to max_tokens tokens. Writes nothing else of y.
template <typename T>
void dot_gemv(
    const TokenBlock<T>& x, const WeightRows<T>& weight, const IndexList& rows, const T* bias,
    T* y, int64_t outputs) {
  const int64_t threads = threads_for(rows.count, weight.width * sizeof(T));
  dispatch_tokens(x.count, [&](auto count) {
    constexpr int N = decltype(count)::value;
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      const int64_t last = rows.count * end / threads;
      int64_t i = rows.count * begin / threads;
      if constexpr (uses_amx<T> && N >= amx_dot_min_tokens) {
        if (!x.pairs.empty()) {
          i = dot_row_blocks<T, N, amx_dot_row_block>(x, weight, rows, i, last, bias, y, outputs);
        }
      }
      i = dot_row_blocks<T, N, dot_row_block<N>>(x, weight, rows, i, last, bias, y, outputs);
      dot_row_blocks<T, N, 1>(x, weight, rows, i, last, bias, y, outputs);
    });
  });
}

// Adds `columns[first:last]`, scaled, to acc [N, width] in blocks of R; returns the first index
// left over.
template <typename T, int N, int R>
int64_t axpy_row_blocks(
    const T* x, int64_t inputs, const WeightRows<T>& weight, const IndexList& columns,
    int64_t first, int64_t last, float* acc) {
  float scale[R][max_tokens];
  const T* block[R];
  const T* next_block[R];
  int64_t i = first;
  for (; i + R <= last; i += R) {
    for (int r = 0; r < R; ++r) {
      const int64_t column = columns[i + r];
      block[r] = weight.row(column);
      next_block[r] = weight.row(i + R + r < last ? columns[i + R + r] : column);
      for (int n = 0; n < N; ++n) scale[r][n] = static_cast<float>(x[n * inputs + column]);
    }
    if constexpr (uses_amx<T> && R == amx_axpy_row_block) {
      axpy_rows_amx<N>(block, next_block, scale, weight.width, acc);
    } else {
      axpy_rows<T, N, R>(block, NextRows<T>{next_block, weight.width}, scale, weight.width, acc);
    }
  }
  return i;
}

// y = acc + bias + base, where acc is in lane order.
template <typename T>
void write_output(const float* acc, int64_t width, const T* bias, const float* base, T* y) {
  int64_t i = 0;
  for (; i + pair_lanes <= width; i += pair_lanes) {
    float ordered[pair_lanes];
    for (int64_t j = 0; j < pair_lanes; ++j) {
      ordered[j] = acc[i + (is_deinterleaved<T> ? j / 2 + j % 2 * lanes : j)];
    }
    auto [low, high] = load_ordered_pair(ordered);
    const auto add = [&](const auto* from) {
      const auto [first, second] = load_ordered_pair(from + i);
      low = low + first;
      high = high + second;
    };
    if (bias) add(bias);
    if (base) add(base);
    store_ordered_pair(low, high, y + i);
  }
  for (; i < width; ++i) {
    float value = acc[i];
    if (bias) value += static_cast<float>(bias[i]);
    if (base) value += base[i];
    y[i] = static_cast<T>(value);
  }
}

// One weight of axpy_gemv() and its output: y[n] = Σ_c x[n, c] · W[:, c] + bias + base_of(n), where
// base_of(n) is a row in float32 or nullptr.
template <typename T, typename F>
struct AxpyOutput {
  WeightRows<T> weight;
  const T* bias;
  F base_of;
  T* y;
};

// All `outputs` over the listed columns c, in one pass; each thread accumulates its share of the
// columns, then the threads' sums are added up in a fixed order.
template <typename T, typename F>
void axpy_gemv(
    const T* x, int64_t inputs, int64_t tokens, const IndexList& columns,
    const std::vector<AxpyOutput<T, F>>& outputs) {
  int64_t size = 0;  // of all outputs
  for (const auto& output : outputs) size += tokens * output.weight.width;
  const int64_t threads = threads_for(columns.count, size / tokens * sizeof(T));
  const std::unique_ptr<float[]> acc(new float[threads * size]);
  dispatch_tokens(tokens, [&](auto count) {
    constexpr int N = decltype(count)::value;
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first = columns.count * t / threads;
        const int64_t last = columns.count * (t + 1) / threads;
        float* to = acc.get() + t * size;
        std::fill_n(to, size, 0.0f);
        for (const auto& output : outputs) {
          const auto& weight = output.weight;
          int64_t i = first;
          if constexpr (uses_amx<T> && N >= amx_axpy_min_tokens) {
            if (has_amx()) {
              i = axpy_row_blocks<T, N, amx_axpy_row_block>(
                  x, inputs, weight, columns, i, last, to);
            }
          }
          i = axpy_row_blocks<T, N, axpy_row_block<N>>(x, inputs, weight, columns, i, last, to);
          axpy_row_blocks<T, N, 1>(x, inputs, weight, columns, i, last, to);
          to += N * weight.width;
        }
      }
    });
  });
  const int64_t rows = tokens * outputs.size();  // of y, output by output
  const int64_t grain = 1 + rows * sum_grain_bytes / (threads * size * sizeof(float));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    float* from = acc.get();
    int64_t row = 0;
    for (const auto& output : outputs) {
      const int64_t width = output.weight.width;
      for (int64_t n = 0; n < tokens; ++n, ++row, from += width) {
        if (row < begin || row >= end) continue;
        for (int64_t t = 1; t < threads; ++t) add_into(from + t * size, width, from);
        write_output(from, width, output.bias, output.base_of(n), output.y + n * width);
      }
    }
  });
}

// y[n] = Σ_c x[n, c] · W[:, c] + bias over the listed columns c.
template <typename T>
void axpy_gemv(
    const T* x, int64_t inputs, int64_t tokens, const WeightRows<T>& weight,
    const IndexList& columns, const T* bias, T* y) {
  const auto no_base = [](int64_t) -> const float* { return nullptr; };
  axpy_gemv(
      x, inputs, tokens, columns,
      std::vector<AxpyOutput<T, decltype(no_base)>>{{weight, bias, no_base, y}});
}

// y = x Wᵀ + bias over the listed rows and columns, for up to max_tokens tokens; 0 in other rows.
template <typename T>
void sparse_gemv(
    const T* x, int64_t tokens, int64_t inputs, int64_t outputs, const WeightRows<T>& weight,
    const IndexList& rows, const IndexList& columns, const T* bias, T* y) {
  if (weight.output_major) {
    std::vector<T> masked;
    const T* from = x;
    if (!columns.is_all()) {
      masked.assign(tokens * inputs, T(0));
      for (int64_t n = 0; n < tokens; ++n) {
        for (int64_t i = 0; i < columns.count; ++i) {
          masked[n * inputs + columns[i]] += x[n * inputs + columns[i]];  // duplicates add up
        }
      }
      from = masked.data();
    }
    if (!rows.is_all()) std::fill_n(y, tokens * outputs, T(0));
    std::vector<int64_t> storage;
    const IndexList unique = without_duplicates(rows, outputs, storage);
    return dot_gemv(TokenBlock<T>(from, tokens, inputs), weight, unique, bias, y, outputs);
  }
  if (rows.is_all()) return axpy_gemv(x, inputs, tokens, weight, columns, bias, y);
  std::vector<T> all_rows(tokens * outputs);
  axpy_gemv(x, inputs, tokens, weight, columns, bias, all_rows.data());
  std::fill_n(y, tokens * outputs, T(0));
  for (int64_t n = 0; n < tokens; ++n) {
    for (int64_t i = 0; i < rows.count; ++i) {
      y[n * outputs + rows[i]] = all_rows[n * outputs + rows[i]];
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
WeightRows<T> weight_rows(const Tensor& weight, int64_t out_dim) {
  const int64_t in_dim = 1 - out_dim;
  // The stride of a dim of size 1 means nothing.
  const bool output_major = weight.stride(in_dim) == 1 || weight.size(in_dim) == 1;
  const int64_t row_dim = output_major ? out_dim : in_dim;
  return {
      weight.const_data_ptr<T>(), weight.stride(row_dim), weight.size(1 - row_dim), output_major};
}

inline bool has_contiguous_rows(const Tensor& weight) {
  const int64_t rank = weight.dim();
  for (int64_t d : {rank - 1, rank - 2}) {
    if (weight.stride(d) == 1 || weight.size(d) == 1) return true;
  }
  return false;
}

// Whether sparse_gemv() and axpy_gemv() take them; else the op's reference runs.
inline bool is_supported(const Tensor& x, const Tensor& weight) {
  const auto dtype = x.scalar_type();
  return weight.device().is_cpu() && has_contiguous_rows(weight) && weight.scalar_type() == dtype &&
      is_supported_dtype(dtype);
}

}  // namespace popc
