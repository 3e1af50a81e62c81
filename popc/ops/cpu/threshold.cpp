// popc::threshold_linear and popc::threshold_linears on CPUs. See popc/ops/threshold.py for what
// they mean.

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "gather.h"
#include "lines.h"

namespace popc::threshold {
namespace {

// A row of `width` values for each sequence, or one for all; nullptr where there are none. They stand
// in longer rows, `from` on.
struct Rows {
  Tensor held;
  int64_t from = 0, step = 0;

  Rows(
      const MaybeTensor& values, int64_t from, int64_t width, int64_t sequences, const char* name)
      : from(from) {
    if (!values) return;
    TORCH_CHECK_VALUE(
        values->scalar_type() == at::kFloat && values->dim() == 2 && from >= 0 &&
            from + width <= values->size(1) &&
            (values->size(0) == 1 || values->size(0) == sequences),
        "popc::threshold_linear: ", name, " must be float32 [1 or B, ", from + width,
        " or more], not ", values->scalar_type(), " ", values->sizes());
    held = values->contiguous();
    if (values->size(0) > 1) step = values->size(1);
  }
  const float* of(int64_t sequence) const {
    return held.defined() ? held.const_data_ptr<float>() + sequence * step + from : nullptr;
  }
};

// One token's x - center without the channels that do not count; of those that do, the bits of
// `left` become 0. Without branches, as every second one would be foretold wrongly.
template <typename T, bool centered>
void keep_row(
    const T* __restrict x, const float* __restrict center, const float* __restrict norm,
    float limit, int64_t inputs, T* __restrict kept, int32_t* __restrict left) {
  const Lanes limits(limit), zero(0.0f);
  const auto keep = [&](Lanes value, int64_t c) {
    if constexpr (centered) value = value - Lanes::loadu(center + c);
    const Lanes leaves = value.abs() * Lanes::loadu(norm + c) <= limits;  // a NaN counts
    (Lanes::loadu(left + c) & leaves).store(left + c);
    return Lanes::blendv(value, zero, leaves);
  };
  int64_t c = 0;
  for (; c + step <= inputs; c += step) {
    const auto [low, high] = load_plain(x + c);
    store_plain(keep(low, c), keep(high, c + lanes), kept + c);
  }
  for (; c < inputs; ++c) {
    float value = static_cast<float>(x[c]);
    if constexpr (centered) value -= center[c];
    const bool leaves = std::fabs(value) * norm[c] <= limit;
    kept[c] = static_cast<T>(leaves ? 0.0f : value);
    left[c] &= -static_cast<int32_t>(leaves);
  }
}

constexpr int64_t least_kept = 1 << 13;  // values for a thread

// The same for all tokens; returns the channels that count for any of them.
template <typename T>
std::vector<int64_t> keep(
    const T* x, int64_t tokens, int64_t inputs, const float* norm, const float* limits,
    int64_t limit_count, const Rows& centers, int64_t each, T* kept) {
  std::vector<int32_t> left(inputs, -1);
  at::parallel_for(0, inputs, 1 + least_kept / tokens, [&](int64_t begin, int64_t end) {
    for (int64_t n = 0; n < tokens; ++n) {
      const float limit = limits[limit_count > 1 ? n / each : 0];
      const float* center = centers.of(n / each);
      const auto row = center ? keep_row<T, true> : keep_row<T, false>;
      const int64_t at = n * inputs + begin;
      row(x + at, center ? center + begin : nullptr, norm + begin, limit, end - begin, kept + at,
          left.data() + begin);
    }
  });
  std::vector<int64_t> columns(inputs);
  int64_t count = 0;
  for (int64_t c = 0; c < inputs; ++c) {
    columns[count] = c;
    count += 1 + left[c];
  }
  columns.resize(count);
  return columns;
}

// What linears of one input have in common, and where their own part of it begins.
struct Given {
  const Tensor& x;
  const Tensor& norm;
  const Tensor& threshold;
  const MaybeTensor& center;
  const MaybeTensor& base;
  int64_t group, channel, output;

  int64_t inputs() const { return x.size(-1); }
  int64_t tokens() const { return x.numel() / inputs(); }
  int64_t sequences() const { return x.dim() > 1 ? x.size(0) : 1; }
  int64_t limit_count() const { return threshold.dim() > 0 ? threshold.size(-1) : 1; }
};

struct Product {
  Tensor weight;
  MaybeTensor bias;
  int64_t out_dim;
  int64_t at = 0;  // where its outputs stand among those of all: run() says

