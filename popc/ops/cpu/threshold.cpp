// popc::threshold_linear and popc::threshold_linears on CPUs. See popc/ops/threshold.py for what
// they mean.

#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "channel_inputs.h"
#include "dispatch.h"
#include "gather.h"
#include "sparse_gemv.h"
#include "vec.h"

namespace popc::threshold {
namespace {

constexpr const char* op_name = "popc::threshold_linear";

// One token: out = x - center where |x - center| · norm > limit, else 0; of the channels that pass,
// the bits of `skipped` are cleared. Branch-free, as about half of the branches would be
// mispredicted.
template <typename T, bool centered>
void threshold_row(
    const T* __restrict x, const float* __restrict center, const float* __restrict norm,
    float limit, int64_t inputs, T* __restrict out, int32_t* __restrict skipped) {
  const Vec limits(limit), zero(0.0f);
  const auto apply = [&](Vec value, int64_t c) {
    if constexpr (centered) value = value - Vec::loadu(center + c);
    const Vec fails = value.abs() * Vec::loadu(norm + c) <= limits;  // a NaN passes
    (Vec::loadu(skipped + c) & fails).store(skipped + c);
    return Vec::blendv(value, zero, fails);
  };
  int64_t c = 0;
  for (; c + pair_lanes <= inputs; c += pair_lanes) {
    const auto [low, high] = load_ordered_pair(x + c);
    store_ordered_pair(apply(low, c), apply(high, c + lanes), out + c);
  }
  for (; c < inputs; ++c) {
    float value = static_cast<float>(x[c]);
    if constexpr (centered) value -= center[c];
    const bool fails = std::fabs(value) * norm[c] <= limit;
    out[c] = static_cast<T>(fails ? 0.0f : value);
    skipped[c] &= -static_cast<int32_t>(fails);
  }
}

constexpr int64_t threshold_grain = 1 << 13;  // a thread's least share, in values

// threshold_row() for all tokens, `sequence_tokens` in each sequence; returns the channels that
// pass for any of them, in order.
template <typename T>
std::vector<int64_t> threshold_and_compact(
    const T* x, int64_t tokens, int64_t inputs, const float* norm, const float* limits,
    int64_t limit_count, const SequenceRows& centers, int64_t sequence_tokens, T* out) {
  std::vector<int32_t> skipped(inputs, -1);
  at::parallel_for(0, inputs, 1 + threshold_grain / tokens, [&](int64_t begin, int64_t end) {
    for (int64_t n = 0; n < tokens; ++n) {
      const float limit = limits[limit_count > 1 ? n / sequence_tokens : 0];
      const float* center = centers.row(n / sequence_tokens);
      const auto threshold = center ? threshold_row<T, true> : threshold_row<T, false>;
      const int64_t offset = n * inputs + begin;
      threshold(
          x + offset, center ? center + begin : nullptr, norm + begin, limit, end - begin,
          out + offset, skipped.data() + begin);
    }
  });
  std::vector<int64_t> columns(inputs);
  int64_t count = 0;
  for (int64_t c = 0; c < inputs; ++c) {
    columns[count] = c;
    count += 1 + skipped[c];
  }
  columns.resize(count);
  return columns;
}

struct Linear {
  Tensor weight;
  MaybeTensor bias;
  int64_t out_dim;
  int64_t offset = 0;  // of its outputs among those of all linears

