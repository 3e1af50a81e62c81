// popc::gather_linear on CPUs, for kernels that leave a case to it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace popc {

at::Tensor gather_linear(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& rows, const std::optional<at::Tensor>& columns,
    int64_t out_dim);

}  // namespace popc
