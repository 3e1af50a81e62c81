// popc::attend on CPUs: one token's attention. See popc/ops/attend.py for what it means.
//
// Keys and values are read once for all query heads that share them, those that no query sees not
// at all. Each thread takes the same number of keys, whichever heads and sequences they are of; a
// softmax over some of the keys is a `Part`, and parts of the same keys' head add up.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "lines.h"

namespace popc::attention {
namespace {

constexpr int64_t keys_at_once = 64;  // their keys and values stay in the first cache
constexpr float none = -std::numeric_limits<float>::infinity();

// Which keys some query sees, and what the mask adds to each query's scores of them.
struct Seen {
  std::vector<int64_t> at;
  std::vector<float> plus;  // [queries, at.size()]; empty where all is 0
  int64_t queries = 0;      // 1 where the mask is the same for all

  int64_t size() const { return static_cast<int64_t>(at.size()); }
  const float* of(int64_t query) const {
    return plus.empty() ? nullptr : plus.data() + (queries > 1 ? query * size() : 0);
  }
};

// What a mask's value adds to a score: a bool says whether it counts.
template <typename M>
float plus_of(M value) {
  if constexpr (std::is_same_v<M, bool>) return value ? 0.0f : none;
  return static_cast<float>(value);
}

// A mask as it lies: of some queries that share keys.
template <typename M>
struct MaskRows {
  const M* data;
  int64_t by_query, by_key;

  float plus(int64_t query, int64_t key) const {
    return plus_of(data[query * by_query + key * by_key]);
  }
};

template <typename M>
Seen seen_of(const MaskRows<M>& rows, int64_t queries, int64_t keys) {
  Seen seen;
  seen.queries = queries;
  seen.at.resize(keys);
  int64_t count = 0;
  bool adds = false;
  for (int64_t i = 0; i < keys; ++i) {  // no branch: none could be foretold
    bool any = false;
    for (int64_t n = 0; n < queries; ++n) {
      const float plus = rows.plus(n, i);
      any |= plus != none;
      adds |= plus != none && plus != 0.0f;
    }
    seen.at[count] = i;
    count += any;
  }
  seen.at.resize(count);
  for (int64_t n = 0; n < queries; ++n) {
    // A key that one query sees and another does not has to be hidden from that one.
    for (int64_t i : seen.at) adds |= rows.plus(n, i) == none;
  }
  for (int64_t n = 0; adds && n < queries; ++n) {
    for (int64_t i : seen.at) seen.plus.push_back(rows.plus(n, i));
  }
  return seen;
}

struct Sizes {
  int64_t batch, heads, groups, keys, inner, outer;  // groups: heads of keys and values

  int64_t queries() const { return heads / groups; }
};

// What each head of keys shows: of each sequence, or of all where the mask is the same for all.
struct Mask {
  std::vector<Seen> seen;
  int64_t by_sequence = 0, by_group = 0;

  const Seen& of(int64_t sequence, int64_t group) const {
    return seen[sequence * by_sequence + group * by_group];
  }
};

// How far apart the mask's values are along a dim, counted from the last; 0 where it has one for
// all.
int64_t stride_along(const Tensor& mask, int64_t from_last, int64_t size) {
  const int64_t dim = mask.dim() - 1 - from_last;
  if (dim < 0 || mask.size(dim) == 1) return 0;
  TORCH_CHECK_VALUE(
      mask.size(dim) == size, "popc::attend: a mask ", mask.sizes(), " does not fit ", size,
      " in dim ", -1 - from_last);
  return mask.stride(dim);
}

Mask mask_of(const MaybeTensor& given, const Sizes& sizes) {
  Mask mask;
  if (!given) {
    mask.seen.resize(1);
    mask.seen[0].at.resize(sizes.keys);
    std::iota(mask.seen[0].at.begin(), mask.seen[0].at.end(), 0);
    return mask;
  }
  const int64_t by_key = stride_along(*given, 0, sizes.keys);
  const int64_t by_head = stride_along(*given, 2, sizes.heads);
  const int64_t by_sequence = stride_along(*given, 3, sizes.batch);
  stride_along(*given, 1, 1);  // one token
  const int64_t groups = by_head ? sizes.groups : 1, queries = by_head ? sizes.queries() : 1;
  mask.by_group = by_head ? 1 : 0;
  mask.by_sequence = by_sequence ? groups : 0;
  mask.seen.resize((by_sequence ? sizes.batch : 1) * groups);
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / (queries * sizes.keys));
  const auto look = [&](auto type) {
    using M = decltype(type);
    const M* data = given->const_data_ptr<M>();
    at::parallel_for(0, mask.seen.size(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const M* from = data + i / groups * by_sequence + i % groups * queries * by_head;
        mask.seen[i] = seen_of(MaskRows<M>{from, by_head, by_key}, queries, sizes.keys);
      }
    });
  };
  if (given->scalar_type() == at::kBool) {
    look(false);
  } else {
    by_type(given->scalar_type(), look);
  }
  return mask;
}

