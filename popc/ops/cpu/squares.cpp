// popc::sum_squares on CPUs. See popc/ops/measure.py for what it means.

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "tokens.h"

namespace popc::statistics {
namespace {

Tensor sum_squares(const Tensor& h, const MaybeTensor& valid) {
  TORCH_CHECK_VALUE(h.dim() == 3, "popc::sum_squares takes h [B, T, K], not ", h.sizes());
  check_measured(h, valid);
  if (!is_served_type(h.scalar_type())) {
    Tensor squares = h.to(at::kDouble).square();
    if (valid) squares.masked_fill_(valid->unsqueeze(-1).logical_not(), 0.0);
    return squares.sum(1);
  }
  const int64_t width = h.size(2);
  Tensor out = at::zeros({h.size(0), width}, h.options().dtype(at::kDouble));
  by_sequence(h, valid, false, [&](int64_t b, const auto& tokens) {
    double* to = out.data_ptr<double>() + b * width;
    const int64_t found = tokens.size();
    in_parts(width, parts_for(found * width), [&](int64_t first, int64_t last, int64_t) {
      in_blocks<8>(found, [&](auto many, int64_t t) {
        for (int64_t i = first; i < last; ++i) {
          double squares = 0.0;
          each<decltype(many)::value>([&](auto n) {
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

}  // namespace popc::statistics
