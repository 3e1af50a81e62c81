// popc::sum_squares, moments, centers and score_histogram on CPUs. See popc/ops/measure.py for what
// they mean.

#include <array>
#include <cstring>
#include <limits>

#include "lines.h"

namespace popc {
namespace {

constexpr int shift = 21;
constexpr int64_t bins = 1 << 10;
constexpr double steady = 0.1;
constexpr int64_t apart = 4;  // tables of a histogram

void check_measured(const Tensor& x, const MaybeTensor& valid) {
  TORCH_CHECK_VALUE(
      !valid || (valid->scalar_type() == at::kBool && valid->sizes() == x.sizes().slice(0, 2)),
      "popc: valid must be bool [B, T] for ", x.sizes());
}

// run(first, last, part) for `parts` shares of `size`, in parallel.
template <typename F>
void in_parts(int64_t size, int64_t parts, F&& run) {
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) run(size * p / parts, size * (p + 1) / parts, p);
  });
}

int64_t parts_for(int64_t values) {
  if (at::in_parallel_region()) return 1;
  return std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), values >> 14));
}

// add(to, channel, Σ x, Σ x²) for each channel, over some valid tokens of x [B, T, K] at a time; `to`
// is the sequence's row of `out`, or the only one. By channels, so that no thread adds into
// another's: the order of a sum is always the same.
template <typename F>
void over_tokens(const Tensor& x, const MaybeTensor& valid, const Tensor& out, F&& add) {
  constexpr int some = 8;  // tokens that are added up before they are added to memory
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  const int64_t rows = out.size(0), columns = out.size(1);
  const Tensor given = x.contiguous(), marks = valid ? valid->contiguous() : Tensor();
  const bool* counts = valid ? marks.const_data_ptr<bool>() : nullptr;
  double* sums = out.data_ptr<double>();
  by_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* values = given.const_data_ptr<T>();
    std::vector<const T*> from;
    const auto add_all = [&](auto many, int64_t t, int64_t first, int64_t last, double* to) {
      for (int64_t i = first; i < last; ++i) {
        double sum = 0.0, squares = 0.0;
        each<decltype(many)::value>([&](auto n) {
          const double value = static_cast<float>(from[t + n][i]);
          sum += value;
          squares += value * value;
        });
        add(to, i, sum, squares);
      }
    };
    for (int64_t b = 0; b < batch; ++b) {
      from.clear();
      for (int64_t t = b * tokens; t < (b + 1) * tokens; ++t) {
        if (!counts || counts[t]) from.push_back(values + t * width);
      }
      const int64_t found = from.size();
      double* to = sums + (rows > 1 ? b * columns : 0);
      in_parts(width, parts_for(tokens * width), [&](int64_t first, int64_t last, int64_t) {
        int64_t t = 0;
        for (; t + some <= found; t += some) {
          add_all(std::integral_constant<int, some>(), t, first, last, to);
        }
        for (; t < found; ++t) add_all(std::integral_constant<int, 1>(), t, first, last, to);
      });
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
  Tensor out = at::zeros({h.size(0), h.size(2)}, h.options().dtype(at::kDouble));
  over_tokens(
      h, valid, out, [](double* to, int64_t i, double, double squares) { to[i] += squares; });
  return out;
}

Tensor moments(const Tensor& x, const MaybeTensor& valid, const MaybeTensor& known) {
  TORCH_CHECK_VALUE(x.dim() == 3, "popc::moments takes x [B, T, K], not ", x.sizes());
  check_measured(x, valid);
  const int64_t width = x.size(2), columns = 2 * width + 1;
  TORCH_CHECK_VALUE(
      !known || (known->scalar_type() == at::kDouble && known->dim() == 2 &&
                 known->size(1) == columns && (known->size(0) == 1 || known->size(0) == x.size(0))),
      "popc::moments: known must be float64 [1 or B, 2K + 1]");
  Tensor out = known ? known->clone(at::MemoryFormat::Contiguous)
                     : at::zeros({x.size(0), columns}, x.options().dtype(at::kDouble));
  over_tokens(
      is_served_type(x.scalar_type()) ? x : x.to(at::kFloat), valid, out,
      [width](double* to, int64_t i, double sum, double squares) {
        to[i] += sum;
        to[width + i] += squares;
      });
  Tensor count = out.select(1, 2 * width);
  if (!valid) {
    count.add_(out.size(0) == x.size(0) ? x.size(1) : x.size(0) * x.size(1));
  } else {
    count.add_(out.size(0) == x.size(0) ? valid->sum(1) : valid->sum());
  }
  return out;
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
    const double* squares = sums + width;
    const double count = squares[width];
    float* to = out.data_ptr<float>() + s * width;
    for (int64_t i = 0; i < width; ++i) {
      const double mean = sums[i] / count;
      const double variance = (squares[i] - sums[i] * mean) / (count - 1.0);
      to[i] = mean * mean > steady * variance ? static_cast<float>(mean) : 0.0f;
    }
  }
  return out;
}