// A softmax over some keys, not yet divided: of `queries` queries, `outer` values each.
struct Part {
  float* sums;   // [queries, outer], in the order of load_pair
  float* most;   // [queries], the largest score
  float* total;  // [queries], of exp(score - most)
};

// The larger one; a NaN, if `b` is one.
float larger(float a, float b) { return b <= a ? a : b; }

void scale(float* __restrict values, int64_t n, float by) {
  for (int64_t i = 0; i < n; ++i) values[i] *= by;
}

// Scores to exp(score - most), where most is the largest so far; what is held shrinks with it.
template <int N>
void soften(float (*scores)[keys_at_once], int64_t count, const Part& part, int64_t outer) {
  for (int n = 0; n < N; ++n) {
    float* row = scores[n];
    for (int64_t i = count; i < keys_at_once; ++i) row[i] = none;
    Lanes top(none);
    for (int64_t i = 0; i < keys_at_once; i += lanes) {
      top = at::vec::maximum(top, Lanes::loadu(row + i));
    }
    const float most = larger(
        part.most[n],
        at::vec::vec_reduce_all<float>([](Lanes a, Lanes b) { return at::vec::maximum(a, b); }, top));
    if (most == none) {
      std::fill_n(row, keys_at_once, 0.0f);
      continue;
    }
    if (most != part.most[n]) {
      const float by = std::exp(part.most[n] - most);
      scale(part.sums + n * outer, outer, by);
      part.total[n] *= by;
      part.most[n] = most;
    }
    Lanes total(0.0f);
    for (int64_t i = 0; i < keys_at_once; i += lanes) {
      const Lanes value = (Lanes::loadu(row + i) - Lanes(most)).exp();
      value.store(row + i);
      total = total + value;
    }
    part.total[n] += sum(total);
  }
}

// N queries that share keys and values.
template <typename T>
struct Queries {
  const float* wide;  // [N, inner], in the order of load_pair
  const T* stored;
};

// N queries' share of `count` keys, at most keys_at_once.
template <typename T, int N>
void attend_keys(
    const Queries<T>& q, const T* const* keys, const T* const* values, const T* const* next,
    int64_t count, const Sizes& sizes, float by, const float* const* plus, const Part& part) {
  float scores[N][keys_at_once];
  const auto score = [&](auto rows, int64_t i) {
    constexpr int R = decltype(rows)::value;
    float out[R][N];
    const Next<T> after{values + i, sizes.outer};
    dot<T, N, R>(q.wide, q.stored, sizes.inner, keys + i, after, out);
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) scores[n][i + r] = by * out[r][n];
    }
  };
  constexpr int R = rows_at_once<N>;
  int64_t i = 0;
  for (; i + R <= count; i += R) score(std::integral_constant<int, R>(), i);
  for (; i < count; ++i) score(std::integral_constant<int, 1>(), i);
  for (int n = 0; n < N; ++n) {
    if (plus[n]) add(plus[n], count, scores[n]);
  }
  soften<N>(scores, count, part, sizes.outer);
  float weights[keys_at_once][most_tokens];
  for (int n = 0; n < N; ++n) {
    for (int64_t j = 0; j < count; ++j) weights[j][n] = scores[n][j];
  }
  constexpr int A = rows_added<N>;
  for (i = 0; i + A <= count; i += A) {
    add_scaled<T, N, A>(values + i, {next + i, sizes.inner}, weights + i, sizes.outer, part.sums);
  }
  for (; i < count; ++i) {
    add_scaled<T, N, 1>(values + i, {next + i, sizes.inner}, weights + i, sizes.outer, part.sums);
  }
}