  int64_t outputs() const { return weight.size(out_dim); }
};

void check(const ChannelInputs& shared, const std::vector<Linear>& linears) {
  const Tensor& x = shared.x;
  check_thresholds(op_name, shared);
  for (const Linear& linear : linears) {
    TORCH_CHECK_VALUE(
        linear.weight.dim() == 2 && x.dim() >= 1 && (linear.out_dim == 0 || linear.out_dim == 1),
        op_name, " takes x [..., K] and weights of two dims, not ", x.sizes(), " and ",
        linear.weight.sizes());
    check_inputs(op_name, shared, linear.weight.size(1 - linear.out_dim));
    check_bias(op_name, shared, linear.bias, linear.outputs());
  }
}

// A linear's part of the bases.
MaybeTensor base_of(const ChannelInputs& shared, const Linear& linear) {
  if (!shared.base) return std::nullopt;
  return shared.base->narrow(1, linear.offset, linear.outputs());
}

// For dtypes and layouts that sparse_gemv.h does not support.
std::vector<Tensor> run_reference(const ChannelInputs& shared, const std::vector<Linear>& linears) {
  static auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("popc::threshold_linear_reference", "")
          .typed<Tensor(
              const Tensor&, const Tensor&, const MaybeTensor&, const Tensor&, const Tensor&,
              int64_t, const MaybeTensor&, const MaybeTensor&)>();
  std::vector<Tensor> results;
  for (const Linear& linear : linears) {
    results.push_back(op.call(
        shared.x, linear.weight, linear.bias, shared.norm, shared.threshold, linear.out_dim,
        shared.center, base_of(shared, linear)));
  }
  return results;
}

// All linears over the listed columns of the thresholded x, in one pass, into memory of `sizes`, one
// linear after the other; nothing where a weight is output-major, or there are too many tokens.
template <typename T>
Tensor run_axpy(
    const ChannelInputs& shared, const Tensor& x, const std::vector<int64_t>& columns,
    const SequenceRows& bases, const std::vector<Linear>& linears, at::IntArrayRef sizes) {
  const int64_t inputs = shared.inputs(), tokens = shared.tokens();
  const int64_t sequence_tokens = tokens / shared.sequences();
  if (tokens > max_tokens) return {};
  const auto base_at = [&](int64_t offset) {
    return [&bases, sequence_tokens, offset](int64_t n) {
      const float* base = bases.row(n / sequence_tokens);
      return base ? base + offset : nullptr;
    };
  };
  std::vector<WeightRows<T>> weights;
  for (const Linear& linear : linears) {
    weights.push_back(weight_rows<T>(linear.weight, linear.out_dim));
    if (weights.back().output_major) return {};
  }
  Tensor y = at::empty(sizes, x.options());
  std::vector<Tensor> biases;
  std::vector<AxpyOutput<T, decltype(base_at(0))>> outputs;
  for (size_t i = 0; i < linears.size(); ++i) {
    const Linear& linear = linears[i];
    if (linear.bias) biases.push_back(linear.bias->contiguous());
    outputs.push_back(
        {weights[i], linear.bias ? biases.back().const_data_ptr<T>() : nullptr,
         base_at(linear.offset), y.data_ptr<T>() + tokens * linear.offset});
  }
  const IndexList list(columns.data(), columns.size(), inputs, "columns");
  axpy_gemv(x.const_data_ptr<T>(), inputs, tokens, list, outputs);
  return y;
}

// Linear by linear over all of the thresholded x, where a list of columns would save no bytes.
std::vector<Tensor> run_dense(
    const ChannelInputs& shared, const Tensor& x, const std::vector<Linear>& linears) {
  std::vector<Tensor> results;
  for (const Linear& linear : linears) {
    results.push_back(gather_linear(
        x, linear.weight, linear.bias, std::nullopt, std::nullopt, linear.out_dim));
    if (const MaybeTensor base = base_of(shared, linear)) {
      results.back().view({base->size(0), -1, linear.outputs()}).add_(base->unsqueeze(1));
    }
  }
  return results;
}

// The output of one linear as it is, or those of several in one dim, one after the other.
Tensor joined(const std::vector<Tensor>& results, bool is_flat) {
  if (!is_flat) return results.front();
  std::vector<Tensor> parts;
  for (const Tensor& result : results) parts.push_back(result.reshape({-1}));
  return at::cat(parts);
}

// Thresholds x once, then reads the passing columns of all weights together.
Tensor run(const ChannelInputs& shared, std::vector<Linear> linears, bool is_flat) {
  check(shared, linears);
  int64_t outputs = 0;
  bool supported = shared.x.numel() > 0;
  for (Linear& linear : linears) {
    linear.offset = outputs;
    outputs += linear.outputs();
    supported =
        supported && linear.weight.numel() > 0 && is_supported(shared.x, linear.weight);
  }
  const int64_t inputs = shared.inputs(), sequences = shared.sequences();
  const SequenceRows centers(op_name, "center", shared.center, inputs, sequences);
  const SequenceRows bases(op_name, "base", shared.base, outputs, sequences);
  if (!supported) return joined(run_reference(shared, linears), is_flat);
  const Tensor x = shared.x.contiguous(), norms = shared.norm.contiguous();
  const Tensor limits = shared.threshold.contiguous();
  const int64_t tokens = shared.tokens();
  const auto sizes =
      is_flat ? std::vector<int64_t>{tokens * outputs} : output_sizes(x, outputs);
  Tensor thresholded = at::empty(x.sizes(), x.options()), y;
  dispatch_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto columns = threshold_and_compact<T>(
        x.const_data_ptr<T>(), tokens, inputs, norms.const_data_ptr<float>(),
        limits.const_data_ptr<float>(), limits.numel(), centers, tokens / sequences,
        thresholded.data_ptr<T>());
    y = run_axpy<T>(shared, thresholded, columns, bases, linears, sizes);
  });
  return y.defined() ? y : joined(run_dense(shared, thresholded, linears), is_flat);
}

Tensor threshold_linear(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& norm,
    const Tensor& threshold, int64_t out_dim, const MaybeTensor& center, const MaybeTensor& base) {
  return run({x, norm, threshold, center, base}, {{weight, bias, out_dim}}, false);
}

Tensor threshold_linears(
    const Tensor& x, at::TensorList weights, const c10::List<MaybeTensor>& biases,
    const Tensor& norm, const Tensor& threshold, at::IntArrayRef out_dims,
    const MaybeTensor& center, const MaybeTensor& base) {
  TORCH_CHECK_VALUE(
      !weights.empty() && weights.size() == biases.size() && weights.size() == out_dims.size(),
      "popc::threshold_linears: ", weights.size(), " weights, ", biases.size(), " biases and ",
      out_dims.size(), " out_dims do not go together");
  std::vector<Linear> linears;
  for (size_t i = 0; i < weights.size(); ++i) {
    linears.push_back({weights[i], biases.get(i), out_dims[i]});
  }
  return run({x, norm, threshold, center, base}, linears, true);
}

}  // namespace

TORCH_LIBRARY_IMPL(popc, CPU, m) {
  m.impl("threshold_linear", threshold_linear);
  m.impl("threshold_linears", threshold_linears);
}

}  // namespace popc::threshold
