// The tokens of a prompt that are measured, and how threads share their channels.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "lines.h"

namespace popc::statistics {

inline void check_measured(const Tensor& x, const MaybeTensor& valid) {
  TORCH_CHECK_VALUE(
      !valid || (valid->scalar_type() == at::kBool && valid->sizes() == x.sizes().slice(0, 2)),
      "popc: valid must be bool [B, T] for ", x.sizes());
}

// run(first, last, part) for `parts` shares of the channels, in parallel: no thread adds into
// another's, and the order of a sum over tokens is always the same.
template <typename F>
void in_parts(int64_t width, int64_t parts, F&& run) {
  const auto edge = [&](int64_t p) {
    return p == parts ? width : width / lanes * p / parts * lanes;
  };
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) run(edge(p), edge(p + 1), p);
  });
}

inline int64_t parts_for(int64_t values) {
  if (at::in_parallel_region()) return 1;
  return std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), values >> 14));
}

// The tokens that count, position by position.
template <typename T>
struct ValidTokens {
  std::vector<const T*> rows;
  std::vector<int64_t> ends;  // of each position: how many rows are of it and of earlier ones

  int64_t size() const { return rows.size(); }
};

// Those of `sequences` sequences x [B, T, K] that are measured as one: all, or those marked.
template <typename T>
ValidTokens<T> valid_tokens(
    const T* x, int64_t sequences, int64_t tokens, int64_t width, const bool* marks) {
  ValidTokens<T> found;
  found.rows.reserve(sequences * tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t at = t; at < sequences * tokens; at += tokens) {
      if (!marks || marks[at]) found.rows.push_back(x + at * width);
    }
    found.ends.push_back(found.size());
  }
  return found;
}

// run(N, t) for each N tokens from t on, then run(1, t) for each of the rest.
template <int N, typename F>
void in_blocks(int64_t tokens, F&& run) {
  int64_t t = 0;
  for (; t + N <= tokens; t += N) run(std::integral_constant<int, N>(), t);
  for (; t < tokens; ++t) run(std::integral_constant<int, 1>(), t);
}

// run(s, tokens) for each of x [B, T, K]'s sequences, or once for all of them.
template <typename F>
void by_sequence(const Tensor& x, const MaybeTensor& valid, bool together, F&& run) {
  const int64_t tokens = x.size(1), width = x.size(2);
  const int64_t many = together ? 1 : x.size(0), each = together ? x.size(0) : 1;
  const Tensor given = x.contiguous(), marks = valid ? valid->contiguous() : Tensor();
  by_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    for (int64_t s = 0; s < many; ++s) {
      const bool* of = valid ? marks.const_data_ptr<bool>() + s * tokens : nullptr;
      const T* from = given.const_data_ptr<T>() + s * tokens * width;
      run(s, valid_tokens(from, each, tokens, width, of));
    }
  });
}

}  // namespace popc::statistics
