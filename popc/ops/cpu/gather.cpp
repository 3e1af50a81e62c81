// popc::gather_linear and popc::gather_experts on CPUs. See popc/ops/gather.py for what they mean.
//
// A weight is read by whichever of its dims lies in memory value by value:
// - by output channel, a dot product for each listed row ("rows" lists save bytes);
// - by input channel, a sum of scaled rows of the transposed weight ("columns" lists save bytes).
// A list along the other dim is honoured, but saves nothing. What fits neither is left to the
// reference, popc::gather_linear_reference.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "kernels.h"

namespace popc {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t grain_bytes = 1 << 15;  // a thread's least share of the weight

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

int64_t threads_for(int64_t lines, int64_t line_bytes) {
  if (at::in_parallel_region()) return 1;
  const int64_t most = lines * line_bytes / grain_bytes;
  return std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), most));
}

// Dot products with lines `rows[first:last]`, R of them side by side; the first not done.
template <typename T, int N, int R>
int64_t dot_lines(
    const float* x, const T* stored, const Lines<T>& weight, const List& rows, int64_t first,
    int64_t last, const T* bias, T* y, int64_t outputs) {
  float out[R][N];
  const T* lines[R];
  const T* next[R];
  int64_t i = first;
  for (; i + R <= last; i += R) {
    for (int r = 0; r < R; ++r) {
      lines[r] = weight.line(rows[i + r]);
      next[r] = i + R + r < last ? weight.line(rows[i + R + r]) : lines[r];
    }
    dot<T, N, R>(x, stored, weight.width, lines, next, out);
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
    const float* x, const T* stored, int64_t tokens, const Lines<T>& weight, const List& rows,
    const T* bias, T* y, int64_t outputs) {
  const int64_t threads = threads_for(rows.count, weight.width * sizeof(T));
  by_tokens(tokens, [&](auto count) {
    constexpr int N = decltype(count)::value;
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      const int64_t last = rows.count * end / threads;
      int64_t i = rows.count * begin / threads;
      i = dot_lines<T, N, rows_at_once<N>>(x, stored, weight, rows, i, last, bias, y, outputs);
      dot_lines<T, N, 1>(x, stored, weight, rows, i, last, bias, y, outputs);
    });
  });
}

// Sums of scaled lines `columns[first:last]` into acc [tokens, width].
template <typename T, int N>
void add_lines(
    const T* x, int64_t inputs, const Lines<T>& weight, const List& columns, int64_t first,
    int64_t last, float* acc) {
  constexpr int R = 4;
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
    add_scaled<T, N, R>(rows, next, scale, weight.width, acc);
  }
  for (; i < last; ++i) {
    rows[0] = next[0] = weight.line(columns[i]);
    for (int n = 0; n < N; ++n) {
      scale[0][n] = static_cast<float>(x[n * inputs + columns[i]]);
    }
    add_scaled<T, N, 1>(rows, next, scale, weight.width, acc);
  }
}

