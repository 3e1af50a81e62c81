// popc::gather_quantized, popc::quantized_experts and popc::graded_experts on CPUs, made of popc's
// other ops on planes. See popc/ops/gather_quantized.py for what they mean.

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>

#include "dispatch.h"
#include "sparse_gemv.h"

namespace popc::gather_planes {
namespace {

// A weight [N, K] in planes, or a stack of them.
struct Weight {
  const Tensor& packed;
  const MaybeTensor& scale;
  const MaybeTensor& zero;
  int64_t outputs, row_dim, planes;
};

Tensor quantized_linear(const Tensor& x, const Weight& weight, const MaybeTensor& bias) {
  static auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("popc::quantized_linear", "")
          .typed<Tensor(
              const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&,
              const MaybeTensor&, int64_t, int64_t, int64_t)>();
  return op.call(
      x, weight.packed, weight.scale, weight.zero, bias, weight.outputs, weight.row_dim,
      weight.planes);
}

Tensor graded_linear(
    const Tensor& x, const Weight& weight, const MaybeTensor& bias, const Tensor& norm,
    const Tensor& low_norm, const Tensor& threshold) {
  static auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("popc::graded_linears", "")
          .typed<Tensor(
              const Tensor&, at::TensorList, const c10::List<MaybeTensor>&,
              const c10::List<MaybeTensor>&, at::IntArrayRef, at::IntArrayRef,
              const c10::List<MaybeTensor>&, const Tensor&, const Tensor&, const Tensor&,
              const MaybeTensor&, const MaybeTensor&)>();
  const auto one = [](const MaybeTensor& value) { return c10::List<MaybeTensor>({value}); };
  return op
      .call(
          x, weight.packed, one(weight.scale), one(weight.zero), weight.outputs, weight.planes,
          one(bias), norm, low_norm, threshold, std::nullopt, std::nullopt)
      .view(output_sizes(x, weight.outputs));
}

Tensor run_reference(
    const Tensor& x, const Weight& weight, const MaybeTensor& bias, const MaybeTensor& rows,
    const MaybeTensor& columns) {
  static auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("popc::gather_quantized_reference", "")
          .typed<Tensor(
              const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&,
              const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, int64_t, int64_t,
              int64_t)>();
  return op.call(
      x, weight.packed, weight.scale, weight.zero, bias, rows, columns, weight.outputs,
      weight.row_dim, weight.planes);
}

// Channels that are not listed become zeros, and of a channel-major weight those are not read.
Tensor listed_columns(
    const Tensor& x, const Weight& weight, const MaybeTensor& bias, const Tensor& columns) {
  std::vector<int64_t> sizes = x.sizes().vec(), lead(x.dim(), 1);
  sizes.back() = lead.back() = columns.size(-1);
  if (columns.dim() == 2) {
    TORCH_CHECK_VALUE(
        x.dim() > 1 && columns.size(0) == x.size(0), "popc::gather_quantized: a list for each of ",
        columns.size(0), " sequences does not fit x ", x.sizes());
    lead[0] = columns.size(0);
  }
  const Tensor index = columns.reshape(lead).expand(sizes);
  const Tensor listed =
      at::zeros(x.sizes(), x.options()).scatter_add_(-1, index, x.gather(-1, index));
  const Tensor ones = at::ones({x.size(-1)}, x.options().dtype(at::kFloat));
  return graded_linear(listed, weight, bias, ones, ones, at::zeros({1}, ones.options()));
}

// The listed rows of an output-major weight, side by side.
Tensor listed_rows(
    const Tensor& x, const Weight& weight, const MaybeTensor& bias, const Tensor& rows) {
  const auto listed = [&](const MaybeTensor& value, int64_t dim) {
    return value ? MaybeTensor(value->index_select(dim, rows)) : value;
  };
  const Tensor packed = weight.packed.index_select(0, rows);
  const MaybeTensor scale = listed(weight.scale, 1), zero = listed(weight.zero, 1);
  const Weight part{packed, scale, zero, rows.size(0), weight.row_dim, weight.planes};
  const Tensor y = quantized_linear(x, part, listed(bias, 0));
  return at::zeros(output_sizes(x, weight.outputs), x.options()).index_copy_(-1, rows, y);
}

Tensor gather(
    const Tensor& x, const Weight& weight, const MaybeTensor& bias, const MaybeTensor& rows,
    const MaybeTensor& columns) {
  const bool is_supported = is_supported_dtype(x.scalar_type()) && x.numel() > 0;
  if (is_supported && !rows && !columns) return quantized_linear(x, weight, bias);
  if (is_supported && weight.row_dim == 1 && !rows && x.numel() <= max_tokens * x.size(-1)) {
    return listed_columns(x, weight, bias, *columns);
  }
  if (is_supported && weight.row_dim == 0 && !columns && rows->dim() == 1) {
    return listed_rows(x, weight, bias, *rows);
  }
  return run_reference(x, weight, bias, rows, columns);
}

Tensor gather_quantized(
    const Tensor& x, const Tensor& packed, const MaybeTensor& scale, const MaybeTensor& zero,
    const MaybeTensor& bias, const MaybeTensor& rows, const MaybeTensor& columns, int64_t outputs,
    int64_t row_dim, int64_t planes) {
  TORCH_CHECK_VALUE(
      packed.dim() == 2 && x.dim() >= 1,
      "popc::gather_quantized takes x [..., K] and packed rows, not ", x.sizes(), " and ",
      packed.sizes());
  return gather(x, {packed, scale, zero, outputs, row_dim, planes}, bias, rows, columns);
}

// The rows of x that go to one expert: from `first` on, `count` of them, once they are in order.
struct Run {
  int64_t expert, first, count;
};

// Rows by their experts. Where they come in that order already, nothing is copied.
class Routing {
 public:
  Routing(const char* op, const Tensor& x, const Tensor& expert, int64_t experts) {
    TORCH_CHECK_VALUE(
        x.dim() == 2 && expert.dim() == 1 && expert.size(0) == x.size(0), op,
        " takes x [S, K] and expert [S], not ", x.sizes(), " and ", expert.sizes());
    const Tensor each = expert.to(at::kLong).contiguous();
    const int64_t* of_row = each.const_data_ptr<int64_t>();
    const int64_t rows = x.size(0);
    for (int64_t s = 0; s < rows; ++s) {
      TORCH_CHECK_INDEX(
          of_row[s] >= 0 && of_row[s] < experts, op, ": row ", s, " is of expert ", of_row[s],
          " of ", experts);
    }
    std::vector<int64_t> order(rows);
    std::iota(order.begin(), order.end(), 0);
    const auto by_expert = [&](int64_t a, int64_t b) { return of_row[a] < of_row[b]; };
    if (!std::is_sorted(order.begin(), order.end(), by_expert)) {
      std::stable_sort(order.begin(), order.end(), by_expert);
      order_ = at::empty({rows}, each.options());
      std::copy(order.begin(), order.end(), order_.mutable_data_ptr<int64_t>());
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t e = of_row[order[i]];
      if (runs_.empty() || runs_.back().expert != e) runs_.push_back({e, i, 0});
      ++runs_.back().count;
    }
  }
  const std::vector<Run>& runs() const { return runs_; }
  Tensor in_order(const Tensor& rows) const {
    return order_.defined() ? rows.index_select(0, order_) : rows;
  }
  Tensor as_they_came(const Tensor& y) const {
    return order_.defined() ? at::empty_like(y).index_copy_(0, order_, y) : y;
  }

