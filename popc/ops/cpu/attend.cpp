// popc::attend on CPUs: attention of one token. See popc/ops/attend.py for what it means.
//
// Keys and values are read once for all query heads that share them, and not at all where no query
// sees them. Each thread takes the same number of visible keys, across heads and sequences. A
// softmax over some of a head's keys is a `PartialSoftmax`; those of one head are then merged.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "attention_mask.h"
#include "dispatch.h"
#include "row_kernels.h"
#include "sparse_gemv.h"
#include "vec.h"

namespace popc::attention {
namespace {

constexpr int64_t key_block = 64;  // whose keys and values stay in L1

// A softmax over some keys, not yet normalized.
struct PartialSoftmax {
  float* acc;        // [queries, value_dim], in lane order: Σ exp(score - max_score) · value
  float* max_score;  // [queries]
  float* total;      // [queries], Σ exp(score - max_score)
};

// The larger one; a NaN if `b` is one.
float max_or_nan(float a, float b) { return b <= a ? a : b; }

void scale_row(float* __restrict values, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) values[i] *= factor;
}

// Online softmax: scores become exp(score - max_score), where max_score is the largest so far; the
// partial sums are rescaled to it.
template <int N>
void update_softmax(
    float (*scores)[key_block], int64_t count, const PartialSoftmax& partial, int64_t value_dim) {
  for (int n = 0; n < N; ++n) {
    float* row = scores[n];
    for (int64_t i = count; i < key_block; ++i) row[i] = hidden;
    Vec maxima(hidden);
    for (int64_t i = 0; i < key_block; i += lanes) {
      maxima = at::vec::maximum(maxima, Vec::loadu(row + i));
    }
    const float max_score = max_or_nan(
        partial.max_score[n],
        at::vec::vec_reduce_all<float>(
            [](Vec a, Vec b) { return at::vec::maximum(a, b); }, maxima));
    if (max_score == hidden) {
      std::fill_n(row, key_block, 0.0f);
      continue;
    }
    if (max_score != partial.max_score[n]) {
      const float factor = std::exp(partial.max_score[n] - max_score);
      scale_row(partial.acc + n * value_dim, value_dim, factor);
      partial.total[n] *= factor;
      partial.max_score[n] = max_score;
    }
    Vec total(0.0f);
    for (int64_t i = 0; i < key_block; i += lanes) {
      const Vec value = (Vec::loadu(row + i) - Vec(max_score)).exp();
      value.store(row + i);
      total = total + value;
    }
    partial.total[n] += reduce_add(total);
  }
}

// N queries that share keys and values.
template <typename T>
struct Queries {
  const float* widened;  // [N, head_dim], by widen()
  const T* stored;
};

// Adds `count` keys, at most key_block, to the partial softmax of N queries; `next` are the keys of
// the block after it.
template <typename T, int N>
void attend_key_block(
    const Queries<T>& q, const T* const* keys, const T* const* values, const T* const* next,
    int64_t count, const Sizes& sizes, float scale, const float* const* bias,
    const PartialSoftmax& partial) {
  float scores[N][key_block];
  const auto score = [&](auto rows, int64_t i) {
    constexpr int R = decltype(rows)::value;
    float out[R][N];
    const NextRows<T> next_rows{values + i, sizes.value_dim};
    dot_rows<T, N, R>(q.widened, q.stored, sizes.head_dim, keys + i, next_rows, out);
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) scores[n][i + r] = scale * out[r][n];
    }
  };
  constexpr int R = dot_row_block<N>;
  int64_t i = 0;
  for (; i + R <= count; i += R) score(std::integral_constant<int, R>(), i);
  for (; i < count; ++i) score(std::integral_constant<int, 1>(), i);
  for (int n = 0; n < N; ++n) {
    if (bias[n]) add_into(bias[n], count, scores[n]);
  }
  update_softmax<N>(scores, count, partial, sizes.value_dim);
  float weights[key_block][max_tokens];
  for (int n = 0; n < N; ++n) {
    for (int64_t j = 0; j < count; ++j) weights[j][n] = scores[n][j];
  }
  const auto accumulate = [&](auto rows, int64_t j) {
    axpy_rows<T, N, decltype(rows)::value>(
        values + j, {next + j, sizes.head_dim}, weights + j, sizes.value_dim, partial.acc);
  };
  constexpr int A = axpy_row_block<N>;
  for (i = 0; i + A <= count; i += A) accumulate(std::integral_constant<int, A>(), i);
  for (; i < count; ++i) accumulate(std::integral_constant<int, 1>(), i);
}

// The keys, or the values, of one head.
template <typename T>
struct HeadRows {
  const T* data;
  int64_t stride;

