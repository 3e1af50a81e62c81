// popc::centers and popc::measure_inputs on CPUs. See popc/ops/measure.py for what they mean.

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "constants.h"
#include "dispatch.h"
#include "valid_tokens.h"
#include "vec.h"

namespace popc::measure {
namespace {

using constants::bins;
using constants::doubt;
using constants::shift;
using constants::steady;

constexpr int64_t table_count = 4;        // of a histogram: see count_scores()
constexpr int64_t max_float_tokens = 64;  // added up in float32 before float64

using IntVec = at::vec::Vectorized<int32_t>;
using Table = std::array<int32_t, bins + 16>;  // padded: tables are not a page apart

// The mean of each channel where it is steady over `count` tokens, else 0.
void compute_centers(
    const double* sums, const double* squares, double count, int64_t n, float* centers) {
  for (int64_t i = 0; i < n; ++i) {
    const double mean = sums[i] / count;
    const double variance = (squares[i] - sums[i] * mean) / (count - 1.0);
    const bool is_steady = count > 1.0 && mean * mean > (steady + doubt / count) * variance;
    centers[i] = is_steady ? static_cast<float>(mean) : 0.0f;
  }
}

Tensor centers(const Tensor& moments) {
  TORCH_CHECK_VALUE(
      moments.dim() == 2 && moments.scalar_type() == at::kDouble && moments.size(1) % 2 == 1,
      "popc::centers takes moments, float64 [S, 2K + 1], not ", moments.sizes());
  const int64_t width = moments.size(1) / 2;
  const Tensor values = moments.contiguous();
  Tensor out = at::empty({moments.size(0), width}, moments.options().dtype(at::kFloat));
  for (int64_t s = 0; s < moments.size(0); ++s) {
    const double* sums = values.const_data_ptr<double>() + s * moments.size(1);
    compute_centers(sums, sums + width, sums[2 * width], width, out.data_ptr<float>() + s * width);
  }
  return out;
}

// The channel of lane i of a row of `size` channels in lane order.
template <typename T>
int64_t channel_of_lane(int64_t i, int64_t size) {
  if (!is_deinterleaved<T> || i >= size / pair_lanes * pair_lanes) return i;
  const int64_t j = i % pair_lanes;
  return i - j + (j < lanes ? 2 * j : 2 * (j - lanes) + 1);
}

// Moments, centers and scores of channels `first` to `first + size`, one thread's part, in lane
// order. Sums are float64, and float32 for the last few tokens.
template <typename T>
class ChannelStats {
 public:
  // Continues from the moments `known [2K]`.
  ChannelStats(const double* known, const float* norm, int64_t width, int64_t first, int64_t size)
      : first_(first), size_(size), norm_(size), center_(size), flushed_(2 * size),
        recent_(2 * size), bins_(size), sums_(2 * size) {
    for (int64_t i = 0; i < size; ++i) {
      const int64_t c = first + channel_of_lane<T>(i, size);
      norm_[i] = norm[c];
      sums_[i] = known[c];
      sums_[size + i] = known[width + c];
    }
    flush();
  }

  // Adds tokens to the moments.
  void add(const T* const* rows, int64_t count) {
    for (; count > 0; rows += max_tokens, count -= max_tokens) {
      dispatch_tokens(std::min(count, max_tokens), [&](auto block) {
        add_block<decltype(block)::value, false>(rows, {});
      });
    }
  }

  // The same; then computes the centers over all `total` tokens so far.
  void add_and_center(const T* const* rows, int64_t count, double total) {
    const CenterRule rule(total);
    if (count == 0) return add_block<0, true>(rows, rule);
    add(rows, count - 1);
    add_block<1, true>(rows + count - 1, rule);
  }

  // The moments [2K] of all tokens.
  void write(double* moments, int64_t width) {
    flush();
    for (int64_t i = 0; i < size_; ++i) {
      const int64_t c = first_ + channel_of_lane<T>(i, size_);
      moments[c] = sums_[i];
      moments[width + c] = sums_[size_ + i];
    }
  }

