// popc::sum_squares, centers and measure_inputs on CPUs. See popc/ops/measure.py for what they mean.

#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "lines.h"

namespace popc {
namespace {

constexpr int shift = 21;
constexpr int64_t bins = 1 << 10;
constexpr double steady = 0.1;
constexpr int64_t sample = 256;    // tokens whose scores are counted, or nearly twice as many
constexpr int64_t apart = 4;       // tables of a histogram
constexpr int64_t in_floats = 64;  // tokens added up in float32 before float64

using Ints = at::vec::Vectorized<int32_t>;
using Counts = std::array<int32_t, bins + 16>;  // tables are not a page apart

void check_measured(const Tensor& x, const MaybeTensor& valid) {
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

int64_t parts_for(int64_t values) {
  if (at::in_parallel_region()) return 1;
  return std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), values >> 14));
}

// The tokens of x [T, K] that count: all, or those marked.
template <typename T>
std::vector<const T*> valid_rows(const T* x, int64_t tokens, int64_t width, const bool* marks) {
  std::vector<const T*> rows;
  rows.reserve(tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    if (!marks || marks[t]) rows.push_back(x + t * width);
  }
  return rows;
}

// run(N, t) for each N tokens from t on, then run(1, t) for each of the rest.
template <int N, typename F>
void in_blocks(int64_t tokens, F&& run) {
  int64_t t = 0;
  for (; t + N <= tokens; t += N) run(std::integral_constant<int, N>(), t);
  for (; t < tokens; ++t) run(std::integral_constant<int, 1>(), t);
}

// run(s, rows) for each sequence of x [S, T, K].
template <typename F>
void by_sequence(const Tensor& x, const MaybeTensor& valid, F&& run) {
  const int64_t tokens = x.size(1), width = x.size(2);
  const Tensor given = x.contiguous(), marks = valid ? valid->contiguous() : Tensor();
  by_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    for (int64_t s = 0; s < x.size(0); ++s) {
      const bool* of = valid ? marks.const_data_ptr<bool>() + s * tokens : nullptr;
      const T* from = given.const_data_ptr<T>() + s * tokens * width;
      run(s, valid_rows(from, tokens, width, of));
    }
  });
}

Tensor sum_squares(const Tensor& h, const MaybeTensor& valid) {
  TORCH_CHECK_VALUE(h.dim() == 3, "popc::sum_squares takes h [B, T, K], not ", h.sizes());
  check_measured(h, valid);
  if (!is_served_type(h.scalar_type())) {
    Tensor squares = h.to(at::kDouble).square();
    if (valid) squares.masked_fill_(valid->unsqueeze(-1).logical_not(), 0.0);
    return squares.sum(1);
  }
  const int64_t width = h.size(2);
  Tensor out = at::zeros({h.size(0), width}, h.options().dtype(at::kDouble));
  by_sequence(h, valid, [&](int64_t b, const auto& rows) {
    double* to = out.data_ptr<double>() + b * width;
    const int64_t found = rows.size();
    in_parts(width, parts_for(found * width), [&](int64_t first, int64_t last, int64_t) {
      in_blocks<8>(found, [&](auto many, int64_t t) {
        for (int64_t i = first; i < last; ++i) {
          double squares = 0.0;
          each<decltype(many)::value>([&](auto n) {
            const double value = static_cast<float>(rows[t + n][i]);
            squares += value * value;
          });
          to[i] += squares;
        }
      });
    });
  });
  return out;
}

