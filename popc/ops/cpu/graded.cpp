// popc::graded_linears on CPUs. See popc/ops/quantized.py for what it means.

#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "channel_inputs.h"
#include "dispatch.h"
#include "plane_gemv.h"
#include "plane_rows.h"
#include "sparse_gemv.h"
#include "vec.h"

namespace popc::graded {
namespace {

constexpr const char* op_name = "popc::graded_linears";

struct Weight {
  Tensor packed;
  MaybeTensor scale, zero, bias;
  int64_t outputs, planes;
  int64_t offset = 0;  // of its outputs among those of all linears
};

struct Request {
  ChannelInputs shared;
  const Tensor& low_norm;
  std::vector<Weight> weights;
};

// Of one token and one channel after the other: its value less its center where each plane is read,
// else 0; where a plane is read, the bits of `high_unread` or `low_unread` are cleared.
struct TokenReads {
  float* high;
  float* low;
  int32_t* high_unread;
  int32_t* low_unread;
};

template <typename T>
void grade_token(
    const T* x, const float* center, const float* norm, const float* low_norm, float limit,
    int64_t inputs, TokenReads to) {
  const Vec limits(limit), zero(0.0f);
  const auto grade = [&](Vec value, int64_t c) {
    if (center) value = value - Vec::loadu(center + c);
    const Vec size = value.abs();
    const Vec no_high = size * Vec::loadu(norm + c) <= limits;  // a NaN is read
    const Vec no_low = (size * Vec::loadu(low_norm + c) <= limits) | no_high;
    Vec::blendv(value, zero, no_high).store(to.high + c);
    Vec::blendv(value, zero, no_low).store(to.low + c);
    (Vec::loadu(to.high_unread + c) & no_high).store(to.high_unread + c);
    (Vec::loadu(to.low_unread + c) & no_low).store(to.low_unread + c);
  };
  int64_t c = 0;
  for (; c + pair_lanes <= inputs; c += pair_lanes) {
    const auto [first, second] = load_ordered_pair(x + c);
    grade(first, c);
    grade(second, c + lanes);
  }
  for (; c < inputs; ++c) {
    float value = static_cast<float>(x[c]);
    if (center) value -= center[c];
    const bool no_high = std::fabs(value) * norm[c] <= limit;
    const bool no_low = no_high || std::fabs(value) * low_norm[c] <= limit;
    to.high[c] = no_high ? 0.0f : value;
    to.low[c] = no_low ? 0.0f : value;
    to.high_unread[c] &= -static_cast<int32_t>(no_high);
    to.low_unread[c] &= -static_cast<int32_t>(no_low);
  }
}

// What the tokens read, in memory of its own.
class Grades {
 public:
  Grades(int64_t tokens, int64_t inputs)
      : tokens_(tokens), inputs_(inputs), values_(new float[2 * tokens * inputs]),
        unread_(2 * inputs, -1), entries_(inputs) {}

  TokenReads token(int64_t n, int64_t from) {
    return {
        values_.get() + n * inputs_ + from, values_.get() + (tokens_ + n) * inputs_ + from,
        unread_.data() + from, unread_.data() + inputs_ + from};
  }
  void list_entries() {
    count_ = 0;
    const int32_t *high_unread = unread_.data(), *low_unread = high_unread + inputs_;
    for (int64_t c = 0; c < inputs_; ++c) {
      entries_[count_] = static_cast<int32_t>(2 * c) + 1 + low_unread[c];
      count_ += 1 + high_unread[c];
    }
  }
  ChannelReads reads() const {
    const float* values = values_.get();
    return {values, values + tokens_ * inputs_, tokens_, inputs_, entries_.data(), count_};
  }