void add(const float* __restrict from, int64_t n, float* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

// y = total + bias + base, where total is in the order of load_pair.
template <typename T>
void write(
    const float* __restrict total, int64_t width, const T* __restrict bias,
    const float* __restrict base, T* __restrict y) {
  const auto put = [&](int64_t k, float value) {
    if (bias) value += static_cast<float>(bias[k]);
    if (base) value += base[k];
    y[k] = static_cast<T>(value);
  };
  int64_t i = 0;
  if constexpr (dealt<T>) {
    for (; i + step <= width; i += step) {
      for (int64_t j = 0; j < lanes; ++j) {
        put(i + 2 * j, total[i + j]);
        put(i + 2 * j + 1, total[i + lanes + j]);
      }
    }
  }
  for (; i < width; ++i) put(i, total[i]);
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
  std::vector<float> acc(threads * size, 0.0f);
  by_tokens(tokens, [&](auto count) {
    constexpr int N = decltype(count)::value;
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first = columns.count * t / threads;
        const int64_t last = columns.count * (t + 1) / threads;
        float* to = acc.data() + t * size;
        for (const auto& sum : wanted) {
          add_lines<T, N>(x, inputs, sum.weight, columns, first, last, to);
          to += N * sum.weight.width;
        }
      }
    });
  });
  float* from = acc.data();
  for (const auto& sum : wanted) {
    const int64_t width = sum.weight.width;
    for (int64_t n = 0; n < tokens; ++n, from += width) {
      for (int64_t t = 1; t < threads; ++t) add(from + t * size, width, from);
      write(from, width, sum.bias, sum.base(n), sum.y + n * width);
    }
  }
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
        kept[n * inputs + columns[i]] = x[n * inputs + columns[i]];
      }
    }
    stored = kept.data();
  }
  if (weight.by_output) {
    std::vector<float> wide(tokens * inputs);
    for (int64_t n = 0; n < tokens; ++n) {
      widen(stored + n * inputs, wide.data() + n * inputs, inputs);
    }
    if (!rows.all()) std::fill_n(y, tokens * outputs, T(0));
    return dots(wide.data(), stored, tokens, weight, rows, bias, y, outputs);
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

template <typename T>
Lines<T> lines_of(const Tensor& weight, int64_t out_dim) {
  const int64_t in_dim = 1 - out_dim;
  // A single input or output has any stride.
  const bool by_output = weight.stride(in_dim) == 1 || weight.size(in_dim) == 1;
  const int64_t across = by_output ? out_dim : in_dim;
  return {weight.const_data_ptr<T>(), weight.stride(across), weight.size(1 - across), by_output};
}

bool lies_in_lines(const Tensor& weight) {
  const int64_t rank = weight.dim();
  for (int64_t d : {rank - 1, rank - 2}) {
    if (weight.stride(d) == 1 || weight.size(d) == 1) return true;
  }
  return false;
}

bool is_served(const Tensor& x, const Tensor& weight) {
  const auto type = x.scalar_type();
  return weight.device().is_cpu() && lies_in_lines(weight) && weight.scalar_type() == type &&
      is_served_type(type);
}

void check_list(const MaybeTensor& list, const char* name) {
  if (list) {
    TORCH_CHECK_TYPE(
        list->scalar_type() == at::kLong, "popc: ", name, " must be int64, not ",
        list->scalar_type());
    TORCH_CHECK_VALUE(
        list->dim() == 1 || list->dim() == 2, "popc: ", name, " must be [n] or [B, n], not ",
        list->sizes());
  }
}

struct HeldList {
  Tensor held;  // undefined where no list is given
  const char* name;
  int64_t size;

  HeldList(const MaybeTensor& list, const char* list_name, int64_t channels)
      : name(list_name), size(channels) {
    check_list(list, list_name);
    if (list) held = list->contiguous();
  }
  bool given() const { return held.defined(); }
  bool per_item() const { return given() && held.dim() == 2; }
  List of(int64_t item) const {
    if (!given()) return List(size);
    const int64_t n = held.size(-1), at = per_item() ? item : 0;
    return List(held.const_data_ptr<int64_t>() + at * n, n, size, name);
  }
};

Tensor reference(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& rows,
    const MaybeTensor& columns, int64_t out_dim) {
  static auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("popc::gather_linear_reference", "")
          .typed<Tensor(
              const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&,
              const MaybeTensor&, int64_t)>();
  return op.call(x, weight, bias, rows, columns, out_dim);
}

// Whether ATen has a product of many tokens in this type that is better than one in float32.
bool is_native(at::ScalarType type) {
#if defined(__aarch64__)
  return true;
#elif defined(__AVX512BW__)
  return type == at::kBFloat16 || type == at::kFloat;
#else
  return type == at::kFloat;
#endif
}

// x Wᵀ of many tokens in float32, a piece of W at a time, so that little is held.
Tensor product_in_float(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  constexpr int64_t piece = 1024;
  const Tensor flat = x.reshape({-1, x.size(-1)}).to(at::kFloat);
  Tensor y = at::zeros({flat.size(0), weight.size(0)}, flat.options());
  for (int64_t c = 0; c < weight.size(1); c += piece) {
    const int64_t n = std::min(piece, weight.size(1) - c);
    y.addmm_(flat.narrow(1, c, n), weight.narrow(1, c, n).to(at::kFloat).t());
  }
  if (bias) y.add_(*bias);
  auto sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
  return y.to(x.scalar_type()).view(sizes);
}

// Many tokens with shared lists: what is listed is copied once, then it is a product as any other.
Tensor packed_product(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& rows,
    const MaybeTensor& columns) {
  const bool by_output = weight.stride(1) == 1;
  if (by_output && !rows && !columns) return at::linear(x, weight, bias);
  Tensor part = weight, given = x;
  MaybeTensor plus = bias;
  const auto pick = [&](int64_t dim, const Tensor& list) {
    part = by_output ? part.index_select(dim, list) : part.t().index_select(1 - dim, list).t();
  };
  if (rows) {
    pick(0, *rows);
    if (bias) plus = bias->index_select(0, *rows);
  }
  if (columns) {
    pick(1, *columns);
    given = x.index_select(-1, *columns);
  }
  const Tensor y = is_native(x.scalar_type()) ? at::linear(given, part, plus)
                                              : product_in_float(given, part, plus);
  if (!rows) return y;
  auto sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
  return at::zeros(sizes, x.options()).index_copy_(-1, *rows, y);
}

Tensor gather_linear(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& rows,
    const MaybeTensor& columns, int64_t out_dim) {
  TORCH_CHECK_VALUE(
      weight.dim() == 2 && x.dim() >= 1 && (out_dim == 0 || out_dim == 1),
      "popc::gather_linear takes x [..., K] and a weight of two dims, not ", x.sizes(), " and ",
      weight.sizes());
  const int64_t inputs = weight.size(1 - out_dim), outputs = weight.size(out_dim);
  TORCH_CHECK_VALUE(
      x.size(-1) == inputs, "popc::gather_linear: x has ", x.size(-1), " channels, the weight ",
      inputs);
  if (!is_served(x, weight) || x.numel() == 0 || weight.numel() == 0) {
    return reference(x, weight, bias, rows, columns, out_dim);
  }
  const int64_t tokens = x.numel() / inputs;
  const HeldList row_list(rows, "rows", outputs), column_list(columns, "columns", inputs);
  int64_t sequences = 1;
  for (const HeldList* list : {&row_list, &column_list}) {
    if (list->per_item()) sequences = list->held.size(0);
  }
  for (const HeldList* list : {&row_list, &column_list}) {
    TORCH_CHECK_VALUE(
        !list->per_item() || (list->held.size(0) == sequences && x.size(0) == sequences),
        "popc::gather_linear: a list for each of ", list->given() ? list->held.size(0) : 0,
        " sequences does not fit x ", x.sizes());
  }
  TORCH_CHECK_VALUE(
      !bias || (bias->scalar_type() == x.scalar_type() && bias->numel() == outputs),
      "popc::gather_linear: the bias does not fit the weight");
  const int64_t each = tokens / sequences;
  if (each > (is_native(x.scalar_type()) ? most_tokens : 4 * most_tokens)) {
    const Tensor turned = out_dim == 0 ? weight : weight.t();
    if (!row_list.per_item() && !column_list.per_item()) {
      return packed_product(x, turned, bias, rows, columns);
    }
    const auto of = [](const MaybeTensor& list, int64_t s) {
      return list && list->dim() == 2 ? MaybeTensor(list->select(0, s)) : list;
    };
    std::vector<Tensor> parts;
    for (int64_t s = 0; s < sequences; ++s) {
      parts.push_back(packed_product(x.select(0, s), turned, bias, of(rows, s), of(columns, s)));
    }
    return at::stack(parts);
  }
  const Tensor given = x.contiguous();
  auto sizes = x.sizes().vec();
  sizes.back() = outputs;
  Tensor y = at::empty(sizes, x.options());
  const Tensor held_bias = bias ? bias->contiguous() : Tensor();
  by_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Lines<T> lines = lines_of<T>(weight, out_dim);
    const T* plus = bias ? held_bias.const_data_ptr<T>() : nullptr;
    for (int64_t s = 0; s < sequences; ++s) {
      const List listed = row_list.of(s), chosen = column_list.of(s);
      for (int64_t t = 0; t < each; t += most_tokens) {
        const int64_t at = s * each + t;
        block<T>(
            given.const_data_ptr<T>() + at * inputs, std::min(most_tokens, each - t), inputs,
            outputs, lines, listed, chosen, plus, y.data_ptr<T>() + at * outputs);
      }
    }
  });
  return y;
}

