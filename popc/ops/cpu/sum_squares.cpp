// popc::sum_squares on CPUs. See popc/ops/measure.py for what it means.

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cstdint>

#include "dispatch.h"
#include "valid_tokens.h"
#include "vec.h"

namespace popc::squares {
namespace {

constexpr int token_block = 8;  // tokens added up before the total is loaded and stored

Tensor sum_squares(const Tensor& h, const MaybeTensor& valid) {
  TORCH_CHECK_VALUE(h.dim() == 3, "popc::sum_squares takes h [B, T, K], not ", h.sizes());
  check_valid_mask(h, valid);
  if (!is_supported_dtype(h.scalar_type())) {
    Tensor squares = h.to(at::kDouble).square();
    if (valid) squares.masked_fill_(valid->unsqueeze(-1).logical_not(), 0.0);
    return squares.sum(1);
  }
  const int64_t width = h.size(2);
  Tensor out = at::zeros({h.size(0), width}, h.options().dtype(at::kDouble));
  for_each_sequence(h, valid, false, [&](int64_t b, const auto& tokens) {
    double* to = out.data_ptr<double>() + b * width;
    const int64_t count = tokens.size();
    const int64_t parts = channel_parts(count * width);
    parallel_over_channels(width, parts, [&](int64_t first, int64_t last, int64_t) {
      for_token_blocks<token_block>(count, [&](auto size, int64_t t) {
        for (int64_t i = first; i < last; ++i) {
          double squares = 0.0;
          unroll<decltype(size)::value>([&](auto n) {
            const double value = static_cast<float>(tokens.rows[t + n][i]);
            squares += value * value;
          });
          to[i] += squares;
        }
      });
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(popc, CPU, m) { m.impl("sum_squares", sum_squares); }

}  // namespace popc::squares
