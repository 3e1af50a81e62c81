// The C++ entry point of popc::gather_linear, for kernels that fall back on it.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace popc {

Tensor gather_linear(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& rows,
    const MaybeTensor& columns, int64_t out_dim);

}  // namespace popc