  int64_t outputs() const { return weight.size(out_dim); }
};

void check(const Given& given, const std::vector<Product>& products) {
  const Tensor& x = given.x;
  TORCH_CHECK_TYPE(
      given.norm.scalar_type() == at::kFloat && given.threshold.scalar_type() == at::kFloat,
      "popc::threshold_linear: norm and threshold must be float32");
  for (const Product& product : products) {
    TORCH_CHECK_VALUE(
        product.weight.dim() == 2 && x.dim() >= 1 && (product.out_dim == 0 || product.out_dim == 1),
        "popc::threshold_linear takes x [..., K] and weights of two dims, not ", x.sizes(), " and ",
        product.weight.sizes());
    const int64_t inputs = product.weight.size(1 - product.out_dim);
    TORCH_CHECK_VALUE(
        x.size(-1) == inputs && given.channel >= 0 && given.norm.dim() == 1 &&
            given.channel + inputs <= given.norm.numel(),
        "popc::threshold_linear: x has ", x.size(-1), " channels, norm ", given.norm.sizes(),
        " from ", given.channel, " on, the weight ", inputs);
    TORCH_CHECK_VALUE(
        !product.bias || (product.bias->scalar_type() == x.scalar_type() &&
                          product.bias->numel() == product.outputs()),
        "popc::threshold_linear: the bias does not fit the weight");
  }
  const int64_t count = given.limit_count();
  const int64_t groups = given.threshold.dim() > 1 ? given.threshold.size(0) : 1;
  TORCH_CHECK_VALUE(
      given.threshold.dim() <= 2 && (count == 1 || (x.dim() > 1 && count == x.size(0))) &&
          given.group >= 0 && given.group < groups,
      "popc::threshold_linear: thresholds ", given.threshold.sizes(), " do not fit x ", x.sizes(),
      " of group ", given.group);
}

// One after the other by the reference, for types and layouts that no kernel is made for.
std::vector<Tensor> by_reference(const Given& given, const std::vector<Product>& products) {
  static auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("popc::threshold_linear_reference", "")
          .typed<Tensor(
              const Tensor&, const Tensor&, const MaybeTensor&, const Tensor&, const Tensor&,
              int64_t, const MaybeTensor&, const MaybeTensor&, int64_t, int64_t, int64_t)>();
  std::vector<Tensor> found;
  for (const Product& product : products) {
    found.push_back(op.call(
        given.x, product.weight, product.bias, given.norm, given.threshold, product.out_dim,
        given.center, given.base, given.group, given.channel, given.output + product.at));
  }
  return found;
}

// What counts is chosen once; its lines of all the weights are then read together.
std::vector<Tensor> run(const Given& given, std::vector<Product> products) {
  check(given, products);
  int64_t outputs = 0;
  bool served = given.x.numel() > 0;
  for (Product& product : products) {
    product.at = outputs;
    outputs += product.outputs();
    served = served && product.weight.numel() > 0 && is_served(given.x, product.weight);
  }
  const int64_t inputs = given.inputs(), sequences = given.sequences();
  const Rows centers(given.center, given.channel, inputs, sequences, "center");
  const Rows bases(given.base, given.output, outputs, sequences, "base");
  if (!served) return by_reference(given, products);
  const Tensor x = given.x.contiguous(), norms = given.norm.contiguous();
  const Tensor limits = given.threshold.contiguous();
  const int64_t tokens = given.tokens(), each = tokens / sequences;
  Tensor kept = at::empty(x.sizes(), x.options());
  std::vector<Tensor> found, biases;
  bool done = false;
  by_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto columns = keep<T>(
        x.const_data_ptr<T>(), tokens, inputs, norms.const_data_ptr<float>() + given.channel,
        limits.const_data_ptr<float>() + given.group * given.limit_count(), given.limit_count(),
        centers, each, kept.data_ptr<T>());
    const auto base_at = [&](int64_t at) {
      return [&bases, each, at](int64_t n) {
        const float* base = bases.of(n / each);
        return base ? base + at : nullptr;
      };
    };
    std::vector<Sum<T, decltype(base_at(0))>> wanted;
    for (const Product& product : products) {
      const Lines<T> lines = lines_of<T>(product.weight, product.out_dim);
      if (lines.by_output || tokens > most_tokens) return;
      if (product.bias) biases.push_back(product.bias->contiguous());
      found.push_back(at::empty(output_sizes(x, product.outputs()), x.options()));
      wanted.push_back(
          {lines, product.bias ? biases.back().const_data_ptr<T>() : nullptr,
           base_at(product.at), found.back().data_ptr<T>()});
    }
    const List chosen(columns.data(), columns.size(), inputs, "columns");
    sums(kept.const_data_ptr<T>(), inputs, tokens, chosen, wanted);
    done = true;
  });
  if (done) return found;
  // More tokens than share a reading, or a weight that lies the other way: nothing left to save.
  found.clear();
  for (const Product& product : products) {
    found.push_back(gather_linear(
        kept, product.weight, product.bias, std::nullopt, std::nullopt, product.out_dim));
    if (given.base) {
      const Tensor base = given.base->narrow(1, given.output + product.at, product.outputs());
      found.back().view({base.size(0), -1, product.outputs()}).add_(base.unsqueeze(1));
    }
  }
  return found;
}

Tensor threshold_linear(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& norm,
    const Tensor& threshold, int64_t out_dim, const MaybeTensor& center, const MaybeTensor& base,
    int64_t group, int64_t channel, int64_t output) {
  const Given given{x, norm, threshold, center, base, group, channel, output};
  return run(given, {{weight, bias, out_dim}}).front();
}

std::vector<Tensor> threshold_linears(
    const Tensor& x, at::TensorList weights, const c10::List<MaybeTensor>& biases,
    const Tensor& norm, const Tensor& threshold, at::IntArrayRef out_dims,
    const MaybeTensor& center, const MaybeTensor& base, int64_t group, int64_t channel,
    int64_t output) {
  TORCH_CHECK_VALUE(
      !weights.empty() && weights.size() == biases.size() && weights.size() == out_dims.size(),
      "popc::threshold_linears: ", weights.size(), " weights, ", biases.size(), " biases and ",
      out_dims.size(), " out_dims do not go together");
  std::vector<Product> products;
  for (size_t i = 0; i < weights.size(); ++i) {
    products.push_back({weights[i], biases.get(i), out_dims[i]});
  }
  return run({x, norm, threshold, center, base, group, channel, output}, products);
}

}  // namespace

TORCH_LIBRARY_IMPL(popc, CPU, m) {
  m.impl("threshold_linear", threshold_linear);
  m.impl("threshold_linears", threshold_linears);
}

}  // namespace popc::threshold
