// popc::gather_linear and popc::gather_experts on CPUs. See popc/ops/gather.py for what they mean.
//
// A weight of which neither dim is contiguous runs the reference, popc::gather_linear_reference.

#include "gather.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "dispatch.h"
#include "index_list.h"
#include "sparse_gemv.h"

namespace popc {
namespace gather {
namespace {

// An argument `rows` or `columns`: no list, one [n], or one for each item [B, n].
class ListArgument {
 public:
  ListArgument(const MaybeTensor& list, const char* name, int64_t size) : name_(name), size_(size) {
    if (!list) return;
    TORCH_CHECK_TYPE(
        list->scalar_type() == at::kLong, "popc: ", name, " must be int64, not ",
        list->scalar_type());
    TORCH_CHECK_VALUE(
        list->dim() == 1 || list->dim() == 2, "popc: ", name, " must be [n] or [B, n], not ",
        list->sizes());
    indices_ = list->contiguous();
  }
  bool is_listed() const { return indices_.defined(); }
  bool is_per_item() const { return is_listed() && indices_.dim() == 2; }
  int64_t items() const { return indices_.size(0); }
  IndexList list(int64_t item) const {
    if (!is_listed()) return IndexList(size_);
    const int64_t n = indices_.size(-1), offset = is_per_item() ? item * n : 0;
    return IndexList(indices_.const_data_ptr<int64_t>() + offset, n, size_, name_);
  }

