// popc::threshold_linear on CPUs. See popc/ops/threshold.py for what it means.

#include <cmath>

namespace popc {
namespace {

// x without the channels that do not count; returns the channels that count for any token.
template <typename T>
std::vector<int64_t> keep(
    const T* x, int64_t tokens, int64_t inputs, const float* norm, const float* threshold,
    int64_t tokens_each, T* kept) {
  std::vector<char> any(inputs, 0);
  for (int64_t n = 0; n < tokens; ++n) {
    const float limit = threshold[tokens_each ? n / tokens_each : 0];
    for (int64_t c = 0; c < inputs; ++c) {
      const T value = x[n * inputs + c];
      const bool counts = !(std::fabs(static_cast<float>(value)) * norm[c] <= limit);
      kept[n * inputs + c] = counts ? value : T(0);
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
    const Tensor& threshold, int64_t out_dim) {
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
  if (!is_served(x, weight) || x.numel() == 0 || weight.numel() == 0) {
    static auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("popc::threshold_linear_reference", "")
            .typed<Tensor(
                const Tensor&, const Tensor&, const MaybeTensor&, const Tensor&, const Tensor&,
                int64_t)>();
    return op.call(x, weight, bias, norm, threshold, out_dim);
  }
  const Tensor given = x.contiguous(), norms = norm.contiguous(), limits = threshold.contiguous();
  const int64_t tokens = x.numel() / inputs;
  const int64_t each = limits.numel() == 1 ? 0 : tokens / limits.numel();
  Tensor kept = at::empty(x.sizes(), x.options());
  auto sizes = x.sizes().vec();
  sizes.back() = outputs;
  Tensor y = at::empty(sizes, x.options());
  bool done = false;
  by_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto columns = keep<T>(
        given.const_data_ptr<T>(), tokens, inputs, norms.const_data_ptr<float>(),
        limits.const_data_ptr<float>(), each, kept.data_ptr<T>());
    const Lines<T> lines = lines_of<T>(weight, out_dim);
    if (lines.by_output || tokens > most_tokens) return;
    const Tensor plus = bias ? bias->contiguous() : Tensor();
    const List chosen(columns.data(), columns.size(), inputs, "columns");
    sums(
        kept.const_data_ptr<T>(), inputs, tokens, lines, chosen,
        bias ? plus.const_data_ptr<T>() : nullptr, y.data_ptr<T>());
    done = true;
  });
  if (done) return y;
  // More tokens than share a reading, or a weight that lies the other way: nothing left to save.
  return gather_linear(kept, weight, bias, std::nullopt, std::nullopt, out_dim);
}

}  // namespace

TORCH_LIBRARY_IMPL(popc, CPU, m) { m.impl("threshold_linear", threshold_linear); }

}  // namespace popc
