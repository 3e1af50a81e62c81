// An attention mask as lists of the keys that are visible, for each head of keys and values.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "dispatch.h"

namespace popc::attention {

constexpr float hidden = -std::numeric_limits<float>::infinity();  // score of a masked key

struct Sizes {
  int64_t batch, heads, kv_heads, keys, head_dim, value_dim;

  int64_t queries() const { return heads / kv_heads; }  // that share a head of keys and values
};

// The keys that any query sees, and what the mask adds to each query's scores of them.
struct VisibleKeys {
  std::vector<int64_t> keys;
  std::vector<float> bias;  // [queries, keys.size()]; empty where all is 0
  int64_t queries = 0;      // 1 where the mask is the same for all

  int64_t size() const { return static_cast<int64_t>(keys.size()); }
  const float* bias_of(int64_t query) const {
    return bias.empty() ? nullptr : bias.data() + (queries > 1 ? query * size() : 0);
  }
};

// The mask's values for the queries of one head of keys.
template <typename M>
struct MaskView {
  const M* data;
  int64_t query_stride, key_stride;

  float bias(int64_t query, int64_t key) const {
    const M value = data[query * query_stride + key * key_stride];
    if constexpr (std::is_same_v<M, bool>) return value ? 0.0f : hidden;
    return static_cast<float>(value);
  }
};

template <typename M>
VisibleKeys find_visible_keys(const MaskView<M>& mask, int64_t queries, int64_t keys) {
  VisibleKeys visible;
  visible.queries = queries;
  visible.keys.resize(keys);
  int64_t count = 0;
  bool has_bias = false;
  for (int64_t i = 0; i < keys; ++i) {  // branch-free: branches would be mispredicted
    bool any = false;
    for (int64_t n = 0; n < queries; ++n) {
      const float bias = mask.bias(n, i);
      any |= bias != hidden;
      has_bias |= bias != hidden && bias != 0.0f;
    }
    visible.keys[count] = i;
    count += any;
  }
  visible.keys.resize(count);
  for (int64_t n = 0; n < queries; ++n) {
    // A key that one query sees and another does not must be hidden from that one.
    for (int64_t i : visible.keys) has_bias |= mask.bias(n, i) == hidden;
  }
  for (int64_t n = 0; has_bias && n < queries; ++n) {
    for (int64_t i : visible.keys) visible.bias.push_back(mask.bias(n, i));
  }
  return visible;
}

// The visible keys of each head of keys and sequence, or of all that share a mask.
struct Visibility {
  std::vector<VisibleKeys> lists;
  int64_t sequence_stride = 0, head_stride = 0;

  const VisibleKeys& of(int64_t sequence, int64_t kv_head) const {
    return lists[sequence * sequence_stride + kv_head * head_stride];
  }
};

// The mask's stride along a dim, counted from the last; 0 where it is broadcast along it.
inline int64_t broadcast_stride(const Tensor& mask, int64_t from_last, int64_t size) {
  const int64_t dim = mask.dim() - 1 - from_last;
  if (dim < 0 || mask.size(dim) == 1) return 0;
  TORCH_CHECK_VALUE(
      mask.size(dim) == size, "popc::attend: a mask ", mask.sizes(), " does not fit ", size,
      " in dim ", -1 - from_last);
  return mask.stride(dim);
}

inline Visibility find_visibility(const MaybeTensor& mask, const Sizes& sizes) {
  Visibility visibility;
  if (!mask) {
    visibility.lists.resize(1);
    visibility.lists[0].keys.resize(sizes.keys);
    std::iota(visibility.lists[0].keys.begin(), visibility.lists[0].keys.end(), 0);
    return visibility;
  }
  const int64_t key_stride = broadcast_stride(*mask, 0, sizes.keys);
  const int64_t head_stride = broadcast_stride(*mask, 2, sizes.heads);
  const int64_t sequence_stride = broadcast_stride(*mask, 3, sizes.batch);
  broadcast_stride(*mask, 1, 1);  // one token
  const int64_t kv_heads = head_stride ? sizes.kv_heads : 1;
  const int64_t queries = head_stride ? sizes.queries() : 1;
  visibility.head_stride = head_stride ? 1 : 0;
  visibility.sequence_stride = sequence_stride ? kv_heads : 0;
  visibility.lists.resize((sequence_stride ? sizes.batch : 1) * kv_heads);
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / (queries * sizes.keys));
  const auto find = [&](auto type) {
    using M = decltype(type);
    const M* data = mask->const_data_ptr<M>();
    at::parallel_for(0, visibility.lists.size(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t sequence = i / kv_heads, head = i % kv_heads * queries;
        const M* from = data + sequence * sequence_stride + head * head_stride;
        visibility.lists[i] =
            find_visible_keys(MaskView<M>{from, head_stride, key_stride}, queries, sizes.keys);
      }
    });
  };
  if (mask->scalar_type() == at::kBool) {
    find(false);
  } else {
    dispatch_dtype(mask->scalar_type(), find);
  }
  return visibility;
}

}  // namespace popc::attention
