// popc::select_units on CPUs. See popc/ops/select.py for what it means.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "dispatch.h"
#include "index_list.h"

namespace popc::select {
namespace {

// ‖h[tokens, columns]‖₂
template <typename T>
float norm_of(const T* h, int64_t tokens, int64_t width, const int64_t* columns, int64_t m) {
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

// A total order as an integer, the best first: NaN, then by score, then by index, so that ties are
// always broken in the same way.
uint64_t sort_key(float score, int64_t index) {
  uint32_t bits = 0xffffffff;
  if (!std::isnan(score)) {
    score += 0.0f;  // -0 becomes 0, which is equal
    std::memcpy(&bits, &score, sizeof bits);
    bits = bits >> 31 ? ~bits : bits | 0x80000000;  // unsigned integers in the order of floats
  }
  return static_cast<uint64_t>(~bits) << 32 | static_cast<uint64_t>(index);
}

// The columns of one sequence's active units: those of the `retained` first ones, then of the best
// candidates in the order of the list.
template <typename T>
void select_sequence(
    const T* h, int64_t tokens, int64_t width, const float* norm, const int64_t* columns,
    int64_t units, int64_t m, int64_t retained, int64_t active, int64_t* out) {
  std::copy_n(columns, retained * m, out);
  const int64_t count = active - retained;
  if (count == 0) return;
  std::vector<uint64_t> keys;
  keys.reserve(units - retained);
  for (int64_t u = retained; u < units; ++u) {
    keys.push_back(sort_key(norm[u] * norm_of(h, tokens, width, columns + u * m, m), u));
  }
  std::nth_element(keys.begin(), keys.begin() + count - 1, keys.end());
  std::vector<int64_t> best(count);
  for (int64_t i = 0; i < count; ++i) best[i] = keys[i] & 0xffffffff;
  std::sort(best.begin(), best.end());
  int64_t* to = out + retained * m;
  for (int64_t u : best) to = std::copy_n(columns + u * m, m, to);
}

void check(
    const Tensor& h, const Tensor& norm, const Tensor& columns, int64_t retained, int64_t active) {
  const bool shared = columns.dim() == 2;
  TORCH_CHECK_TYPE(
      columns.scalar_type() == at::kLong && norm.scalar_type() == at::kFloat,
      "popc::select_units: columns must be int64 and norm float32");
  TORCH_CHECK_VALUE(
      (shared || columns.dim() == 3) && norm.sizes() == columns.sizes().slice(0, columns.dim() - 1),
      "popc::select_units: columns ", columns.sizes(), " and norm ", norm.sizes(),
      " must be [n, m] and [n], with B before them or without");
  const int64_t units = columns.size(-2);
  TORCH_CHECK_VALUE(
      0 <= retained && retained <= active && active <= units, "popc::select_units: ", retained,
      " retained and ", active, " active of ", units, " units");
  TORCH_CHECK_VALUE(
      shared || h.size(0) == columns.size(0), "popc::select_units: lists for ", columns.size(0),
      " sequences do not fit h ", h.sizes());
}

Tensor select_units(
    const Tensor& h, const Tensor& norm, const Tensor& columns, int64_t retained, int64_t active) {
  check(h, norm, columns, retained, active);
  const int64_t units = columns.size(-2), m = columns.size(-1), width = h.size(-1);
  const int64_t sequences = columns.dim() == 2 ? 1 : columns.size(0);
  auto sizes = columns.sizes().vec();
  sizes.pop_back();
  sizes.back() = active * m;
  if (!is_supported_dtype(h.scalar_type())) {
    static auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("popc::select_units_reference", "")
            .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t)>();
    return op.call(h, norm, columns, retained, active);
  }
  const Tensor values = h.contiguous(), norms = norm.contiguous(), lists = columns.contiguous();
  const int64_t* indices = lists.const_data_ptr<int64_t>();
  check_indices(indices, lists.numel(), width, "columns");
  Tensor out = at::empty(sizes, columns.options());
  if (sequences == 0) return out;
  const int64_t tokens = values.numel() / std::max<int64_t>(1, width * sequences);
  dispatch_dtype(h.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    for (int64_t s = 0; s < sequences; ++s) {
      select_sequence<T>(
          values.const_data_ptr<T>() + s * tokens * width, tokens, width,
          norms.const_data_ptr<float>() + s * units, indices + s * units * m, units, m, retained,
          active, out.data_ptr<int64_t>() + s * active * m);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(popc, CPU, m) { m.impl("select_units", select_units); }

}  // namespace popc::select