  // Counts the scores of one token in `tables`; returns their sum.
  float count_scores(const T* row, Table* tables) {
    const T* from = row + first_;
    const IntVec bin_mask(bins - 1), bin_shift(shift);
    int32_t* const bin = bins_.data();
    Vec total(0.0f);
    int64_t i = 0;
    const auto score = [&](const Vec& value) {
      const Vec weighted = (value - Vec::loadu(&center_[i])) * Vec::loadu(&norm_[i]);
      const Vec squared = weighted * weighted;
      (at::vec::cast<int32_t>(squared) >> bin_shift & bin_mask).store(bin + i);
      total = total + squared;
      i += lanes;
    };
    while (i + pair_lanes <= size_) {
      const auto [low, high] = load_pair(from + i);
      score(low);
      score(high);
    }
    float tail = 0.0f;
    for (; i < size_; ++i) {
      const float weighted = (static_cast<float>(from[i]) - center_[i]) * norm_[i];
      const float squared = weighted * weighted;
      std::memcpy(bin + i, &squared, sizeof squared);
      bin[i] = bin[i] >> shift & (bins - 1);
      tail += squared;
    }
    // Neighbours often fall into one bin: with several tables, no increment waits for another. Bins
    // are loaded in pairs, which halves the loads.
    for (i = 0; i + table_count <= size_; i += table_count) {
      unroll<table_count / 2>([&](auto n) {
        uint64_t two;
        std::memcpy(&two, bin + i + 2 * n, sizeof two);
        ++tables[2 * n][static_cast<uint32_t>(two)];
        ++tables[2 * n + 1][two >> 32];
      });
    }
    for (; i < size_; ++i) ++tables[0][bin[i]];
    return reduce_add(total) + tail;
  }

 private:
  // As compute_centers(), in float32: the mean where mean² > factor · (Σ x² - Σ x · mean).
  struct CenterRule {
    float inverse_count = 0.0f, factor = 0.0f;

    CenterRule() = default;
    explicit CenterRule(double count) {
      if (count <= 1.0) return;  // every mean is then 0
      inverse_count = 1.0 / count;
      factor = (steady + doubt / count) / (count - 1.0);
    }
    Vec center(const Vec& sum, const Vec& square) const {
      const Vec mean = sum * Vec(inverse_count);
      const Vec is_steady = mean * mean > Vec(factor) * (square - sum * mean);
      return Vec::blendv(Vec(0.0f), mean, is_steady);
    }
    float center(float sum, float square) const {
      const float mean = sum * inverse_count;
      return mean * mean > factor * (square - sum * mean) ? mean : 0.0f;
    }
  };

  template <int N, bool with_centers>
  void add_block(const T* const* rows, const CenterRule& rule) {
    if (recent_tokens_ + N > max_float_tokens) flush();
    recent_tokens_ += N;
    const T* from[N + 1];
    for (int n = 0; n < N; ++n) from[n] = rows[n] + first_;
    float *sum = recent_.data(), *square = sum + size_;
    const float *flushed_sum = flushed_.data(), *flushed_square = flushed_sum + size_;
    int64_t i = 0;
    for (; i + pair_lanes <= size_; i += pair_lanes) {
      Vec low = Vec::loadu(sum + i), high = Vec::loadu(sum + i + lanes);
      Vec low2 = Vec::loadu(square + i), high2 = Vec::loadu(square + i + lanes);
      if constexpr (N > 0) {
        unroll<N>([&](auto n) {
          const auto [a, b] = load_pair(from[n] + i);
          low = low + a;
          high = high + b;
          low2 = at::vec::fmadd(a, a, low2);
          high2 = at::vec::fmadd(b, b, high2);
        });
        low.store(sum + i);
        high.store(sum + i + lanes);
        low2.store(square + i);
        high2.store(square + i + lanes);
      }
      if constexpr (with_centers) {
        const auto update = [&](int64_t j, const Vec& a, const Vec& b) {
          const Vec all = a + Vec::loadu(flushed_sum + j);
          const Vec all2 = b + Vec::loadu(flushed_square + j);
          rule.center(all, all2).store(&center_[j]);
        };
        update(i, low, low2);
        update(i + lanes, high, high2);
      }
    }
    for (; i < size_; ++i) {
      for (int n = 0; n < N; ++n) {
        const float value = static_cast<float>(from[n][i]);
        sum[i] += value;
        square[i] += value * value;
      }
      if constexpr (with_centers) {
        center_[i] = rule.center(sum[i] + flushed_sum[i], square[i] + flushed_square[i]);
      }
    }
  }

  // Adds the float32 sums to those in float64.
  void flush() {
    for (int64_t i = 0; i < 2 * size_; ++i) {
      sums_[i] += recent_[i];
      flushed_[i] = static_cast<float>(sums_[i]);
      recent_[i] = 0.0f;
    }
    recent_tokens_ = 0;
  }

  int64_t first_, size_, recent_tokens_ = 0;
  std::vector<float> norm_, center_, flushed_, recent_;
  std::vector<int32_t> bins_;
  std::vector<double> sums_;
};

// How many tokens the scores of token `index` stand for; 0 where it is not sampled.
int64_t sample_weight(int64_t index) {
  int64_t every = 1;
  while (index >= every * constants::sample) every *= 2;
  const uint64_t turn = static_cast<uint32_t>(index / every * constants::spread);
  return index % every == static_cast<int64_t>(turn * every >> 32) ? every : 0;
}

// One thread's counts of scores in each bin, and each token's sum of scores.
struct Histogram {
  std::array<Table, table_count> tables{};
  std::array<int64_t, bins> counts{};
  std::vector<float> totals;