// Where one head of keys and values lies.
template <typename T>
struct Head {
  const T* data;
  int64_t stride;

  Head(const Tensor& whole, int64_t sequence, int64_t group)
      : data(whole.const_data_ptr<T>() + sequence * whole.stride(0) + group * whole.stride(1)),
        stride(whole.stride(2)) {}
  const T* row(int64_t key) const { return data + key * stride; }
};

// The queries of one head of keys, over keys `first` to `last` of those seen.
template <typename T>
void attend_part(
    const Queries<T>& q, const Head<T>& keys, const Head<T>& values, const Seen& seen,
    int64_t first, int64_t last, const Sizes& sizes, float by, const Part& part) {
  const T* key_rows[keys_at_once];
  const T* value_rows[keys_at_once];
  const T* next_rows[keys_at_once];
  for (int64_t at = first; at < last; at += keys_at_once) {
    const int64_t count = std::min(keys_at_once, last - at);
    for (int64_t i = 0; i < count; ++i) {
      key_rows[i] = keys.row(seen.at[at + i]);
      value_rows[i] = values.row(seen.at[at + i]);
      next_rows[i] = at + count + i < last ? keys.row(seen.at[at + count + i]) : key_rows[i];
    }
    for (int64_t n = 0; n < sizes.queries(); n += most_tokens) {
      const int64_t some = std::min(most_tokens, sizes.queries() - n);
      const float* plus[most_tokens];
      for (int64_t i = 0; i < some; ++i) {
        const float* row = seen.of(n + i);
        plus[i] = row ? row + at : nullptr;
      }
      const Queries<T> these{q.wide + n * sizes.inner, q.stored + n * sizes.inner};
      const Part to{part.sums + n * sizes.outer, part.most + n, part.total + n};
      by_tokens(some, [&](auto number) {
        constexpr int N = decltype(number)::value;
        attend_keys<T, N>(these, key_rows, value_rows, next_rows, count, sizes, by, plus, to);
      });
    }
  }
}

// One softmax of several parts: into the first.
void join(const Part& into, const Part& other, int64_t queries, int64_t outer) {
  for (int64_t n = 0; n < queries; ++n) {
    const float most = larger(into.most[n], other.most[n]);
    if (most == none) continue;
    const float mine = std::exp(into.most[n] - most), its = std::exp(other.most[n] - most);
    float* __restrict sums = into.sums + n * outer;
    const float* __restrict more = other.sums + n * outer;
    for (int64_t i = 0; i < outer; ++i) sums[i] = mine * sums[i] + its * more[i];
    into.total[n] = mine * into.total[n] + its * other.total[n];
    into.most[n] = most;
  }
}