  HeadRows(const Tensor& all, int64_t sequence, int64_t kv_head)
      : data(all.const_data_ptr<T>() + sequence * all.stride(0) + kv_head * all.stride(1)),
        stride(all.stride(2)) {}
  const T* row(int64_t key) const { return data + key * stride; }
};

// The queries of one head of keys, over visible keys `first` to `last`.
template <typename T>
void attend_key_range(
    const Queries<T>& q, const HeadRows<T>& keys, const HeadRows<T>& values,
    const VisibleKeys& visible, int64_t first, int64_t last, const Sizes& sizes, float scale,
    const PartialSoftmax& partial) {
  const T* key_rows[key_block];
  const T* value_rows[key_block];
  const T* next_rows[key_block];
  for (int64_t k = first; k < last; k += key_block) {
    const int64_t count = std::min(key_block, last - k);
    for (int64_t i = 0; i < count; ++i) {
      key_rows[i] = keys.row(visible.keys[k + i]);
      value_rows[i] = values.row(visible.keys[k + i]);
      next_rows[i] = k + count + i < last ? keys.row(visible.keys[k + count + i]) : key_rows[i];
    }
    for (int64_t n = 0; n < sizes.queries(); n += max_tokens) {
      const int64_t block_queries = std::min(max_tokens, sizes.queries() - n);
      const float* bias[max_tokens];
      for (int64_t i = 0; i < block_queries; ++i) {
        const float* row = visible.bias_of(n + i);
        bias[i] = row ? row + k : nullptr;
      }
      const Queries<T> block{q.widened + n * sizes.head_dim, q.stored + n * sizes.head_dim};
      const PartialSoftmax to{
          partial.acc + n * sizes.value_dim, partial.max_score + n, partial.total + n};
      dispatch_tokens(block_queries, [&](auto number) {
        constexpr int N = decltype(number)::value;
        attend_key_block<T, N>(
            block, key_rows, value_rows, next_rows, count, sizes, scale, bias, to);
      });
    }
  }
}

// Merges two partial softmaxes of the same queries.
void merge(const PartialSoftmax& into, const PartialSoftmax& from, const Sizes& sizes) {
  for (int64_t n = 0; n < sizes.queries(); ++n) {
    const float max_score = max_or_nan(into.max_score[n], from.max_score[n]);
    if (max_score == hidden) continue;
    const float into_factor = std::exp(into.max_score[n] - max_score);
    const float from_factor = std::exp(from.max_score[n] - max_score);
    float* __restrict acc = into.acc + n * sizes.value_dim;
    const float* __restrict other = from.acc + n * sizes.value_dim;
    for (int64_t i = 0; i < sizes.value_dim; ++i) {
      acc[i] = into_factor * acc[i] + from_factor * other[i];
    }
    into.total[n] = into_factor * into.total[n] + from_factor * from.total[n];
    into.max_score[n] = max_score;
  }
}

// How threads share the visible keys of all items, one after the other; an item is one head of keys
// of one sequence.
struct KeySplit {
  std::vector<int64_t> starts;  // [items + 1], of each item's keys among all
  int64_t threads;

  KeySplit(const Visibility& visibility, const Sizes& sizes, int64_t key_bytes)
      : starts(sizes.batch * sizes.kv_heads + 1, 0) {
    for (int64_t i = 0; i < items(); ++i) {
      starts[i + 1] = starts[i] + visibility.of(i / sizes.kv_heads, i % sizes.kv_heads).size();
    }
    threads = threads_for(starts.back(), key_bytes);
  }
  int64_t items() const { return static_cast<int64_t>(starts.size()) - 1; }
  int64_t first_of(int64_t thread) const { return starts.back() * thread / threads; }
  int64_t item_at(int64_t key) const {
    return std::upper_bound(starts.begin(), starts.end(), key) - starts.begin() - 1;
  }
};

// The partial softmax of each thread and item. A thread's items are consecutive, and two threads
// have at most one in common, so item + thread is an index of its own for each partial.
class Partials {
 public:
  Partials(const KeySplit& split, const Sizes& sizes)
      : queries_(sizes.queries()), value_dim_(sizes.value_dim) {
    const int64_t rows = (split.items() + split.threads) * queries_;
    acc_.resize(rows * value_dim_, 0.0f);
    max_scores_.resize(rows, hidden);
    totals_.resize(rows, 0.0f);
  }
  PartialSoftmax of(int64_t item, int64_t thread) {
    const int64_t row = (item + thread) * queries_;
    return {acc_.data() + row * value_dim_, max_scores_.data() + row, totals_.data() + row};
  }

 private:
  int64_t queries_, value_dim_;
  std::vector<float> acc_, max_scores_, totals_;
};

