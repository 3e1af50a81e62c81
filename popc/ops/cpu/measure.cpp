// popc::centers and popc::measure_inputs on CPUs. See popc/ops/measure.py for what they mean.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "constants.h"
#include "lines.h"
#include "tokens.h"

namespace popc::statistics {
namespace {

using constants::bins;
using constants::doubt;
using constants::shift;
using constants::steady;

constexpr int64_t apart = 4;       // tables of a histogram
constexpr int64_t in_floats = 64;  // tokens added up in float32 before float64

using Ints = at::vec::Vectorized<int32_t>;
using Counts = std::array<int32_t, bins + 16>;  // tables are not a page apart

void compute_centers(
    const double* sums, const double* squares, double count, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) {
    const double mean = sums[i] / count;
    const double variance = (squares[i] - sums[i] * mean) / (count - 1.0);
    const bool keeps = count > 1.0 && mean * mean > (steady + doubt / count) * variance;
    to[i] = keeps ? static_cast<float>(mean) : 0.0f;
  }
}

Tensor centers(const Tensor& moments) {
  TORCH_CHECK_VALUE(
      moments.dim() == 2 && moments.scalar_type() == at::kDouble && moments.size(1) % 2 == 1,
      "popc::centers takes moments, float64 [S, 2K + 1], not ", moments.sizes());
  const int64_t width = moments.size(1) / 2;
  const Tensor given = moments.contiguous();
  Tensor out = at::empty({moments.size(0), width}, moments.options().dtype(at::kFloat));
  for (int64_t s = 0; s < moments.size(0); ++s) {
    const double* sums = given.const_data_ptr<double>() + s * moments.size(1);
    compute_centers(sums, sums + width, sums[2 * width], width, out.data_ptr<float>() + s * width);
  }
  return out;
}

// Where value i of what load_pair made of a row stands in the row, of `size` values.
template <typename T>
int64_t place_of(int64_t i, int64_t size) {
  if (!dealt<T> || i >= size / step * step) return i;
  const int64_t j = i % step;
  return i - j + (j < lanes ? 2 * j : 2 * (j - lanes) + 1);
}

// The channels `first` to `first + size`, as one thread measures them: all in the order of
// load_pair. Sums are float64, and of the last few tokens float32.
template <typename T>
class Measured {
 public:
  // With the moments `known [2K]`.
  Measured(const double* known, const float* norm, int64_t width, int64_t first, int64_t size)
      : first_(first), size_(size), norm_(size), center_(size), flushed_(2 * size),
        recent_(2 * size), places_(size), sums_(2 * size) {
    for (int64_t i = 0; i < size; ++i) {
      const int64_t c = first + place_of<T>(i, size);
      norm_[i] = norm[c];
      sums_[i] = known[c];
      sums_[size + i] = known[width + c];
    }
    flush();
  }

  // Adds tokens to the sums.
  void add(const T* const* rows, int64_t count) {
    for (; count > 0; rows += most_tokens, count -= most_tokens) {
      by_tokens(std::min(count, most_tokens), [&](auto many) {
        add_some<decltype(many)::value, false>(rows, {});
      });
    }
  }

  // The same; then finds the centers of all `total` tokens so far.
  void add_and_center(const T* const* rows, int64_t count, double total) {
    const Least least(total);
    if (count == 0) return add_some<0, true>(rows, least);
    add(rows, count - 1);
    add_some<1, true>(rows + count - 1, least);
  }

  // The moments [2K] of all tokens.
  void write(double* moments, int64_t width) {
    flush();
    for (int64_t i = 0; i < size_; ++i) {
      const int64_t c = first_ + place_of<T>(i, size_);
      moments[c] = sums_[i];
      moments[width + c] = sums_[size_ + i];
    }
  }