Tensor gather_experts(
    const Tensor& x, const Tensor& weight, const Tensor& expert, const Tensor& full,
    const MaybeTensor& rows, const MaybeTensor& columns, int64_t out_dim) {
  TORCH_CHECK_VALUE(
      weight.dim() == 3 && x.dim() == 2 && (out_dim == 0 || out_dim == 1),
      "popc::gather_experts takes x [S, K] and a weight of three dims, not ", x.sizes(), " and ",
      weight.sizes());
  const int64_t count = weight.size(0), tokens = x.size(0);
  const int64_t inputs = weight.size(2 - out_dim), outputs = weight.size(1 + out_dim);
  TORCH_CHECK_VALUE(
      x.size(1) == inputs, "popc::gather_experts: x has ", x.size(1), " channels, the weight ",
      inputs);
  TORCH_CHECK_VALUE(
      expert.dim() == 1 && expert.size(0) == tokens && full.dim() == 1 && full.size(0) == count,
      "popc::gather_experts: expert must be [S] and full [E], not ", expert.sizes(), " and ",
      full.sizes());
  const Tensor owner = expert.to(at::kLong).contiguous(), whole = full.to(at::kBool).contiguous();
  const int64_t* owners = owner.const_data_ptr<int64_t>();
  for (int64_t s = 0; s < tokens; ++s) {
    TORCH_CHECK_INDEX(
        owners[s] >= 0 && owners[s] < count, "popc: row ", s, " is of expert ", owners[s], " of ",
        count);
  }
  const HeldList row_list(rows, "rows", outputs), column_list(columns, "columns", inputs);
  TORCH_CHECK_VALUE(
      !rows || (rows->dim() == 2 && rows->size(0) == count),
      "popc::gather_experts: rows must be [E, n]");
  TORCH_CHECK_VALUE(
      !columns || (columns->dim() == 2 && columns->size(0) == tokens),
      "popc::gather_experts: columns must be [S, n]");
  Tensor y = at::empty({tokens, outputs}, x.options());
  if (tokens == 0) return y;
  const bool* dense = whole.const_data_ptr<bool>();
  // Neighbours that meet the same weight with the same lists share a reading of it.
  const auto run_from = [&](int64_t s) {
    int64_t n = 1;
    const bool alone = column_list.given() && !dense[owners[s]];
    while (!alone && n < most_tokens && s + n < tokens && owners[s + n] == owners[s]) ++n;
    return n;
  };
  if (!is_served(x, weight) || weight.numel() == 0) {
    for (int64_t s = 0; s < tokens; ++s) {
      const int64_t e = owners[s];
      const bool all = dense[e];
      y.select(0, s).copy_(reference(
          x.select(0, s), weight.select(0, e), std::nullopt,
          rows && !all ? MaybeTensor(rows->select(0, e)) : std::nullopt,
          columns && !all ? MaybeTensor(columns->select(0, s)) : std::nullopt, out_dim));
    }
    return y;
  }
  const Tensor given = x.contiguous();
  by_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    for (int64_t s = 0, n = 0; s < tokens; s += n) {
      n = run_from(s);
      const int64_t e = owners[s];
      const Lines<T> lines = lines_of<T>(weight.select(0, e), out_dim);
      const List listed = dense[e] ? List(outputs) : row_list.of(e);
      const List chosen = dense[e] ? List(inputs) : column_list.of(s);
      block<T>(
          given.const_data_ptr<T>() + s * inputs, n, inputs, outputs, lines, listed, chosen,
          nullptr, y.data_ptr<T>() + s * outputs);
    }
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(popc, CPU, m) {
  m.impl("gather_linear", gather_linear);
  m.impl("gather_experts", gather_experts);
}

}  // namespace popc
