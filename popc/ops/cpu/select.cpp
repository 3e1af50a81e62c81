// popc::select_units on CPUs. See popc/ops/select.py for what it means.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace popc::select {
namespace {

using at::Tensor;

// ‖h[tokens, columns]‖₂
template <typename T>
float size_of(const T* h, int64_t tokens, int64_t width, const int64_t* columns, int64_t m) {
  if (tokens == 1 && m == 1) return std::fabs(static_cast<float>(h[columns[0]]));
  float total = 0.0f;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < m; ++j) {
      const float value = static_cast<float>(h[t * width + columns[j]]);
      total += value * value;
    }
  }
  return std::sqrt(total);
}

// A total order as one number, the best first: NaN, then by score, then by place. So the choice is
// the same every time.
uint64_t key_of(float score, int64_t place) {
  uint32_t bits = 0xffffffff;
  if (!std::isnan(score)) {
    score += 0.0f;  // of -0 and 0, which are equal, one
    std::memcpy(&bits, &score, sizeof bits);
    bits = bits >> 31 ? ~bits : bits | 0x80000000;  // floats by size as unsigned ones
  }
  return static_cast<uint64_t>(~bits) << 32 | static_cast<uint64_t>(place);
}

// The active units' columns of one sequence: R, then the best of C in the order of the list.
template <typename T>
void select_one(
    const T* h, int64_t tokens, int64_t width, const float* norm, const int64_t* columns,
    int64_t units, int64_t m, int64_t retained, int64_t active, int64_t* out) {
  std::copy_n(columns, retained * m, out);
  const int64_t wanted = active - retained;
  if (wanted == 0) return;
  std::vector<uint64_t> keys;
  keys.reserve(units - retained);
  for (int64_t u = retained; u < units; ++u) {
    keys.push_back(key_of(norm[u] * size_of(h, tokens, width, columns + u * m, m), u));
  }
  std::nth_element(keys.begin(), keys.begin() + wanted - 1, keys.end());
  std::vector<int64_t> order(wanted);
  for (int64_t i = 0; i < wanted; ++i) order[i] = keys[i] & 0xffffffff;
  std::sort(order.begin(), order.end());
  int64_t* to = out + retained * m;
  for (int64_t u : order) to = std::copy_n(columns + u * m, m, to);
}

Tensor select_units(
    const Tensor& h, const Tensor& norm, const Tensor& columns, int64_t retained, int64_t active) {
  const bool shared = columns.dim() == 2;
  TORCH_CHECK_TYPE(
      columns.scalar_type() == at::kLong && norm.scalar_type() == at::kFloat,
      "popc::select_units: columns must be int64 and norm float32");
  TORCH_CHECK_VALUE(
      (shared || columns.dim() == 3) && norm.sizes() == columns.sizes().slice(0, columns.dim() - 1),
      "popc::select_units: columns ", columns.sizes(), " and norm ", norm.sizes(),
      " must be [n, m] and [n], with B before them or without");
  const int64_t units = columns.size(-2), m = columns.size(-1), width = h.size(-1);
  TORCH_CHECK_VALUE(
      0 <= retained && retained <= active && active <= units, "popc::select_units: ", retained,
      " retained and ", active, " active of ", units, " units");
  const int64_t sequences = shared ? 1 : columns.size(0);
  TORCH_CHECK_VALUE(
      shared || h.size(0) == sequences, "popc::select_units: lists for ", sequences,
      " sequences do not fit h ", h.sizes());
  auto sizes = columns.sizes().vec();
  sizes.pop_back();
  sizes.back() = active * m;
  if (!is_served_type(h.scalar_type())) {
    static auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("popc::select_units_reference", "")
            .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t)>();
    return op.call(h, norm, columns, retained, active);
  }
  const Tensor values = h.contiguous(), norms = norm.contiguous(), listed = columns.contiguous();
  const int64_t* list = listed.const_data_ptr<int64_t>();
  check_channels(list, listed.numel(), width, "columns");
  Tensor out = at::empty(sizes, columns.options());
  if (sequences == 0) return out;
  const int64_t tokens = values.numel() / std::max<int64_t>(1, width * sequences);
  by_type(h.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    for (int64_t s = 0; s < sequences; ++s) {
      select_one<T>(
          values.const_data_ptr<T>() + s * tokens * width, tokens, width,
          norms.const_data_ptr<float>() + s * units, list + s * units * m, units, m, retained,
          active, out.data_ptr<int64_t>() + s * active * m);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(popc, CPU, m) { m.impl("select_units", select_units); }

}  // namespace popc::select