  // Counts the scores of one token in `tables`; their sum.
  float count(const T* row, Counts* tables) {
    const T* from = row + first_;
    const Ints bin(bins - 1), down(shift);
    int32_t* const places = places_.data();
    Lanes total(0.0f);
    int64_t i = 0;
    const auto score = [&](const Lanes& value) {
      const Lanes moved = (value - Lanes::loadu(&center_[i])) * Lanes::loadu(&norm_[i]);
      const Lanes squared = moved * moved;
      (at::vec::cast<int32_t>(squared) >> down & bin).store(places + i);
      total = total + squared;
      i += lanes;
    };
    while (i + step <= size_) {
      const auto [low, high] = load_pair(from + i);
      score(low);
      score(high);
    }
    float rest = 0.0f;
    for (; i < size_; ++i) {
      const float moved = (static_cast<float>(from[i]) - center_[i]) * norm_[i];
      const float squared = moved * moved;
      std::memcpy(places + i, &squared, sizeof squared);
      places[i] = places[i] >> shift & (bins - 1);
      rest += squared;
    }
    // Neighbours often share a bin: several tables, so that no addition waits for another. Bins are
    // loaded by pairs, which halves the loads.
    for (i = 0; i + apart <= size_; i += apart) {
      each<apart / 2>([&](auto n) {
        uint64_t two;
        std::memcpy(&two, places + i + 2 * n, sizeof two);
        ++tables[2 * n][static_cast<uint32_t>(two)];
        ++tables[2 * n + 1][two >> 32];
      });
    }
    for (; i < size_; ++i) ++tables[0][places[i]];
    return sum(total) + rest;
  }

 private:
  // What makes centers of sums over so many tokens: see compute_centers().
  struct Least {
    float share = 0.0f, most = 0.0f;

    Least() = default;
    explicit Least(double count) {
      if (count <= 1.0) return;  // a mean of 0
      share = 1.0 / count;
      most = (steady + doubt / count) / (count - 1.0);
    }
    Lanes center(const Lanes& sum, const Lanes& square) const {
      const Lanes mean = sum * Lanes(share);
      const Lanes keeps = mean * mean > Lanes(most) * (square - sum * mean);
      return Lanes::blendv(Lanes(0.0f), mean, keeps);
    }
    float center(float sum, float square) const {
      const float mean = sum * share;
      return mean * mean > most * (square - sum * mean) ? mean : 0.0f;
    }
  };

