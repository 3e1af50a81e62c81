// popc::quantize and popc::dequantize on CPUs. See popc/ops/planes.py for the format.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <optional>
#include <vector>

#include "constants.h"
#include "dispatch.h"
#include "plane_expand.h"
#include "plane_rows.h"
#include "vec.h"

namespace popc::quantize {
namespace {

// Rows are quantised side by side, one in each lane, so that a block's steps need no shuffles.
constexpr int64_t tile_rows = 16, strip_rows = 64;  // a strip of tiles uses whole cache lines
constexpr int64_t vectors = tile_rows / lanes;
using Tile = float[block_values][tile_rows];

// Where the values of a weight's rows lie.
template <typename T>
struct Source {
  const T* data;
  int64_t row_stride, value_stride, rows, length;
};

// Block b of the rows from r on; zeros beyond the last ones.
template <typename T>
void load_tile(const Source<T>& source, int64_t r, int64_t b, Tile& tile) {
  const int64_t rows = std::min(tile_rows, source.rows - r);
  const int64_t first = b * block_values;
  const int64_t values = std::min(block_values, source.length - first);
  if (rows < tile_rows || values < block_values) std::memset(tile, 0, sizeof(tile));
  const T* from = source.data + r * source.row_stride + first * source.value_stride;
  if (source.row_stride == 1 && rows == tile_rows) {
    for (int64_t v = 0; v < values; ++v, from += source.value_stride) {
      for (int64_t i = 0; i < tile_rows; i += pair_lanes) {
        if constexpr (pair_lanes <= tile_rows) {
          const auto [low, high] = load_ordered_pair(from + i);
          low.store(tile[v] + i);
          high.store(tile[v] + i + lanes);
        } else {
          for (int64_t n = 0; n < tile_rows; ++n) tile[v][n] = static_cast<float>(from[n]);
        }
      }
    }
    return;
  }
  for (int64_t i = 0; i < rows; ++i, from += source.row_stride) {
    for (int64_t v = 0; v < values; ++v) {
      tile[v][i] = static_cast<float>(from[v * source.value_stride]);
    }
  }
}

float round_up_to_bfloat16(float value) {
  if (value != value) return value;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = (bits + 0xffffu) & 0xffff0000u;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

// Of the rows of one vector, the scales and integers of a block.
struct Quantized {
  Vec scale;
  Vec integers[block_values];
};

Vec largest(const Tile& tile, int64_t lane) {
  Vec result(0.0f);
  for (const auto& values : tile) {
    result = at::vec::maximum(result, Vec::loadu(values + lane).abs());  // a NaN stays
  }
  return result;
}

template <typename F>
Vec map_lanes(const Vec& values, F&& f) {
  float each[lanes];
  values.store(each);
  for (float& value : each) value = f(value);
  return Vec::loadu(each);
}

// The integers that are nearest with this scale; `zero` where it is none.
Vec nearest(const Vec& value, const Vec& scale, float zero, float least, float most) {
  const Vec none(0.0f);
  const Vec ratio = Vec::blendv(none, value / scale, scale > none);
  return at::vec::clamp((ratio + Vec(zero)).round(), Vec(least), Vec(most));
}

void quantize_both(const Tile& tile, int64_t lane, Quantized& to) {
  to.scale = map_lanes(largest(tile, lane) / Vec(127.0f), round_up_to_bfloat16);
  const Vec zero(static_cast<float>(constants::zero));
  for (int64_t v = 0; v < block_values; ++v) {
    to.integers[v] =
        nearest(Vec::loadu(tile[v] + lane), to.scale, 0.0f, -127.0f, 127.0f) + zero;
  }
}

void quantize_one(const Tile& tile, int64_t lane, Quantized& to) {
  constexpr float zero = static_cast<float>(constants::plane_zero);
  const Vec whole = largest(tile, lane) / Vec(zero);
  Vec least_error(0.0f);
  for (size_t i = 0; i < std::size(constants::clips); ++i) {
    const Vec clip(static_cast<float>(constants::clips[i]));
    const Vec scale = map_lanes(
        whole * clip, [](float value) { return static_cast<float>(at::BFloat16(value)); });
    Vec error(0.0f), integers[block_values];
    for (int64_t v = 0; v < block_values; ++v) {
      const Vec value = Vec::loadu(tile[v] + lane);
      integers[v] = nearest(value, scale, zero, 0.0f, 15.0f);
      const Vec difference = (integers[v] - Vec(zero)) * scale - value;
      error = error + difference * difference;
    }
    if (i == 0) {
      to.scale = scale;
      least_error = error;
      std::copy_n(integers, block_values, to.integers);
      continue;
    }
    const Vec less = error < least_error;
    to.scale = Vec::blendv(to.scale, scale, less);
    least_error = Vec::blendv(least_error, error, less);
    for (int64_t v = 0; v < block_values; ++v) {
      to.integers[v] = Vec::blendv(to.integers[v], integers[v], less);
    }
  }
}

// One plane of a block, for the rows of a vector: dwords[i][lane], nibble j of which is value
// 4j + i of `nibbles`. Sums of nibbles times powers of 16 are exact in float32, 16 bits at a time.
void pack_dwords(const Vec* nibbles, uint32_t (&dwords)[block_dwords][lanes]) {
  for (int64_t i = 0; i < block_dwords; ++i) {
    float halves[2][lanes];
    for (int64_t half = 0; half < 2; ++half) {
      const auto nibble = [&](int64_t j) { return nibbles[block_dwords * (4 * half + j) + i]; };
      Vec sum = nibble(3);
      for (int64_t j = 2; j >= 0; --j) sum = sum * Vec(16.0f) + nibble(j);
      sum.store(halves[half]);
    }
    for (int64_t lane = 0; lane < lanes; ++lane) {
      dwords[i][lane] = static_cast<uint32_t>(static_cast<int32_t>(halves[0][lane])) |
          static_cast<uint32_t>(static_cast<int32_t>(halves[1][lane])) << 16;
    }
  }
}

// Where packed rows lie: the scales, the high plane and, of two planes, the low one.
struct Target {
  uint8_t* data;
  int64_t row_bytes, blocks, planes;

  uint8_t* scale(int64_t r, int64_t b) const { return data + r * row_bytes + scale_bytes * b; }
  uint8_t* plane(int64_t r, int64_t b, int64_t which) const {
    return data + r * row_bytes + blocks * (scale_bytes + which * plane_bytes) + plane_bytes * b;
  }
};

void store_plane(
    const Vec* nibbles, const Target& to, int64_t r, int64_t rows, int64_t b, int64_t which) {
  uint32_t dwords[block_dwords][lanes];
  pack_dwords(nibbles, dwords);
  for (int64_t lane = 0; lane < rows; ++lane) {
    uint32_t row[block_dwords];
    for (int64_t i = 0; i < block_dwords; ++i) row[i] = dwords[i][lane];
    std::memcpy(to.plane(r + lane, b, which), row, plane_bytes);
  }
}

template <typename T>
void quantize_tile(const Source<T>& source, const Target& to, int64_t first, int64_t b) {
  Tile tile;
  load_tile(source, first, b, tile);
  for (int64_t lane = 0; lane < tile_rows; lane += lanes) {
    const int64_t r = first + lane, rows = std::min<int64_t>(lanes, source.rows - r);
    if (rows <= 0) return;
    Quantized block;
    to.planes == 2 ? quantize_both(tile, lane, block) : quantize_one(tile, lane, block);
    float scales[lanes];
    block.scale.store(scales);
    for (int64_t i = 0; i < rows; ++i) {
      const at::BFloat16 scale(scales[i]);
      std::memcpy(to.scale(r + i, b), &scale, sizeof(scale));
    }
    if (to.planes == 2) {
      Vec low[block_values];
      for (int64_t v = 0; v < block_values; ++v) {
        const Vec high = (block.integers[v] * Vec(1.0f / 16.0f)).floor();
        low[v] = block.integers[v] - high * Vec(16.0f);
        block.integers[v] = high;
      }
      store_plane(low, to, r, rows, b, 1);
    }
    store_plane(block.integers, to, r, rows, b, 0);
  }
}

Tensor quantize(const Tensor& w, int64_t row_dim, int64_t planes) {
  constexpr const char* op = "popc::quantize";
  TORCH_CHECK_VALUE(
      (w.dim() == 2 || w.dim() == 3) && w.is_floating_point(), op,
      " takes floats [N, K] or [E, N, K], not ", w.scalar_type(), " ", w.sizes());
  TORCH_CHECK_VALUE(
      (row_dim == 0 || row_dim == 1) && (planes == 1 || planes == 2), op,
      ": row_dim is 0 or 1 and planes 1 or 2, not ", row_dim, " and ", planes);
  const Tensor values = is_supported_dtype(w.scalar_type()) ? w : w.to(at::kFloat);
  const int64_t rank = w.dim(), experts = rank == 3 ? w.size(0) : 1;
  const int64_t of_rows = row_dim == 1 ? rank - 1 : rank - 2;
  const int64_t of_values = row_dim == 1 ? rank - 2 : rank - 1;
  const int64_t rows = w.size(of_rows), length = w.size(of_values);
  const int64_t blocks = (length + block_values - 1) / block_values;
  const int64_t row_bytes = blocks * (scale_bytes + planes * plane_bytes);
  std::vector<int64_t> sizes = {rows, row_bytes};
  if (rank == 3) sizes.insert(sizes.begin(), experts);
  const Tensor packed = at::empty(sizes, w.options().dtype(at::kByte));
  if (packed.numel() == 0) return packed;
  const int64_t strips = (rows + strip_rows - 1) / strip_rows;
  dispatch_dtype(values.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* data = values.const_data_ptr<T>();
    uint8_t* to = packed.data_ptr<uint8_t>();
    at::parallel_for(0, experts * strips, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t e = i / strips, first = i % strips * strip_rows;
        const Source<T> source{
            data + (rank == 3 ? e * values.stride(0) : 0), values.stride(of_rows),
            values.stride(of_values), rows, length};
        const Target target{to + e * rows * row_bytes, row_bytes, blocks, planes};
        for (int64_t b = 0; b < blocks; ++b) {
          for (int64_t r = first; r < std::min(rows, first + strip_rows); r += tile_rows) {
            quantize_tile(source, target, r, b);
          }
        }
      }
    });
  });
  return packed;
}