  // Adds the tables to the counts, `weight` times, and clears them.
  void fold(int64_t weight) {
    for (int64_t i = 0; i < bins; ++i) {
      int32_t count = 0;
      for (Table& table : tables) {
        count += table[i];
        table[i] = 0;
      }
      counts[i] += count * weight;
    }
  }
};

// Adds one sequence's tokens to one thread's channels, after `before` earlier tokens, and scores
// those with a weight.
template <typename T>
void score_tokens(
    const ValidTokens<T>& tokens, const std::vector<int64_t>& weights, double before,
    ChannelStats<T>& stats, Histogram& histogram) {
  int64_t row = 0, added = 0, last_weight = 1;
  for (int64_t end : tokens.position_ends) {
    const int64_t begin = row;
    for (bool centered = false; row < end; ++row) {
      if (!weights[row]) continue;
      if (!centered) {  // on the tokens of earlier positions
        stats.add_and_center(&tokens.rows[added], begin - added, before + begin);
        added = begin;
        centered = true;
      }
      if (weights[row] != last_weight) {
        histogram.fold(last_weight);
        last_weight = weights[row];
      }
      histogram.totals.push_back(stats.count_scores(tokens.rows[row], histogram.tables.data()));
    }
  }
  stats.add(tokens.rows.data() + added, row - added);
  histogram.fold(last_weight);
}

// One sequence's moments [2K + 1], continued from `known`, and histogram [bins + 1], of which the
// last is Σ weight · ln(sum of the token's scores).
template <typename T>
void measure_sequence(
    const ValidTokens<T>& tokens, int64_t width, const float* norm, const double* known,
    double* moments, double* histogram) {
  const double before = known[2 * width];
  std::vector<int64_t> weights(tokens.size());
  for (int64_t i = 0; i < tokens.size(); ++i) weights[i] = sample_weight(before + i);
  const int64_t parts = channel_parts(tokens.size() * width);
  std::vector<Histogram> part_histograms(parts);
  parallel_over_channels(width, parts, [&](int64_t first, int64_t last, int64_t p) {
    ChannelStats<T> stats(known, norm, width, first, last - first);
    score_tokens(tokens, weights, before, stats, part_histograms[p]);
    stats.write(moments, width);
  });
  moments[2 * width] = before + tokens.size();
  for (int64_t i = 0; i < bins; ++i) {
    histogram[i] = 0.0;
    for (const Histogram& part : part_histograms) histogram[i] += part.counts[i];
  }
  double& log_sum = histogram[bins] = 0.0;
  int64_t scored = 0;
  for (int64_t weight : weights) {
    if (!weight) continue;
    float total = 0.0f;
    for (const Histogram& part : part_histograms) total += part.totals[scored];
    ++scored;
    const double log_total = std::log(std::max(total, std::numeric_limits<float>::min()));
    if (std::isfinite(log_total)) log_sum += log_total * static_cast<double>(weight);
  }
}

std::tuple<Tensor, Tensor> measure_inputs(
    const Tensor& x, const Tensor& norm, const MaybeTensor& valid, const Tensor& known) {
  TORCH_CHECK_VALUE(x.dim() == 3, "popc::measure_inputs takes x [B, T, K], not ", x.sizes());
  check_valid_mask(x, valid);
  const int64_t width = x.size(2);
  TORCH_CHECK_VALUE(
      norm.scalar_type() == at::kFloat && norm.numel() == width,
      "popc::measure_inputs: norm must be float32 [K]");
  TORCH_CHECK_VALUE(
      known.scalar_type() == at::kDouble && known.dim() == 2 &&
          (known.size(0) == 1 || known.size(0) == x.size(0)) && known.size(1) == 2 * width + 1,
      "popc::measure_inputs: known must be float64 [1 or B, 2K + 1] for x ", x.sizes(), ", not ",
      known.scalar_type(), " ", known.sizes());
  const Tensor norms = norm.contiguous(), known_moments = known.contiguous();
  Tensor moments = at::empty(known.sizes(), known.options());
  Tensor histogram = at::empty({known.size(0), bins + 1}, known.options());
  for_each_sequence(
      is_supported_dtype(x.scalar_type()) ? x : x.to(at::kFloat), valid, known.size(0) == 1,
      [&](int64_t s, const auto& tokens) {
        const int64_t offset = s * (2 * width + 1);
        measure_sequence(
            tokens, width, norms.const_data_ptr<float>(),
            known_moments.const_data_ptr<double>() + offset, moments.data_ptr<double>() + offset,
            histogram.data_ptr<double>() + s * (bins + 1));
      });
  return {moments, histogram};
}

}  // namespace

TORCH_LIBRARY_IMPL(popc, CPU, m) {
  m.impl("centers", centers);
  m.impl("measure_inputs", measure_inputs);
}

}  // namespace popc::measure