template <typename T>
void attend_all(
    const Tensor& q, const Tensor& k, const Tensor& v, const Mask& mask, float by,
    const Sizes& sizes, T* y) {
  const int64_t items = sizes.batch * sizes.groups, queries = sizes.queries();
  std::vector<int64_t> starts(items + 1, 0);  // of each item's keys among all that are read
  for (int64_t i = 0; i < items; ++i) {
    starts[i + 1] = starts[i] + mask.of(i / sizes.groups, i % sizes.groups).size();
  }
  const int64_t total = starts[items];
  const int64_t threads = threads_for(total, (sizes.inner + sizes.outer) * sizeof(T));
  const auto first_of = [&](int64_t thread) { return total * thread / threads; };
  // Items of a thread follow each other, and two threads share one at most: item + thread is a
  // part's own number.
  const int64_t parts = items + threads;
  std::vector<float> sums(parts * queries * sizes.outer, 0.0f), totals(parts * queries, 0.0f);
  std::vector<float> most(parts * queries, none);
  const auto part_of = [&](int64_t number) {
    const int64_t at = number * queries;
    return Part{sums.data() + at * sizes.outer, most.data() + at, totals.data() + at};
  };
  const T* stored = q.const_data_ptr<T>();
  std::vector<float> wide(q.numel());
  for (int64_t i = 0; i < sizes.batch * sizes.heads; ++i) {
    widen(stored + i * sizes.inner, wide.data() + i * sizes.inner, sizes.inner);
  }
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = first_of(t), last = first_of(t + 1);
      int64_t item = std::upper_bound(starts.begin(), starts.end(), first) - starts.begin() - 1;
      for (; item < items && starts[item] < last; ++item) {
        const int64_t sequence = item / sizes.groups, group = item % sizes.groups;
        const int64_t at = item * queries * sizes.inner;
        attend_part<T>(
            {wide.data() + at, stored + at}, Head<T>(k, sequence, group),
            Head<T>(v, sequence, group), mask.of(sequence, group),
            std::max(first, starts[item]) - starts[item],
            std::min(last, starts[item + 1]) - starts[item], sizes, by, part_of(item + t));
      }
    }
  });
  int64_t thread = 0;
  for (int64_t item = 0; item < items; ++item) {
    while (thread + 1 < threads && first_of(thread + 1) <= starts[item]) ++thread;
    const Part whole = part_of(item + thread);
    for (int64_t t = thread + 1; t < threads && first_of(t) < starts[item + 1]; ++t) {
      join(whole, part_of(item + t), queries, sizes.outer);
    }
    for (int64_t n = 0; n < queries; ++n) {
      float* row = whole.sums + n * sizes.outer;
      // No key seen: ATen gives zeros.
      scale(row, sizes.outer, whole.total[n] == 0.0f ? 0.0f : 1.0f / whole.total[n]);
      T* to = y + (item * queries + n) * sizes.outer;
      write<T>(row, sizes.outer, nullptr, nullptr, to);
    }
  }
}

bool is_served_attention(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& mask) {
  const auto type = q.scalar_type();
  const auto fits = [&](const Tensor& t) {
    return t.device().is_cpu() && t.scalar_type() == type && t.dim() == 4 && t.numel() > 0;
  };
  if (!fits(q) || !fits(k) || !fits(v) || q.size(2) != 1 || !is_served_type(type)) return false;
  if (mask && mask->scalar_type() != at::kBool && !is_served_type(mask->scalar_type())) return false;
  if (mask && mask->dim() > 4) return false;
  const bool dense = (k.stride(3) == 1 || k.size(3) == 1) && (v.stride(3) == 1 || v.size(3) == 1);
  return dense && k.size(0) == q.size(0) && v.size(0) == q.size(0) && k.size(1) == v.size(1) &&
      q.size(1) % k.size(1) == 0 && k.size(2) == v.size(2) && k.size(3) == q.size(3);
}

Tensor attend(
    const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& mask,
    std::optional<double> scale) {
  TORCH_CHECK_VALUE(
      k.dim() < 2 || v.dim() < 2 || k.size(-2) == v.size(-2),  // ATen does not ask
      "popc::attend: keys ", k.sizes(), " and values ", v.sizes(), " are not of as many tokens");
  if (!is_served_attention(q, k, v, mask)) {
    return at::scaled_dot_product_attention(q, k, v, mask, 0.0, false, scale, true).contiguous();
  }
  const Sizes sizes{q.size(0), q.size(1), k.size(1), k.size(2), q.size(3), v.size(3)};
  const double by = scale ? *scale : 1.0 / std::sqrt(static_cast<double>(sizes.inner));
  const Tensor x = q.contiguous();
  Tensor y = at::empty({sizes.batch, sizes.heads, 1, sizes.outer}, q.options());
  const Mask seen = mask_of(mask, sizes);
  by_type(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    attend_all<T>(x, k, v, seen, static_cast<float>(by), sizes, y.data_ptr<T>());
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(popc, CPU, m) { m.impl("attend", attend); }

}  // namespace popc::attention