Tensor run_reference(
    const Tensor& packed, const MaybeTensor& scale, const MaybeTensor& zero,
    c10::SymIntArrayRef sizes, int64_t row_dim, int64_t planes, at::ScalarType dtype,
    int64_t bits) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("popc::dequantize_reference", "")
                       .typed<Tensor(
                           const Tensor&, const MaybeTensor&, const MaybeTensor&,
                           c10::SymIntArrayRef, int64_t, int64_t, at::ScalarType, int64_t)>();
  return op.call(packed, scale, zero, sizes, row_dim, planes, dtype, bits);
}

Tensor dequantize(
    const Tensor& packed, const MaybeTensor& scale, const MaybeTensor& zero,
    c10::SymIntArrayRef symbolic_sizes, int64_t row_dim, int64_t planes, at::ScalarType dtype,
    int64_t bits) {
  constexpr const char* op = "popc::dequantize";
  const auto sizes = C10_AS_INTARRAYREF_SLOW(symbolic_sizes);
  TORCH_CHECK_VALUE(
      (sizes.size() == 2 || sizes.size() == 3) && (row_dim == 0 || row_dim == 1) &&
          (bits == 4 || bits == 8),
      op, " takes sizes [N, K] or [E, N, K], row_dim 0 or 1 and bits 4 or 8, not ", sizes, ", ",
      row_dim, " and ", bits);
  if (!is_supported_dtype(dtype)) {
    return run_reference(packed, scale, zero, symbolic_sizes, row_dim, planes, dtype, bits);
  }
  const bool stacked = sizes.size() == 3;
  const int64_t experts = stacked ? sizes[0] : 1;
  const int64_t outputs = sizes[sizes.size() - 2], inputs = sizes[sizes.size() - 1];
  const int64_t count = row_dim == 1 ? inputs : outputs, length = row_dim == 1 ? outputs : inputs;
  TORCH_CHECK_VALUE(
      !stacked || (packed.dim() == 3 && packed.size(0) == experts), op, ": packed must be [",
      experts, ", rows, bytes], not ", packed.sizes());
  const Tensor values =
      at::empty({experts, count, length}, packed.options().dtype(dtype));
  for (int64_t e = 0; e < experts; ++e) {
    const auto part = [&](const MaybeTensor& values) {
      return values && stacked ? MaybeTensor(values->select(0, e)) : values;
    };
    const ScaleTensors scales(op, part(scale), part(zero), outputs, inputs);
    const PlaneRows rows = plane_rows(
        op, stacked ? packed.select(0, e) : packed, count, length, planes, !scale.has_value());
    dispatch_dtype(dtype, [&](auto type) {
      using T = decltype(type);
      T* to = values.data_ptr<T>() + e * count * length;
      at::parallel_for(0, count, 1 + (1 << 14) / (length + 1), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          expand_row<T>(
              rows, scales.groups(), row_dim, r, 0, rows.blocks(), bits == 8, to + r * length);
        }
      });
    });
  }
  const Tensor shaped = stacked ? values : values.squeeze(0);
  return row_dim == 1 ? shaped.transpose(-1, -2) : shaped;
}

TORCH_LIBRARY_IMPL(popc, CPU, m) {
  m.impl("quantize", quantize);
  m.impl("dequantize", dequantize);
}

}  // namespace
}  // namespace popc::quantize