void compute_centers(
    const double* sums, const double* squares, double count, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) {
    const double mean = sums[i] / count;
    const double variance = (squares[i] - sums[i] * mean) / (count - 1.0);
    const bool keeps = count > 1.0 && mean * mean > steady * variance;
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

// The channels `first` to `first + size`, as one thread measures them: all in the order of load_pair.
template <typename T>
class Measured {
 public:
  // Adds what `rows` have to the moments `known [2K]`, and finds the centers.
  Measured(
      const std::vector<const T*>& rows, const double* known, double count, const float* norm,
      int64_t width, int64_t first, int64_t size)
      : first_(first), size_(size), norm_(size), center_(size), scratch_(2 * size), places_(size),
        sums_(size), squares_(size) {
    for (int64_t i = 0; i < size; ++i) {
      const int64_t c = first + place_of<T>(i, size);
      norm_[i] = norm[c];
      sums_[i] = known[c];
      squares_[i] = known[width + c];
    }
    int64_t held = 0;  // tokens in float32 sums
    in_blocks<16>(rows.size(), [&](auto many, int64_t t) {
      constexpr int N = decltype(many)::value;
      add<N>(rows.data() + t);
      held += N;
      if (held >= in_floats) flush(), held = 0;
    });
    if (held) flush();
    compute_centers(sums_.data(), squares_.data(), count, size_, center_.data());
  }

  void write(double* moments, int64_t width) const {
    for (int64_t i = 0; i < size_; ++i) {
      const int64_t c = first_ + place_of<T>(i, size_);
      moments[c] = sums_[i];
      moments[width + c] = squares_[i];
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
  // Adds N tokens to the float32 sums.
  template <int N>
  void add(const T* const* rows) {
    const T* from[N];
    each<N>([&](auto n) { from[n] = rows[n] + first_; });
    float* const sum = scratch_.data();
    float* const square = sum + size_;
    int64_t i = 0;
    for (; i + step <= size_; i += step) {
      Lanes low = Lanes::loadu(sum + i), high = Lanes::loadu(sum + i + lanes);
      Lanes low2 = Lanes::loadu(square + i), high2 = Lanes::loadu(square + i + lanes);
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
    for (; i < size_; ++i) {
      for (int n = 0; n < N; ++n) {
        const float value = static_cast<float>(from[n][i]);
        sum[i] += value;
        square[i] += value * value;
      }
    }
  }

  void flush() {
    for (int64_t i = 0; i < size_; ++i) {
      sums_[i] += scratch_[i];
      squares_[i] += scratch_[size_ + i];
    }
    std::fill(scratch_.begin(), scratch_.end(), 0.0f);
  }

  int64_t first_, size_;
  std::vector<float> norm_, center_, scratch_;
  std::vector<int32_t> places_;
  std::vector<double> sums_, squares_;
};

// One sequence: its moments [2K + 1] with those `known`, and its scores counted into [bins + 1].
template <typename T>
void measure(
    const std::vector<const T*>& rows, int64_t width, const float* norm, const double* known,
    double* moments, double* histogram) {
  const int64_t found = rows.size(), every = std::max<int64_t>(1, found / sample);
  const int64_t counted = found / every, parts = parts_for(found * width);
  std::vector<Counts> tables(parts * apart, Counts{});
  std::vector<float> totals(parts * counted);
  const double count = moments[2 * width] = known[2 * width] + found;
  in_parts(width, parts, [&](int64_t first, int64_t last, int64_t p) {
    Measured<T> part(rows, known, count, norm, width, first, last - first);
    part.write(moments, width);
    for (int64_t j = 0; j < counted; ++j) {
      totals[p * counted + j] = part.count(rows[(j + 1) * every - 1], &tables[p * apart]);
    }
  });
  for (int64_t i = 0; i < bins; ++i) {
    int64_t all = 0;
    for (const Counts& table : tables) all += table[i];
    histogram[i] = static_cast<double>(all * every);
  }
  double& logs = histogram[bins] = 0.0;
  for (int64_t j = 0; j < counted; ++j) {
    float total = 0.0f;
    for (int64_t p = 0; p < parts; ++p) total += totals[p * counted + j];
    const double ln = std::log(std::max(total, std::numeric_limits<float>::min()));
    if (std::isfinite(ln)) logs += ln * static_cast<double>(every);
  }
}

std::tuple<Tensor, Tensor> measure_inputs(
    const Tensor& x, const Tensor& norm, const MaybeTensor& valid, const Tensor& known) {
  TORCH_CHECK_VALUE(x.dim() == 3, "popc::measure_inputs takes x [S, T, K], not ", x.sizes());
  check_measured(x, valid);
  const int64_t sequences = x.size(0), width = x.size(2);
  TORCH_CHECK_VALUE(
      norm.scalar_type() == at::kFloat && norm.numel() == width,
      "popc::measure_inputs: norm must be float32 [K]");
  TORCH_CHECK_VALUE(
      known.scalar_type() == at::kDouble && known.dim() == 2 && known.size(0) == sequences &&
          known.size(1) == 2 * width + 1,
      "popc::measure_inputs: known must be float64 [S, 2K + 1]");
  const Tensor scale = norm.contiguous(), before = known.contiguous();
  Tensor moments = at::empty(known.sizes(), known.options());
  Tensor histogram = at::empty({sequences, bins + 1}, known.options());
  by_sequence(
      is_served_type(x.scalar_type()) ? x : x.to(at::kFloat), valid,
      [&](int64_t s, const auto& rows) {
        const int64_t own = s * (2 * width + 1);
        measure(
            rows, width, scale.const_data_ptr<float>(), before.const_data_ptr<double>() + own,
            moments.data_ptr<double>() + own, histogram.data_ptr<double>() + s * (bins + 1));
      });
  return {moments, histogram};
}

}  // namespace

TORCH_LIBRARY_IMPL(popc, CPU, m) {
  m.impl("sum_squares", sum_squares);
  m.impl("centers", centers);
  m.impl("measure_inputs", measure_inputs);
}

}  // namespace popc
