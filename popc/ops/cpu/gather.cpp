// popc::gather_linear and popc::gather_experts on CPUs. See popc/ops/gather.py for what they mean.
//
// What lies by neither dim of the weight is left to the reference, popc::gather_linear_reference.

#include "gather.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "lines.h"

namespace popc {
namespace gather {
namespace {

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
  return y.to(x.scalar_type()).view(output_sizes(x, weight.size(0)));
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
  return at::zeros(output_sizes(x, weight.size(0)), x.options()).index_copy_(-1, *rows, y);
}

}  // namespace
}  // namespace gather

Tensor gather_linear(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& rows,
    const MaybeTensor& columns, int64_t out_dim) {
  using namespace gather;
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
  Tensor y = at::empty(output_sizes(x, outputs), x.options());
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

namespace gather {
namespace {

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

TORCH_LIBRARY_IMPL(popc, CPU, m) {
  m.impl("gather_linear", gather_linear);
  m.impl("gather_experts", gather_experts);
}

}  // namespace
}  // namespace gather
}  // namespace popc