// Merges each item's partials, normalizes, and writes y [batch, heads, 1, value_dim].
template <typename T>
void write_items(const KeySplit& split, Partials& partials, const Sizes& sizes, T* y) {
  int64_t thread = 0;
  for (int64_t item = 0; item < split.items(); ++item) {
    while (thread + 1 < split.threads && split.first_of(thread + 1) <= split.starts[item]) ++thread;
    const PartialSoftmax merged = partials.of(item, thread);
    for (int64_t t = thread + 1; t < split.threads && split.first_of(t) < split.starts[item + 1];
         ++t) {
      merge(merged, partials.of(item, t), sizes);
    }
    for (int64_t n = 0; n < sizes.queries(); ++n) {
      float* row = merged.acc + n * sizes.value_dim;
      // Where no key is visible, ATen gives zeros.
      scale_row(row, sizes.value_dim, merged.total[n] == 0.0f ? 0.0f : 1.0f / merged.total[n]);
      T* to = y + (item * sizes.queries() + n) * sizes.value_dim;
      write_output<T>(row, sizes.value_dim, nullptr, nullptr, to);
    }
  }
}

template <typename T>
void attend_all(
    const Tensor& q, const Tensor& k, const Tensor& v, const Visibility& visibility, float scale,
    const Sizes& sizes, T* y) {
  const KeySplit split(visibility, sizes, (sizes.head_dim + sizes.value_dim) * sizeof(T));
  Partials partials(split, sizes);
  const T* stored = q.const_data_ptr<T>();
  std::vector<float> widened(q.numel());
  for (int64_t i = 0; i < sizes.batch * sizes.heads; ++i) {
    widen(stored + i * sizes.head_dim, widened.data() + i * sizes.head_dim, sizes.head_dim);
  }
  at::parallel_for(0, split.threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = split.first_of(t), last = split.first_of(t + 1);
      for (int64_t item = split.item_at(first);
           item < split.items() && split.starts[item] < last; ++item) {
        const int64_t sequence = item / sizes.kv_heads, kv_head = item % sizes.kv_heads;
        const int64_t start = split.starts[item], stop = split.starts[item + 1];
        const int64_t offset = item * sizes.queries() * sizes.head_dim;
        attend_key_range<T>(
            {widened.data() + offset, stored + offset}, HeadRows<T>(k, sequence, kv_head),
            HeadRows<T>(v, sequence, kv_head), visibility.of(sequence, kv_head),
            std::max(first, start) - start, std::min(last, stop) - start, sizes, scale,
            partials.of(item, t));
      }
    }
  });
  write_items<T>(split, partials, sizes, y);
}

bool is_supported_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& mask) {
  const auto dtype = q.scalar_type();
  const auto fits = [&](const Tensor& t) {
    return t.device().is_cpu() && t.scalar_type() == dtype && t.dim() == 4 && t.numel() > 0;
  };
  if (!fits(q) || !fits(k) || !fits(v) || q.size(2) != 1 || !is_supported_dtype(dtype)) {
    return false;
  }
  if (mask) {
    const auto mask_dtype = mask->scalar_type();
    if (mask_dtype != at::kBool && !is_supported_dtype(mask_dtype)) return false;
    if (mask->dim() > 4) return false;
  }
  const bool dense = (k.stride(3) == 1 || k.size(3) == 1) && (v.stride(3) == 1 || v.size(3) == 1);
  return dense && k.size(0) == q.size(0) && v.size(0) == q.size(0) && k.size(1) == v.size(1) &&
      q.size(1) % k.size(1) == 0 && k.size(2) == v.size(2) && k.size(3) == q.size(3);
}

Tensor attend(
    const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& mask,
    std::optional<double> scale) {
  TORCH_CHECK_VALUE(
      k.dim() < 2 || v.dim() < 2 || k.size(-2) == v.size(-2),  // ATen does not check
      "popc::attend: keys ", k.sizes(), " and values ", v.sizes(), " are not of as many tokens");
  if (!is_supported_attention(q, k, v, mask)) {
    return at::scaled_dot_product_attention(q, k, v, mask, 0.0, false, scale, true).contiguous();
  }
  const Sizes sizes{q.size(0), q.size(1), k.size(1), k.size(2), q.size(3), v.size(3)};
  const double factor = scale ? *scale : 1.0 / std::sqrt(static_cast<double>(sizes.head_dim));
  const Tensor x = q.contiguous();
  Tensor y = at::empty({sizes.batch, sizes.heads, 1, sizes.value_dim}, q.options());
  const Visibility visibility = find_visibility(mask, sizes);
  dispatch_dtype(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    attend_all<T>(x, k, v, visibility, static_cast<float>(factor), sizes, y.data_ptr<T>());
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(popc, CPU, m) { m.impl("attend", attend); }

}  // namespace popc::attention