 private:
  int64_t tokens_, inputs_, count_ = 0;
  std::unique_ptr<float[]> values_;
  std::vector<int32_t> unread_, entries_;
};

constexpr int64_t grade_grain = 1 << 13;  // a thread's least share, in values

// For the tokens from `first` on, as many as `grades` has.
template <typename T>
Grades grade_tokens(
    const Request& request, const T* x, int64_t first, int64_t tokens,
    const SequenceRows& centers) {
  const ChannelInputs& shared = request.shared;
  const int64_t inputs = shared.inputs();
  const int64_t sequence_tokens = shared.tokens() / shared.sequences();
  const float* norm = shared.norm.const_data_ptr<float>();
  const float* low_norm = request.low_norm.const_data_ptr<float>();
  const float* limits = shared.threshold.const_data_ptr<float>();
  const int64_t limit_count = shared.threshold.numel();
  Grades grades(tokens, inputs);
  at::parallel_for(0, inputs, 1 + grade_grain / tokens, [&](int64_t begin, int64_t end) {
    for (int64_t n = 0; n < tokens; ++n) {
      const int64_t sequence = (first + n) / sequence_tokens;
      const float* center = centers.row(sequence);
      grade_token(
          x + (first + n) * inputs + begin, center ? center + begin : nullptr, norm + begin,
          low_norm + begin, limits[limit_count > 1 ? sequence : 0], end - begin,
          grades.token(n, begin));
    }
  });
  grades.list_entries();
  return grades;
}

void check(const Request& request) {
  const ChannelInputs& shared = request.shared;
  check_thresholds(op_name, shared);
  TORCH_CHECK_TYPE(
      request.low_norm.scalar_type() == at::kFloat, op_name, ": low_norm must be float32");
  TORCH_CHECK_VALUE(shared.x.dim() >= 1, op_name, " takes x [..., K], not ", shared.x.sizes());
  const int64_t inputs = shared.inputs();
  check_inputs(op_name, shared, inputs);
  TORCH_CHECK_VALUE(
      request.low_norm.sizes() == shared.norm.sizes(), op_name, ": low_norm is ",
      request.low_norm.sizes(), ", norm ", shared.norm.sizes());
  for (const Weight& weight : request.weights) {
    TORCH_CHECK_VALUE(weight.outputs >= 0, op_name, ": ", weight.outputs, " outputs");
    plane_rows(op_name, weight.packed, inputs, weight.outputs, weight.planes, !weight.scale);
    ScaleTensors(op_name, weight.scale, weight.zero, weight.outputs, inputs);
    check_bias(op_name, shared, weight.bias, weight.outputs);
  }
}

// Holds what the pointers of plane_gemv()'s outputs point to.
struct Prepared {
  ScaleTensors scales;
  Tensor bias;
};

// The outputs of the weights in one dim, one after the other. Tensors of `request` are contiguous.
template <typename T>
Tensor run_kernel(
    const Request& request, int64_t all_outputs, const SequenceRows& centers,
    const SequenceRows& bases) {
  const ChannelInputs& shared = request.shared;
  const int64_t inputs = shared.inputs(), all_tokens = shared.tokens();
  const int64_t sequence_tokens = all_tokens / shared.sequences();
  std::vector<Prepared> prepared;
  for (const Weight& weight : request.weights) {
    prepared.push_back(
        {ScaleTensors(op_name, weight.scale, weight.zero, weight.outputs, inputs),
         weight.bias ? weight.bias->contiguous() : Tensor()});
  }
  Tensor y = at::empty({all_tokens * all_outputs}, shared.x.options());
  T* start = y.data_ptr<T>();
  for (int64_t first = 0; first < all_tokens; first += max_tokens) {
    const int64_t tokens = std::min(max_tokens, all_tokens - first);
    const auto base_at = [&](int64_t offset) {
      return [&bases, sequence_tokens, first, offset](int64_t n) {
        const float* base = bases.row((first + n) / sequence_tokens);
        return base ? base + offset : nullptr;
      };
    };
    const Grades grades =
        grade_tokens<T>(request, shared.x.const_data_ptr<T>(), first, tokens, centers);
    std::vector<PlaneOutput<T>> outputs;
    for (size_t i = 0; i < prepared.size(); ++i) {
      const Weight& weight = request.weights[i];
      const Prepared& tensors = prepared[i];
      outputs.push_back(
          {plane_rows(op_name, weight.packed, inputs, weight.outputs, weight.planes, !weight.scale),
           tensors.scales.groups(), weight.bias ? tensors.bias.template const_data_ptr<T>() : nullptr,
           base_at(weight.offset), start + all_tokens * weight.offset + first * weight.outputs});
    }
    plane_gemv<T>(grades.reads(), outputs);
  }
  return y;
}

Tensor graded_linears(
    const Tensor& x, at::TensorList packed, const c10::List<MaybeTensor>& scales,
    const c10::List<MaybeTensor>& zeros, at::IntArrayRef outputs, at::IntArrayRef planes,
    const c10::List<MaybeTensor>& biases, const Tensor& norm, const Tensor& low_norm,
    const Tensor& threshold, const MaybeTensor& center, const MaybeTensor& base) {
  const size_t count = packed.size();
  TORCH_CHECK_VALUE(
      count > 0 && scales.size() == count && zeros.size() == count && outputs.size() == count &&
          planes.size() == count && biases.size() == count,
      op_name, ": lists of ", count, " packed, ", scales.size(), " scales, ", zeros.size(),
      " zeros, ", outputs.size(), " outputs, ", planes.size(), " planes and ", biases.size(),
      " biases do not go together");
  Request request{{x, norm, threshold, center, base}, low_norm, {}};
  int64_t all_outputs = 0;
  for (size_t i = 0; i < count; ++i) {
    request.weights.push_back(
        {packed[i], scales.get(i), zeros.get(i), biases.get(i), outputs[i], planes[i],
         all_outputs});
    all_outputs += outputs[i];
  }
  check(request);
  const ChannelInputs& shared = request.shared;
  const int64_t sequences = shared.sequences(), inputs = shared.inputs();
  const SequenceRows centers(op_name, "center", center, inputs, sequences);
  const SequenceRows bases(op_name, "base", base, all_outputs, sequences);
  if (!is_supported_dtype(x.scalar_type()) || x.numel() == 0) {
    static auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("popc::graded_linears_reference", "")
            .typed<Tensor(
                const Tensor&, at::TensorList, const c10::List<MaybeTensor>&,
                const c10::List<MaybeTensor>&, at::IntArrayRef, at::IntArrayRef,
                const c10::List<MaybeTensor>&, const Tensor&, const Tensor&, const Tensor&,
                const MaybeTensor&, const MaybeTensor&)>();
    return op.call(
        x, packed, scales, zeros, outputs, planes, biases, norm, low_norm, threshold, center,
        base);
  }
  const Tensor x_values = x.contiguous(), norms = norm.contiguous();
  const Tensor low_norms = low_norm.contiguous(), limits = threshold.contiguous();
  const Request contiguous{
      {x_values, norms, limits, center, base}, low_norms, request.weights};
  Tensor y;
  dispatch_dtype(x.scalar_type(), [&](auto zero) {
    y = run_kernel<decltype(zero)>(contiguous, all_outputs, centers, bases);
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(popc, CPU, m) { m.impl("graded_linears", graded_linears); }

}  // namespace popc::graded
