// popc::quantized_linear on CPUs. See popc/ops/quantized.py for what it means.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "dispatch.h"
#include "plane_dot.h"
#include "plane_expand.h"
#include "plane_gemv.h"
#include "plane_rows.h"
#include "sparse_gemv.h"

namespace popc::quantized {
namespace {

constexpr const char* op_name = "popc::quantized_linear";

struct Weight {
  PlaneRows rows;
  const ScaleGroups& groups;
  int64_t row_dim, inputs, outputs;
};

// Channel-major rows, for up to max_tokens tokens: all planes of all channels.
template <typename T>
void axpy(const Weight& weight, const T* x, int64_t tokens, const T* bias, T* y) {
  std::vector<float> values(tokens * weight.inputs);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(x[i]);
  std::vector<int32_t> entries(weight.inputs);
  for (int64_t c = 0; c < weight.inputs; ++c) entries[c] = static_cast<int32_t>(2 * c + 1);
  const ChannelReads reads{
      values.data(), values.data(), tokens, weight.inputs, entries.data(), weight.inputs};
  const auto no_base = [](int64_t) -> const float* { return nullptr; };
  plane_gemv<T>(reads, {PlaneOutput<T>{weight.rows, weight.groups, bias, no_base, y}});
}

// y [N, rows] = the products of x [N, inputs] with all rows, over ATen's threads.
template <int N>
void dot_rows(const Weight& weight, const float* x, float* y) {
  const PlaneRows& rows = weight.rows;
  const int64_t threads = threads_for(rows.count, rows.row_bytes());
  // in_thread() gives a thread's multiply(row, out).
  const auto for_rows = [&](auto&& in_thread) {
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      auto multiply = in_thread();
      float out[N];
      const int64_t last = rows.count * end / threads;
      for (int64_t r = rows.count * begin / threads; r < last; ++r) {
        multiply(r, out);
        for (int n = 0; n < N; ++n) y[n * rows.count + r] = out[n];
      }
    });
  };
#if defined(__AVX512VNNI__) && defined(CPU_CAPABILITY_AVX512)
  if (!weight.groups.scale) {
    const DotTokens tokens(x, N, weight.inputs, rows.has_low());
    return for_rows([&] {
      return [&](int64_t r, float* out) {
        const RowView row(rows, r, true), next(rows, std::min(r + 2, rows.count - 1), true);
        tokens.multiply<N>(row, next, rows.blocks(), out);
      };
    });
  }
#endif
  for_rows([&] {
    return [&, row = std::vector<float>(weight.inputs)](int64_t r, float* out) mutable {
      expand_row<float>(
          rows, weight.groups, weight.row_dim, r, 0, rows.blocks(), true, row.data());
      dot_expanded<N>(row.data(), x, weight.inputs, out);
    };
  });
}

// Output-major rows, for up to max_tokens tokens.
template <typename T>
void dot(const Weight& weight, const T* x, int64_t tokens, const T* bias, T* y) {
  const std::vector<float> wide(x, x + tokens * weight.inputs);
  const std::unique_ptr<float[]> products(new float[tokens * weight.outputs]);
  dispatch_tokens(tokens, [&](auto count) {
    dot_rows<decltype(count)::value>(weight, wide.data(), products.get());
  });
  at::parallel_for(0, weight.outputs, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t n = 0; n < tokens; ++n) {
      for (int64_t r = begin; r < end; ++r) {
        const float offset = bias ? static_cast<float>(bias[r]) : 0.0f;
        y[n * weight.outputs + r] = static_cast<T>(products[n * weight.outputs + r] + offset);
      }
    }
  });
}

// Memory for `count` values, this thread's own. It is kept, as fresh pages take as long as the values
// do; not where autograd may keep the values themselves.
Tensor scratch(int64_t count, const at::TensorOptions& options) {
  if (c10::GradMode::is_enabled()) return at::empty({count}, options);
  const c10::InferenceMode normal_tensor(false);
  thread_local Tensor kept;
  const int64_t bytes = count * static_cast<int64_t>(options.dtype().itemsize());
  if (!kept.defined() || kept.numel() < bytes) kept = at::empty({bytes}, options.dtype(at::kByte));
  return kept.narrow(0, 0, bytes).view(c10::typeMetaToScalarType(options.dtype()));
}

// The values of outputs [first, last), [outputs, inputs], of which either dim is contiguous; in
// scratch().
template <typename T>
Tensor expand_outputs(
    const Weight& weight, int64_t first, int64_t last, const at::TensorOptions& options) {
  const int64_t width = last - first;
  const bool by_input = weight.row_dim == 1;
  const Tensor flat = scratch(weight.inputs * width, options);
  const Tensor values =
      by_input ? flat.view({weight.inputs, width}) : flat.view({width, weight.inputs});
  T* to = values.data_ptr<T>();
  const int64_t blocks = weight.rows.blocks();
  at::parallel_for(0, values.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t row = by_input ? r : first + r;
      expand_row<T>(
          weight.rows, weight.groups, weight.row_dim, row, by_input ? first / block_values : 0,
          by_input ? (last + block_values - 1) / block_values : blocks, true,
          to + r * values.size(1));
    }
  });
  return by_input ? values.t() : values;
}

