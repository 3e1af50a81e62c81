// Rows of quantised weights: see popc/ops/planes.py for the format.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "constants.h"
#include "dispatch.h"

namespace popc {

constexpr int64_t block_values = constants::block;
constexpr int64_t plane_bytes = block_values / 2;  // of a block in one plane
constexpr int64_t scale_bytes = 2;
constexpr int64_t block_dwords = 4;    // of a block in one plane
constexpr int64_t dword_nibbles = 8;

// Where the rows of a weight lie: of row r, the scales of its blocks and its planes.
struct PlaneRows {
  const uint8_t* scales;  // nullptr where they do not stand in rows
  const uint8_t* high;
  const uint8_t* low;  // nullptr where there is one plane
  int64_t stride;      // of all three, in bytes
  int64_t count;
  int64_t length;  // in values

  int64_t blocks() const { return (length + block_values - 1) / block_values; }
  bool has_low() const { return low != nullptr; }
  // The integer that stands for zero; where scales are apart, unless they say otherwise.
  float zero() const {
    if (has_low()) return static_cast<float>(constants::zero);
    return static_cast<float>(scales ? constants::plane_zero : constants::plane_group_zero);
  }
  // The bytes that a reading of all its planes takes.
  int64_t row_bytes() const {
    return blocks() * ((has_low() ? 2 : 1) * plane_bytes + (scales ? scale_bytes : 0));
  }
  // The same rows, blocks [first, last) of each.
  PlaneRows panel(int64_t first, int64_t last) const {
    PlaneRows part = *this;
    if (scales) part.scales += scale_bytes * first;
    part.high += plane_bytes * first;
    if (low) part.low += plane_bytes * first;
    part.length = std::min(length, last * block_values) - first * block_values;
    return part;
  }
};

// Scales that stand outside of rows, float32 [groups, outputs], each for `inputs` neighbouring
// channels; none where `scale` is nullptr. A zero of nullptr is that of the rows.
struct ScaleGroups {
  const float* scale = nullptr;
  const float* zero = nullptr;
  int64_t inputs = 0, outputs = 0;
};

// The same as tensors, checked and contiguous.
class ScaleTensors {
 public:
  ScaleTensors(
      const char* op, const MaybeTensor& scale, const MaybeTensor& zero, int64_t outputs,
      int64_t inputs) {
    TORCH_CHECK_VALUE(scale || !zero, op, ": a weight with scales in its rows has no zero");
    if (!scale) return;
    for (const Tensor& given : {*scale, zero.value_or(*scale)}) {
      TORCH_CHECK_VALUE(
          given.scalar_type() == at::kFloat && given.dim() == 2 && given.size(0) > 0 &&
              given.size(0) <= std::max<int64_t>(inputs, 1) && given.size(1) == outputs &&
              given.sizes() == scale->sizes(),
          op, ": scale and zero must be float32 [groups, ", outputs, "], not ",
          given.scalar_type(), " ", given.sizes());
    }
    scale_ = scale->contiguous();
    if (zero) zero_ = zero->contiguous();
    groups_ = {
        scale_.const_data_ptr<float>(), zero ? zero_.const_data_ptr<float>() : nullptr,
        (inputs + scale->size(0) - 1) / scale->size(0), outputs};
  }
  const ScaleGroups& groups() const { return groups_; }

 private:
  Tensor scale_, zero_;
  ScaleGroups groups_;
};

// `packed` [count, row bytes] as rows of `length` values; its rows must be contiguous.
inline PlaneRows plane_rows(
    const char* op, const Tensor& packed, int64_t count, int64_t length, int64_t planes,
    bool has_scales) {
  TORCH_CHECK_VALUE(planes == 1 || planes == 2, op, ": a weight has 1 or 2 planes, not ", planes);
  TORCH_CHECK_TYPE(
      packed.scalar_type() == at::kByte, op, ": packed must be uint8, not ", packed.scalar_type());
  PlaneRows rows{nullptr, nullptr, nullptr, 0, count, length};
  const int64_t blocks = rows.blocks();
  const int64_t bytes = blocks * (planes * plane_bytes + has_scales * scale_bytes);
  TORCH_CHECK_VALUE(
      packed.dim() == 2 && packed.size(0) == count && packed.size(1) == bytes &&
          packed.device().is_cpu(),
      op, ": packed must be [", count, ", ", bytes, "], not ", packed.sizes());
  TORCH_CHECK_VALUE(bytes == 0 || packed.stride(1) == 1, op, ": packed rows must be contiguous");
  const uint8_t* data = packed.const_data_ptr<uint8_t>();
  if (has_scales) rows.scales = data;
  rows.high = data + has_scales * scale_bytes * blocks;
  if (planes == 2) rows.low = rows.high + plane_bytes * blocks;
  rows.stride = packed.stride(0);
  return rows;
}

// bfloat16 at any address, as float32.
inline float load_scale(const uint8_t* from) {
  uint16_t bits;
  std::memcpy(&bits, from, sizeof(bits));
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

}  // namespace popc