float sum_of(const float* values, int64_t n) {
  Lanes found(0.0f);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) found = found + Lanes::loadu(values + i);
  float total = sum(found);
  for (; i < n; ++i) total += values[i];
  return total;
}

Tensor score_histogram(
    const Tensor& x, const Tensor& norm, const Tensor& center, const MaybeTensor& valid) {
  TORCH_CHECK_VALUE(x.dim() == 3, "popc::score_histogram takes x [B, T, K], not ", x.sizes());
  check_measured(x, valid);
  TORCH_CHECK_VALUE(
      norm.scalar_type() == at::kFloat && norm.numel() == x.size(2),
      "popc::score_histogram: norm must be float32 [K]");
  TORCH_CHECK_VALUE(
      center.scalar_type() == at::kFloat && center.dim() == 2 && center.size(1) == x.size(2) &&
          (center.size(0) == 1 || center.size(0) == x.size(0)),
      "popc::score_histogram: center must be float32 [B, K] or [1, K]");
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  const Tensor given = (is_served_type(x.scalar_type()) ? x : x.to(at::kFloat)).contiguous();
  const Tensor norms = norm.contiguous(), marks = valid ? valid->contiguous() : Tensor();
  const Tensor means = center.contiguous();
  const bool* counts = valid ? marks.const_data_ptr<bool>() : nullptr;
  const float* scale = norms.const_data_ptr<float>();
  Tensor out = at::zeros({center.size(0), bins + 1}, x.options().dtype(at::kDouble));
  by_type(given.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* values = given.const_data_ptr<T>();
    const int64_t parts = parts_for(given.numel());
    std::vector<int64_t> found(parts * bins);
    std::vector<double> logs(tokens);
    for (int64_t b = 0; b < batch; ++b) {
      std::fill(found.begin(), found.end(), 0);
      const float* middle = means.const_data_ptr<float>() + (means.size(0) > 1 ? b * width : 0);
      in_parts(tokens, parts, [&](int64_t first, int64_t last, int64_t p) {
        // Neighbours often share a bin: several tables, so that no addition waits for another.
        std::vector<std::array<int32_t, bins + 16>> tables(apart);  // not a page apart
        std::vector<float> scores(width);
        for (int64_t t = first; t < last; ++t) {
          logs[t] = 0.0;
          if (counts && !counts[b * tokens + t]) continue;
          const T* from = values + (b * tokens + t) * width;
          for (int64_t c = 0; c < width; ++c) {
            const float value = (static_cast<float>(from[c]) - middle[c]) * scale[c];
            scores[c] = value * value;
          }
          const auto note = [&](int64_t c, int64_t table) {
            uint32_t bits;
            std::memcpy(&bits, &scores[c], sizeof bits);
            ++tables[table][bits >> shift & (bins - 1)];
          };
          int64_t c = 0;
          for (; c + apart <= width; c += apart) {
            for (int64_t i = 0; i < apart; ++i) note(c + i, i);
          }
          for (; c < width; ++c) note(c, 0);
          const float total = sum_of(scores.data(), width);
          const double ln = std::log(std::max(total, std::numeric_limits<float>::min()));
          logs[t] = std::isfinite(ln) ? ln : 0.0;
        }
        for (const auto& table : tables) {
          for (int64_t i = 0; i < bins; ++i) found[p * bins + i] += table[i];
        }
      });
      double* to = out.data_ptr<double>() + (means.size(0) > 1 ? b * (bins + 1) : 0);
      for (int64_t p = 0; p < parts; ++p) {
        for (int64_t i = 0; i < bins; ++i) to[i] += found[p * bins + i];
      }
      for (int64_t t = 0; t < tokens; ++t) to[bins] += logs[t];
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(popc, CPU, m) {
  m.impl("sum_squares", sum_squares);
  m.impl("moments", moments);
  m.impl("centers", centers);
  m.impl("score_histogram", score_histogram);
}

}  // namespace popc