 private:
  Tensor indices_;
  const char* name_;
  int64_t size_;
};

Tensor run_reference(
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

// x Wᵀ + bias in float32, converting a block of input channels at a time to save memory.
Tensor linear_in_float(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  constexpr int64_t block = 1024;
  const Tensor flat = x.reshape({-1, x.size(-1)}).to(at::kFloat);
  Tensor y = at::zeros({flat.size(0), weight.size(0)}, flat.options());
  for (int64_t c = 0; c < weight.size(1); c += block) {
    const int64_t n = std::min(block, weight.size(1) - c);
    y.addmm_(flat.narrow(1, c, n), weight.narrow(1, c, n).to(at::kFloat).t());
  }
  if (bias) y.add_(*bias);
  return y.to(x.scalar_type()).view(output_sizes(x, weight.size(0)));
}

// Many tokens with shared lists: the listed part of the weight is copied once, for a dense GEMM.
Tensor packed_linear(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& rows,
    const MaybeTensor& columns) {
  const bool output_major = weight.stride(1) == 1;
  if (output_major && !rows && !columns) return at::linear(x, weight, bias);
  Tensor packed = weight, packed_x = x;
  MaybeTensor packed_bias = bias;
  const auto pack = [&](int64_t dim, const Tensor& list) {
    packed = output_major ? packed.index_select(dim, list)
                          : packed.t().index_select(1 - dim, list).t();
  };
  if (rows) {
    pack(0, *rows);
    if (bias) packed_bias = bias->index_select(0, *rows);
  }
  if (columns) {
    pack(1, *columns);
    packed_x = x.index_select(-1, *columns);
  }
  const Tensor y = has_fast_gemm(x.scalar_type()) ? at::linear(packed_x, packed, packed_bias)
                                                  : linear_in_float(packed_x, packed, packed_bias);
  if (!rows) return y;
  return at::zeros(output_sizes(x, weight.size(0)), x.options()).index_copy_(-1, *rows, y);
}

// packed_linear() once, or for each sequence where `per_sequence` lists differ between them.
Tensor many_token_linear(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& rows,
    const MaybeTensor& columns, bool per_sequence) {
  if (!per_sequence) return packed_linear(x, weight, bias, rows, columns);
  const auto list_of = [](const MaybeTensor& list, int64_t s) {
    return list && list->dim() == 2 ? MaybeTensor(list->select(0, s)) : list;
  };
  std::vector<Tensor> results;
  for (int64_t s = 0; s < x.size(0); ++s) {
    results.push_back(
        packed_linear(x.select(0, s), weight, bias, list_of(rows, s), list_of(columns, s)));
  }
  return at::stack(results);
}

// sparse_gemv() for blocks of tokens, which share lists with their sequence.
Tensor few_token_linear(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const ListArgument& rows,
    const ListArgument& columns, int64_t sequences, int64_t out_dim) {
  const int64_t inputs = weight.size(1 - out_dim), outputs = weight.size(out_dim);
  const int64_t sequence_tokens = x.numel() / inputs / sequences;
  const Tensor x_values = x.contiguous(), bias_values = bias ? bias->contiguous() : Tensor();
  Tensor y = at::empty(output_sizes(x, outputs), x.options());
  dispatch_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const WeightRows<T> weight_view = weight_rows<T>(weight, out_dim);
    const T* bias_data = bias ? bias_values.const_data_ptr<T>() : nullptr;
    for (int64_t s = 0; s < sequences; ++s) {
      const IndexList row_list = rows.list(s), column_list = columns.list(s);
      for (int64_t t = 0; t < sequence_tokens; t += max_tokens) {
        const int64_t token = s * sequence_tokens + t;
        sparse_gemv<T>(
            x_values.const_data_ptr<T>() + token * inputs,
            std::min(max_tokens, sequence_tokens - t), inputs, outputs, weight_view, row_list,
            column_list, bias_data, y.data_ptr<T>() + token * outputs);
      }
    }
  });
  return y;
}

// How many sequences have lists of their own; 1 where lists are shared.
int64_t check_lists(const Tensor& x, const ListArgument& rows, const ListArgument& columns) {
  int64_t sequences = 1;
  for (const ListArgument* lists : {&rows, &columns}) {
    if (lists->is_per_item()) sequences = lists->items();
  }
  for (const ListArgument* lists : {&rows, &columns}) {
    TORCH_CHECK_VALUE(
        !lists->is_per_item() || (lists->items() == sequences && x.size(0) == sequences),
        "popc::gather_linear: a list for each of ", lists->is_listed() ? lists->items() : 0,
        " sequences does not fit x ", x.sizes());
  }
  return sequences;
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
  if (!is_supported(x, weight) || x.numel() == 0 || weight.numel() == 0) {
    return run_reference(x, weight, bias, rows, columns, out_dim);
  }
  const ListArgument row_lists(rows, "rows", outputs), column_lists(columns, "columns", inputs);
  const int64_t sequences = check_lists(x, row_lists, column_lists);
  TORCH_CHECK_VALUE(
      !bias || (bias->scalar_type() == x.scalar_type() && bias->numel() == outputs),
      "popc::gather_linear: the bias does not fit the weight");
  const int64_t sequence_tokens = x.numel() / inputs / sequences;
  if (sequence_tokens > (has_fast_gemm(x.scalar_type()) ? max_tokens : 4 * max_tokens)) {
    return many_token_linear(
        x, out_dim == 0 ? weight : weight.t(), bias, rows, columns,
        row_lists.is_per_item() || column_lists.is_per_item());
  }
  return few_token_linear(x, weight, bias, row_lists, column_lists, sequences, out_dim);
}

namespace gather {
namespace {

void check_experts(
    const Tensor& x, const Tensor& weight, const Tensor& expert, const Tensor& full,
    const MaybeTensor& rows, const MaybeTensor& columns, int64_t out_dim) {
  TORCH_CHECK_VALUE(
      weight.dim() == 3 && x.dim() == 2 && (out_dim == 0 || out_dim == 1),
      "popc::gather_experts takes x [S, K] and a weight of three dims, not ", x.sizes(), " and ",
      weight.sizes());
  const int64_t count = weight.size(0), tokens = x.size(0), inputs = weight.size(2 - out_dim);
  TORCH_CHECK_VALUE(
      x.size(1) == inputs, "popc::gather_experts: x has ", x.size(1), " channels, the weight ",
      inputs);
  TORCH_CHECK_VALUE(
      expert.dim() == 1 && expert.size(0) == tokens && full.dim() == 1 && full.size(0) == count,
      "popc::gather_experts: expert must be [S] and full [E], not ", expert.sizes(), " and ",
      full.sizes());
  TORCH_CHECK_VALUE(
      !rows || (rows->dim() == 2 && rows->size(0) == count),
      "popc::gather_experts: rows must be [E, n]");
  TORCH_CHECK_VALUE(
      !columns || (columns->dim() == 2 && columns->size(0) == tokens),
      "popc::gather_experts: columns must be [S, n]");
}

// Token by token; lists count but for experts that are dense.
void experts_by_reference(
    const Tensor& x, const Tensor& weight, const int64_t* expert_of, const bool* is_dense,
    const MaybeTensor& rows, const MaybeTensor& columns, int64_t out_dim, Tensor& y) {
  for (int64_t s = 0; s < x.size(0); ++s) {
    const int64_t e = expert_of[s];
    y.select(0, s).copy_(run_reference(
        x.select(0, s), weight.select(0, e), std::nullopt,
        rows && !is_dense[e] ? MaybeTensor(rows->select(0, e)) : std::nullopt,
        columns && !is_dense[e] ? MaybeTensor(columns->select(0, s)) : std::nullopt, out_dim));
  }
}

Tensor gather_experts(
    const Tensor& x, const Tensor& weight, const Tensor& expert, const Tensor& full,
    const MaybeTensor& rows, const MaybeTensor& columns, int64_t out_dim) {
  check_experts(x, weight, expert, full, rows, columns, out_dim);
  const int64_t count = weight.size(0), tokens = x.size(0);
  const int64_t inputs = weight.size(2 - out_dim), outputs = weight.size(1 + out_dim);
  const Tensor experts = expert.to(at::kLong).contiguous();
  const Tensor dense = full.to(at::kBool).contiguous();
  const int64_t* expert_of = experts.const_data_ptr<int64_t>();
  const bool* is_dense = dense.const_data_ptr<bool>();
  for (int64_t s = 0; s < tokens; ++s) {
    TORCH_CHECK_INDEX(
        expert_of[s] >= 0 && expert_of[s] < count, "popc: row ", s, " is of expert ", expert_of[s],
        " of ", count);
  }
  const ListArgument row_lists(rows, "rows", outputs), column_lists(columns, "columns", inputs);
  Tensor y = at::empty({tokens, outputs}, x.options());
  if (tokens == 0) return y;
  if (!is_supported(x, weight) || weight.numel() == 0) {
    experts_by_reference(x, weight, expert_of, is_dense, rows, columns, out_dim, y);
    return y;
  }
  // Consecutive tokens of one expert share a pass over its weight, unless their lists differ.
  const auto block_size = [&](int64_t s) {
    int64_t n = 1;
    const bool has_own_list = column_lists.is_listed() && !is_dense[expert_of[s]];
    if (has_own_list) return n;
    while (n < max_tokens && s + n < tokens && expert_of[s + n] == expert_of[s]) ++n;
    return n;
  };
  const Tensor x_values = x.contiguous();
  dispatch_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    for (int64_t s = 0, n = 0; s < tokens; s += n) {
      n = block_size(s);
      const int64_t e = expert_of[s];
      const WeightRows<T> weight_view = weight_rows<T>(weight.select(0, e), out_dim);
      const IndexList row_list = is_dense[e] ? IndexList(outputs) : row_lists.list(e);
      const IndexList column_list = is_dense[e] ? IndexList(inputs) : column_lists.list(s);
      sparse_gemv<T>(
          x_values.const_data_ptr<T>() + s * inputs, n, inputs, outputs, weight_view, row_list,
          column_list, nullptr, y.data_ptr<T>() + s * outputs);
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