// Many tokens: the values of a panel of outputs after the other, mostly of all, for a dense GEMM, which
// is in float32 where that is faster than in x's dtype.
template <typename T>
Tensor gemm(const Weight& weight, const Tensor& x, const MaybeTensor& bias) {
  constexpr int64_t panel_values = 1 << 24;
  const int64_t panel =
      std::max(block_values, panel_values / weight.inputs / block_values * block_values);
  if (weight.outputs <= panel) {
    return at::linear(x, expand_outputs<T>(weight, 0, weight.outputs, x.options()), bias);
  }
  const Tensor flat = x.reshape({-1, weight.inputs});
  const Tensor y = at::empty({flat.size(0), weight.outputs}, x.options());
  for (int64_t first = 0; first < weight.outputs; first += panel) {
    const int64_t last = std::min(weight.outputs, first + panel);
    const Tensor values = expand_outputs<T>(weight, first, last, x.options());
    const MaybeTensor offset = bias ? MaybeTensor(bias->narrow(0, first, last - first)) : bias;
    y.narrow(1, first, last - first).copy_(at::linear(flat, values, offset));
  }
  return y.view(output_sizes(x, weight.outputs));
}

Tensor run_gemm(const Weight& weight, const Tensor& x, const MaybeTensor& bias) {
  if (!has_fast_gemm(x.scalar_type())) {
    const MaybeTensor wide_bias = bias ? MaybeTensor(bias->to(at::kFloat)) : bias;
    return gemm<float>(weight, x.to(at::kFloat), wide_bias).to(x.scalar_type());
  }
  Tensor y;
  dispatch_dtype(
      x.scalar_type(), [&](auto zero) { y = gemm<decltype(zero)>(weight, x, bias); });
  return y;
}

Tensor run_reference(
    const Tensor& x, const Tensor& packed, const MaybeTensor& scale, const MaybeTensor& zero,
    const MaybeTensor& bias, int64_t outputs, int64_t row_dim, int64_t planes) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("popc::quantized_linear_reference", "")
                       .typed<Tensor(
                           const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&,
                           const MaybeTensor&, int64_t, int64_t, int64_t)>();
  return op.call(x, packed, scale, zero, bias, outputs, row_dim, planes);
}

constexpr int64_t max_kernel_tokens = 2 * max_tokens;  // beyond, a GEMM is faster

Tensor quantized_linear(
    const Tensor& x, const Tensor& packed, const MaybeTensor& scale, const MaybeTensor& zero,
    const MaybeTensor& bias, int64_t outputs, int64_t row_dim, int64_t planes) {
  TORCH_CHECK_VALUE(
      x.dim() >= 1 && outputs >= 0 && (row_dim == 0 || row_dim == 1), op_name,
      " takes x [..., K] and row_dim 0 or 1, not ", x.sizes(), ", ", row_dim, ", for ", outputs,
      " outputs");
  const int64_t inputs = x.size(-1);
  const bool by_input = row_dim == 1;
  const ScaleTensors scales(op_name, scale, zero, outputs, inputs);
  const Weight weight{
      plane_rows(
          op_name, packed, by_input ? inputs : outputs, by_input ? outputs : inputs, planes,
          !scale.has_value()),
      scales.groups(), row_dim, inputs, outputs};
  TORCH_CHECK_VALUE(
      !bias || (bias->scalar_type() == x.scalar_type() && bias->numel() == outputs), op_name,
      ": the bias does not fit the weight");
  if (!is_supported_dtype(x.scalar_type()) || x.numel() == 0 || packed.numel() == 0) {
    return run_reference(x, packed, scale, zero, bias, outputs, row_dim, planes);
  }
  const int64_t tokens = x.numel() / inputs;
  const Tensor values = x.contiguous();
  if (tokens > max_kernel_tokens) return run_gemm(weight, values, bias);
  const Tensor biases = bias ? bias->contiguous() : Tensor();
  const Tensor y = at::empty(output_sizes(x, outputs), x.options());
  dispatch_dtype(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    for (int64_t n = 0; n < tokens; n += max_tokens) {
      const auto run = by_input ? axpy<T> : dot<T>;
      run(weight, values.const_data_ptr<T>() + n * inputs, std::min(max_tokens, tokens - n),
          bias ? biases.const_data_ptr<T>() : nullptr, y.data_ptr<T>() + n * outputs);
    }
  });
  return y;
}

TORCH_LIBRARY_IMPL(popc, CPU, m) { m.impl("quantized_linear", quantized_linear); }

}  // namespace
}  // namespace popc::quantized
