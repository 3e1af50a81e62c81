// The prompt's tokens that statistics are taken of, and loops over tokens, channels and sequences.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "vec.h"

namespace popc {

inline void check_valid_mask(const Tensor& x, const MaybeTensor& valid) {
  TORCH_CHECK_VALUE(
      !valid || (valid->scalar_type() == at::kBool && valid->sizes() == x.sizes().slice(0, 2)),
      "popc: valid must be bool [B, T] for ", x.sizes());
}

// How many parts to split the channels into, for so many values of all tokens.
inline int64_t channel_parts(int64_t values) {
  if (at::in_parallel_region()) return 1;
  return std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), values >> 14));
}

// run(first, last, part) for each part of the channels, in parallel. No two threads add to one
// channel, so a sum over tokens is always taken in the same order.
template <typename F>
void parallel_over_channels(int64_t width, int64_t parts, F&& run) {
  const auto edge = [&](int64_t p) {
    return p == parts ? width : width / lanes * p / parts * lanes;
  };
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) run(edge(p), edge(p + 1), p);
  });
}

// The valid tokens in the order of their positions: all sequences' first, then their second, ...
template <typename T>
struct ValidTokens {
  std::vector<const T*> rows;
  std::vector<int64_t> position_ends;  // of each position, the end of its tokens in `rows`

  int64_t size() const { return rows.size(); }
};

// Of x [sequences, tokens, width] those where valid [sequences, tokens], or all if that is nullptr.
template <typename T>
ValidTokens<T> collect_valid_tokens(
    const T* x, int64_t sequences, int64_t tokens, int64_t width, const bool* valid) {
  ValidTokens<T> collected;
  collected.rows.reserve(sequences * tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = t; i < sequences * tokens; i += tokens) {
      if (!valid || valid[i]) collected.rows.push_back(x + i * width);
    }
    collected.position_ends.push_back(collected.size());
  }
  return collected;
}

// run(integral_constant<int, N>, t) for blocks of N tokens from t on, and of one for the tail.
template <int N, typename F>
void for_token_blocks(int64_t tokens, F&& run) {
  int64_t t = 0;
  for (; t + N <= tokens; t += N) run(std::integral_constant<int, N>(), t);
  for (; t < tokens; ++t) run(std::integral_constant<int, 1>(), t);
}

// run(s, valid tokens) for each sequence s of x [B, T, K], or once for all of them if `pooled`.
template <typename F>
void for_each_sequence(const Tensor& x, const MaybeTensor& valid, bool pooled, F&& run) {
  const int64_t tokens = x.size(1), width = x.size(2);
  const int64_t groups = pooled ? 1 : x.size(0), group_size = pooled ? x.size(0) : 1;
  const Tensor values = x.contiguous(), mask = valid ? valid->contiguous() : Tensor();
  dispatch_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    for (int64_t s = 0; s < groups; ++s) {
      const bool* marks = valid ? mask.const_data_ptr<bool>() + s * tokens : nullptr;
      const T* from = values.const_data_ptr<T>() + s * tokens * width;
      run(s, collect_valid_tokens(from, group_size, tokens, width, marks));
    }
  });
}

}  // namespace popc
