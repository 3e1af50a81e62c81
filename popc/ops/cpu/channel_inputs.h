// What ops that read some of a linear's input channels take besides the weight: popc::threshold_linear
// and popc::graded_linears.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>

#include "dispatch.h"

namespace popc {

// Float32 rows of `width` values, one for each sequence or one for all. They may be parts of longer
// ones, and are not copied then.
class SequenceRows {
 public:
  SequenceRows(
      const char* op, const char* name, const MaybeTensor& values, int64_t width,
      int64_t sequences) {
    if (!values) return;
    TORCH_CHECK_VALUE(
        values->scalar_type() == at::kFloat && values->dim() == 2 && values->size(1) == width &&
            (values->size(0) == 1 || values->size(0) == sequences),
        op, ": ", name, " must be float32 [1 or B, ", width, "], not ", values->scalar_type(), " ",
        values->sizes());
    values_ = values->stride(1) == 1 ? *values : values->contiguous();
    if (values->size(0) > 1) stride_ = values_.stride(0);
  }
  // nullptr where there are no values.
  const float* row(int64_t sequence) const {
    return values_.defined() ? values_.const_data_ptr<float>() + sequence * stride_ : nullptr;
  }

 private:
  Tensor values_;
  int64_t stride_ = 0;
};

// What linears of one input share.
struct ChannelInputs {
  const Tensor& x;
  const Tensor& norm;
  const Tensor& threshold;
  const MaybeTensor& center;
  const MaybeTensor& base;

  int64_t inputs() const { return x.size(-1); }
  int64_t tokens() const { return x.numel() / inputs(); }
  int64_t sequences() const { return x.dim() > 1 ? x.size(0) : 1; }
};

// Checks that a linear of `inputs` channels can take them.
inline void check_inputs(const char* op, const ChannelInputs& shared, int64_t inputs) {
  TORCH_CHECK_VALUE(
      shared.x.dim() >= 1 && shared.x.size(-1) == inputs && shared.norm.dim() == 1 &&
          shared.norm.numel() == inputs,
      op, ": x has ", shared.x.sizes(), " channels, norm ", shared.norm.sizes(), ", the weight ",
      inputs);
}

inline void check_bias(
    const char* op, const ChannelInputs& shared, const MaybeTensor& bias, int64_t outputs) {
  TORCH_CHECK_VALUE(
      !bias || (bias->scalar_type() == shared.x.scalar_type() && bias->numel() == outputs), op,
      ": the bias does not fit the weight");
}

inline void check_thresholds(const char* op, const ChannelInputs& shared) {
  const Tensor &x = shared.x, &threshold = shared.threshold;
  TORCH_CHECK_TYPE(
      shared.norm.scalar_type() == at::kFloat && threshold.scalar_type() == at::kFloat, op,
      ": norm and threshold must be float32");
  TORCH_CHECK_VALUE(
      threshold.dim() <= 1 &&
          (threshold.numel() == 1 || (x.dim() > 1 && threshold.numel() == x.size(0))),
      op, ": thresholds ", threshold.sizes(), " do not fit x ", x.sizes());
}

}  // namespace popc