 private:
  Tensor order_;
  std::vector<Run> runs_;
};

// y [S, N]: run(run, rows of x, weight) of each expert that has rows.
template <typename F>
Tensor for_each_expert(
    const char* op, const Tensor& x, const Weight& stack, const Tensor& expert, F&& run) {
  TORCH_CHECK_VALUE(
      stack.packed.dim() == 3, op, " takes packed [E, rows, bytes], not ", stack.packed.sizes());
  const Routing routing(op, x, expert, stack.packed.size(0));
  const Tensor rows = routing.in_order(x);
  Tensor y = at::empty({x.size(0), stack.outputs}, x.options());
  for (const Run& of_expert : routing.runs()) {
    const auto part = [&](const MaybeTensor& values) {
      return values ? MaybeTensor(values->select(0, of_expert.expert)) : values;
    };
    const Tensor packed = stack.packed.select(0, of_expert.expert);
    const MaybeTensor scale = part(stack.scale), zero = part(stack.zero);
    const Weight weight{packed, scale, zero, stack.outputs, stack.row_dim, stack.planes};
    const Tensor own = rows.narrow(0, of_expert.first, of_expert.count);
    y.narrow(0, of_expert.first, of_expert.count).copy_(run(routing, of_expert, own, weight));
  }
  return routing.as_they_came(y);
}

Tensor quantized_experts(
    const Tensor& x, const Tensor& packed, const MaybeTensor& scale, const MaybeTensor& zero,
    const Tensor& expert, const MaybeTensor& full, const MaybeTensor& rows,
    const MaybeTensor& columns, int64_t outputs, int64_t row_dim, int64_t planes) {
  constexpr const char* op = "popc::quantized_experts";
  TORCH_CHECK_VALUE(
      (!rows || (rows->dim() == 2 && rows->size(0) == packed.size(0))) &&
          (!columns || (columns->dim() == 2 && columns->size(0) == x.size(0))) &&
          (!full || (full->dim() == 1 && full->size(0) == packed.size(0))),
      op, ": rows must be [E, n], columns [S, n] and full [E]");
  const Tensor marks = full ? full->to(at::kBool).contiguous() : Tensor();
  const bool* is_full = full ? marks.const_data_ptr<bool>() : nullptr;
  const Weight stack{packed, scale, zero, outputs, row_dim, planes};
  return for_each_expert(
      op, x, stack, expert,
      [&](const Routing& routing, const Run& run, const Tensor& own, const Weight& weight) {
        if (!is_full || is_full[run.expert]) return quantized_linear(own, weight, std::nullopt);
        MaybeTensor own_rows, own_columns;
        if (rows) own_rows = rows->select(0, run.expert);
        if (columns) own_columns = routing.in_order(*columns).narrow(0, run.first, run.count);
        return gather(own, weight, std::nullopt, own_rows, own_columns);
      });
}

Tensor graded_experts(
    const Tensor& x, const Tensor& packed, const MaybeTensor& scale, const MaybeTensor& zero,
    const Tensor& expert, const Tensor& norm, const Tensor& low_norm, const Tensor& threshold,
    int64_t outputs, int64_t planes) {
  constexpr const char* op = "popc::graded_experts";
  TORCH_CHECK_VALUE(
      threshold.dim() <= 1 && threshold.numel() == 1, op,
      ": experts take one threshold for all rows, not ", threshold.sizes());
  const auto check_scales = [&](const char* name, const Tensor& scales) {
    TORCH_CHECK_VALUE(
        packed.dim() == 3 && x.dim() == 2 && scales.dim() == 1 &&
            scales.numel() == packed.size(0) * x.size(1),
        op, ": ", name, " ", scales.sizes(), " does not fit x ", x.sizes(), " and packed ",
        packed.sizes());
  };
  check_scales("norm", norm);
  check_scales("low_norm", low_norm);
  return for_each_expert(
      op, x, {packed, scale, zero, outputs, 1, planes}, expert,
      [&](const Routing&, const Run& run, const Tensor& own, const Weight& weight) {
        const auto of_expert = [&](const Tensor& scales) {
          return scales.narrow(0, run.expert * x.size(1), x.size(1));
        };
        return graded_linear(
            own, weight, std::nullopt, of_expert(norm), of_expert(low_norm), threshold);
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(popc, CPU, m) {
  m.impl("gather_quantized", gather_quantized);
  m.impl("quantized_experts", quantized_experts);
  m.impl("graded_experts", graded_experts);
}

}  // namespace popc::gather_planes
