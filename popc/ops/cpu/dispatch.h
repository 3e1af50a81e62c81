// Which dtypes the kernels support, and dispatch on dtype and number of tokens.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <optional>
#include <type_traits>

namespace popc {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t max_tokens = 8;  // that share one pass over a weight

// Other dtypes run the op's reference.
inline bool is_supported_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}

// Whether ATen's GEMM in this dtype is faster than converting to float32.
inline bool has_fast_gemm(at::ScalarType dtype) {
#if defined(__aarch64__)
  return true;
#elif defined(__AVX512BW__)
  return dtype == at::kBFloat16 || dtype == at::kFloat;
#else
  return dtype == at::kFloat;
#endif
}

// run(T()) for the C++ type T of a supported dtype.
template <typename F>
void dispatch_dtype(at::ScalarType dtype, F&& run) {
  if (dtype == at::kFloat) return run(float());
  if (dtype == at::kBFloat16) return run(at::BFloat16());
  return run(at::Half());
}

// run(integral_constant<int, tokens>) for 1 to max_tokens tokens.
template <typename F>
void dispatch_tokens(int64_t tokens, F&& run) {
  switch (tokens) {
    case 1: return run(std::integral_constant<int, 1>());
    case 2: return run(std::integral_constant<int, 2>());
    case 3: return run(std::integral_constant<int, 3>());
    case 4: return run(std::integral_constant<int, 4>());
    case 5: return run(std::integral_constant<int, 5>());
    case 6: return run(std::integral_constant<int, 6>());
    case 7: return run(std::integral_constant<int, 7>());
    default: return run(std::integral_constant<int, 8>());
  }
}

}  // namespace popc