  template <int N, bool centers>
  void add_some(const T* const* rows, const Least& least) {
    if (held_ + N > in_floats) flush();
    held_ += N;
    const T* from[N + 1];
    for (int n = 0; n < N; ++n) from[n] = rows[n] + first_;
    float *sum = recent_.data(), *square = sum + size_;
    const float *sum0 = flushed_.data(), *square0 = sum0 + size_;
    int64_t i = 0;
    for (; i + step <= size_; i += step) {
      Lanes low = Lanes::loadu(sum + i), high = Lanes::loadu(sum + i + lanes);
      Lanes low2 = Lanes::loadu(square + i), high2 = Lanes::loadu(square + i + lanes);
      if constexpr (N > 0) {
        each<N>([&](auto n) {
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
      if constexpr (centers) {
        const auto find = [&](int64_t j, const Lanes& a, const Lanes& b) {
          const Lanes whole = a + Lanes::loadu(sum0 + j), whole2 = b + Lanes::loadu(square0 + j);
          least.center(whole, whole2).store(&center_[j]);
        };
        find(i, low, low2);
        find(i + lanes, high, high2);
      }
    }
    for (; i < size_; ++i) {
      for (int n = 0; n < N; ++n) {
        const float value = static_cast<float>(from[n][i]);
        sum[i] += value;
        square[i] += value * value;
      }
      if constexpr (centers) center_[i] = least.center(sum[i] + sum0[i], square[i] + square0[i]);
    }
  }

  void flush() {
    for (int64_t i = 0; i < 2 * size_; ++i) {
      sums_[i] += recent_[i];
      flushed_[i] = static_cast<float>(sums_[i]);
      recent_[i] = 0.0f;
    }
    held_ = 0;
  }

  int64_t first_, size_, held_ = 0;  // held_: tokens in recent_
  std::vector<float> norm_, center_, flushed_, recent_;
  std::vector<int32_t> places_;
  std::vector<double> sums_;
};

// For how many tokens the one with this number counts; 0 where it is not scored.
int64_t times_of(int64_t number) {
  int64_t every = 1;
  while (number >= every * constants::sample) every *= 2;
  const uint64_t turn = static_cast<uint32_t>(number / every * constants::spread);
  return number % every == static_cast<int64_t>(turn * every >> 32) ? every : 0;
}

// What one thread counted: how often a score fell into each bin, and each token's sum of scores.
struct Counted {
  std::array<Counts, apart> tables{};
  std::array<int64_t, bins> bins_{};
  std::vector<float> totals;

  // Empties the tables, whose tokens count so many times.
  void fold(int64_t times) {
    for (int64_t i = 0; i < bins; ++i) {
      int32_t found = 0;
      for (int64_t j = 0; j < apart; ++j) {
        found += tables[j][i];
        tables[j][i] = 0;
      }
      bins_[i] += found * times;
    }
  }
};

// Tokens measured as one sequence, by one thread: they count `times`, and `before` came before.
template <typename T>
void score(
    const ValidTokens<T>& tokens, const std::vector<int64_t>& times, double before, Measured<T>& part,
    Counted& counted) {
  int64_t row = 0, added = 0, last = 1;
  for (int64_t end : tokens.ends) {
    const int64_t begin = row;
    for (bool found = false; row < end; ++row) {
      if (!times[row]) continue;
      if (!found) {
        part.add_and_center(&tokens.rows[added], begin - added, before + begin);
        added = begin;
        found = true;
      }
      if (times[row] != last) counted.fold(last), last = times[row];
      counted.totals.push_back(part.count(tokens.rows[row], counted.tables.data()));
    }
  }
  part.add(tokens.rows.data() + added, row - added);
  counted.fold(last);
}

// Tokens measured as one sequence: moments [2K + 1] with those `known`, a histogram [bins + 1].
template <typename T>
void measure(
    const ValidTokens<T>& tokens, int64_t width, const float* norm, const double* known,
    double* moments, double* histogram) {
  const double before = known[2 * width];
  std::vector<int64_t> times(tokens.size());
  for (int64_t i = 0; i < tokens.size(); ++i) times[i] = times_of(before + i);
  const int64_t parts = parts_for(tokens.size() * width);
  std::vector<Counted> counted(parts);
  in_parts(width, parts, [&](int64_t first, int64_t last, int64_t p) {
    Measured<T> part(known, norm, width, first, last - first);
    score(tokens, times, before, part, counted[p]);
    part.write(moments, width);
  });
  moments[2 * width] = before + tokens.size();
  for (int64_t i = 0; i < bins; ++i) {
    histogram[i] = 0.0;
    for (const Counted& part : counted) histogram[i] += part.bins_[i];
  }
  double& logs = histogram[bins] = 0.0;
  int64_t j = 0;
  for (int64_t weight : times) {
    if (!weight) continue;
    float total = 0.0f;
    for (const Counted& part : counted) total += part.totals[j];
    ++j;
    const double ln = std::log(std::max(total, std::numeric_limits<float>::min()));
    if (std::isfinite(ln)) logs += ln * static_cast<double>(weight);
  }
}

std::tuple<Tensor, Tensor> measure_inputs(
    const Tensor& x, const Tensor& norm, const MaybeTensor& valid, const Tensor& known) {
  TORCH_CHECK_VALUE(x.dim() == 3, "popc::measure_inputs takes x [B, T, K], not ", x.sizes());
  check_measured(x, valid);
  const int64_t width = x.size(2);
  TORCH_CHECK_VALUE(
      norm.scalar_type() == at::kFloat && norm.numel() == width,
      "popc::measure_inputs: norm must be float32 [K]");
  TORCH_CHECK_VALUE(
      known.scalar_type() == at::kDouble && known.dim() == 2 &&
          (known.size(0) == 1 || known.size(0) == x.size(0)) && known.size(1) == 2 * width + 1,
      "popc::measure_inputs: known must be float64 [1 or B, 2K + 1] for x ", x.sizes(), ", not ",
      known.scalar_type(), " ", known.sizes());
  const Tensor scale = norm.contiguous(), before = known.contiguous();
  Tensor moments = at::empty(known.sizes(), known.options());
  Tensor histogram = at::empty({known.size(0), bins + 1}, known.options());
  by_sequence(
      is_served_type(x.scalar_type()) ? x : x.to(at::kFloat), valid, known.size(0) == 1,
      [&](int64_t s, const auto& tokens) {
        const int64_t own = s * (2 * width + 1);
        measure(
            tokens, width, scale.const_data_ptr<float>(), before.const_data_ptr<double>() + own,
            moments.data_ptr<double>() + own, histogram.data_ptr<double>() + s * (bins + 1));
      });
  return {moments, histogram};
}

}  // namespace

TORCH_LIBRARY_IMPL(popc, CPU, m) {
  m.impl("centers", centers);
  m.impl("measure_inputs", measure_inputs);
}

}  // namespace popc::statistics
