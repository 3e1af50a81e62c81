// popc::threshold_linear on CPUs. See popc/ops/threshold.py for what it means.

#include <cmath>

namespace popc {
namespace {

// A row of `values` for each sequence, or one for all; nullptr where there are none.
struct Rows {
  Tensor held;
  int64_t step = 0;

  Rows(const MaybeTensor& values, int64_t width, int64_t sequences, const char* name) {
    if (!values) return;
    TORCH_CHECK_VALUE(
        values->scalar_type() == at::kFloat && values->dim() == 2 && values->size(1) == width &&
            (values->size(0) == 1 || values->size(0) == sequences),
        "popc::threshold_linear: ", name, " must be float32 [1 or B, ", width, "], not ",
        values->scalar_type(), " ", values->sizes());
    held = values->contiguous();
    if (values->size(0) > 1) step = width;
  }
  const float* of(int64_t sequence) const {
    return held.defined() ? held.const_data_ptr<float>() + sequence * step : nullptr;
  }
};

// x - center without the channels that do not count; returns those that count for any token.
template <typename T>
std::vector<int64_t> keep(
    const T* x, int64_t tokens, int64_t inputs, const float* norm, const Tensor& threshold,
    const Rows& centers, int64_t each, T* kept) {
  std::vector<char> any(inputs, 0);
  const float* limits = threshold.const_data_ptr<float>();
  for (int64_t n = 0; n < tokens; ++n) {
    const float limit = limits[threshold.numel() > 1 ? n / each : 0];
    const float* center = centers.of(n / each);
    for (int64_t c = 0; c < inputs; ++c) {
      const float value = static_cast<float>(x[n * inputs + c]) - (center ? center[c] : 0.0f);
      const bool counts = !(std::fabs(value) * norm[c] <= limit);
      kept[n * inputs + c] = counts ? static_cast<T>(value) : T(0);
      any[c] |= counts;
    }
  }
  std::vector<int64_t> columns;
  columns.reserve(inputs);
  for (int64_t c = 0; c < inputs; ++c) {
    if (any[c]) columns.push_back(c);
  }
  return columns;
}

Tensor threshold_linear(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& norm,
    const Tensor& threshold, int64_t out_dim, const MaybeTensor& center, const MaybeTensor& base) {
  TORCH_CHECK_VALUE(
      weight.dim() == 2 && x.dim() >= 1 && (out_dim == 0 || out_dim == 1),
      "popc::threshold_linear takes x [..., K] and a weight of two dims, not ", x.sizes(), " and ",
      weight.sizes());
  const int64_t inputs = weight.size(1 - out_dim), outputs = weight.size(out_dim);
  TORCH_CHECK_TYPE(
      norm.scalar_type() == at::kFloat && threshold.scalar_type() == at::kFloat,
      "popc::threshold_linear: norm and threshold must be float32");
  TORCH_CHECK_VALUE(
      x.size(-1) == inputs && norm.numel() == inputs, "popc::threshold_linear: x has ", x.size(-1),
      " channels, norm ", norm.numel(), ", the weight ", inputs);
  TORCH_CHECK_VALUE(
      threshold.numel() == 1 || (x.dim() > 1 && threshold.numel() == x.size(0)),
      "popc::threshold_linear: ", threshold.numel(), " thresholds do not fit x ", x.sizes());
  TORCH_CHECK_VALUE(
      !bias || (bias->scalar_type() == x.scalar_type() && bias->numel() == outputs),
      "popc::threshold_linear: the bias does not fit the weight");
  const int64_t sequences = x.dim() > 1 ? x.size(0) : 1;
  const Rows centers(center, inputs, sequences, "center"), bases(base, outputs, sequences, "base");
  if (!is_served(x, weight) || x.numel() == 0 || weight.numel() == 0) {
    static auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("popc::threshold_linear_reference", "")
            .typed<Tensor(
                const Tensor&, const Tensor&, const MaybeTensor&, const Tensor&, const Tensor&,
                int64_t, const MaybeTensor&, const MaybeTensor&)>();
    return op.call(x, weight, bias, norm, threshold, out_dim, center, base);
  }
  const Tensor given = x.contiguous(), norms = norm.contiguous(), limits = threshold.contiguous();
  const int64_t tokens = x.numel() / inputs;
  const int64_t each = tokens / sequences;
  Tensor kept = at::empty(x.sizes(), x.options());
  auto sizes = x.sizes().vec();
  sizes.back() = outputs;
  Tensor y = at::empty(sizes, x.options());
  bool done = false;
  by_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto columns = keep<T>(
        given.const_data_ptr<T>(), tokens, inputs, norms.const_data_ptr<float>(), limits, centers,
        each, kept.data_ptr<T>());
    const Lines<T> lines = lines_of<T>(weight, out_dim);
    if (lines.by_output || tokens > most_tokens) return;
    const Tensor plus = bias ? bias->contiguous() : Tensor();
    const List chosen(columns.data(), columns.size(), inputs, "columns");
    sums(
        kept.const_data_ptr<T>(), inputs, tokens, lines, chosen,
        bias ? plus.const_data_ptr<T>() : nullptr, y.data_ptr<T>(),
        [&](int64_t n) { return bases.of(n / each); });
    done = true;
  });
  if (done) return y;
  // More tokens than share a reading, or a weight that lies the other way: nothing left to save.
  y = gather_linear(kept, weight, bias, std::nullopt, std::nullopt, out_dim);
  if (base) y.view({base->size(0), -1, outputs}).add_(base->unsqueeze(1));
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(popc, CPU, m) { m.impl("threshold_linear", threshold_linear); }

}  // namespace popc
