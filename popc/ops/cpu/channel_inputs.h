// What ops that read some of a linear's input channels take besides the weight: popc::threshold_linear
// and popc::graded_linears.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>

#include "dispatch.h"

namespace popc {

// A slice `[offset:offset + width]` of a float32 row, of one for each sequence or one for all.
class SequenceRows {
 public:
  SequenceRows(
      const char* op, const char* name, const MaybeTensor& values, int64_t offset, int64_t width,
      int64_t sequences)
      : offset_(offset) {
    if (!values) return;
    TORCH_CHECK_VALUE(
        values->scalar_type() == at::kFloat && values->dim() == 2 && offset >= 0 &&
            offset + width <= values->size(1) &&
            (values->size(0) == 1 || values->size(0) == sequences),
        op, ": ", name, " must be float32 [1 or B, ", offset + width,
        " or more], not ", values->scalar_type(), " ", values->sizes());
    values_ = values->contiguous();
    if (values->size(0) > 1) stride_ = values->size(1);
  }
  // nullptr where there are no values.
  const float* row(int64_t sequence) const {
    return values_.defined() ? values_.const_data_ptr<float>() + sequence * stride_ + offset_
                             : nullptr;
  }

 private:
  Tensor values_;
  int64_t offset_ = 0, stride_ = 0;
};

// What linears of one input share, and where their part of it begins.
struct ChannelInputs {
  const Tensor& x;
  const Tensor& norm;
  const Tensor& threshold;
  const MaybeTensor& center;
  const MaybeTensor& base;
  int64_t group, channel, output;

  int64_t inputs() const { return x.size(-1); }
  int64_t tokens() const { return x.numel() / inputs(); }
  int64_t sequences() const { return x.dim() > 1 ? x.size(0) : 1; }
  int64_t limit_count() const { return threshold.dim() > 0 ? threshold.size(-1) : 1; }
};

// Checks that a linear of `inputs` channels can take them.
inline void check_inputs(const char* op, const ChannelInputs& shared, int64_t inputs) {
  TORCH_CHECK_VALUE(
      shared.x.dim() >= 1 && shared.x.size(-1) == inputs && shared.channel >= 0 &&
          shared.norm.dim() == 1 && shared.channel + inputs <= shared.norm.numel(),
      op, ": x has ", shared.x.sizes(), " channels, norm ", shared.norm.sizes(), " from ",
      shared.channel, " on, the weight ", inputs);
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
  const int64_t count = shared.limit_count();
  const int64_t groups = threshold.dim() > 1 ? threshold.size(0) : 1;
  TORCH_CHECK_VALUE(
      threshold.dim() <= 2 && (count == 1 || (x.dim() > 1 && count == x.size(0))) &&
          shared.group >= 0 && shared.group < groups,
      op, ": thresholds ", threshold.sizes(), " do not fit x ", x.sizes(), " of group ",
      shared.group);
}

}  // namespace popc
