// Products of a few tokens with channel-major weights in planes, over ATen's threads: of each
// channel, every token reads nothing, the high plane or both.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "constants.h"
#include "dispatch.h"
#include "plane_axpy.h"
#include "plane_rows.h"
#include "sparse_gemv.h"
#include "vec.h"

namespace popc {

// What tokens read. `high` and `low` [tokens, inputs] hold a channel's value where that plane of it
// is read, else 0; `entries` lists, in order, the channels that any token reads: 2 · channel, plus
// 1 where any reads the low plane.
struct ChannelReads {
  const float* high;
  const float* low;
  int64_t tokens, inputs;
  const int32_t* entries;
  int64_t count;
};

// Turns entries into pairs of rows, R at a time. An entry that reads one plane waits for another.
template <int N, int R>
class PairReader {
 public:
  PairReader(const ChannelReads& reads, int64_t first, int64_t last, const PlaneRows& rows)
      : reads_(reads), next_(first), last_(last), rows_(rows), scale_size_(scale_bytes * rows.blocks()), zero_(rows.zero()),
        both_offset_(zero_ / 16.0f),
        high_offset_((zero_ - static_cast<float>(constants::midpoint)) / 16.0f) {
    if (rows.scales == nullptr) {
      ones_.assign(rows.blocks(), at::BFloat16(1.0f));
      scales_ = reinterpret_cast<const uint8_t*>(ones_.data());
      scale_stride_ = 0;
    } else {
      scales_ = rows.scales;
      scale_stride_ = rows.stride;
    }
  }

  // The next R pairs, prefetching their scales; false where none are left. Rows that are missing
  // are others once more, with factors of zero.
  bool read(PairBlock<R>& to) {
    int pair = 0;
    for (; pair < R && next_ < last_; ) {
      const int32_t entry = reads_.entries[next_++];
      const int64_t channel = entry >> 1;
      if ((entry & 1) != 0 && rows_.has_low()) {
        set_high(to, 2 * pair, channel, true);
        set_low(to, 2 * pair + 1, channel);
        ++pair;
      } else if (waiting_ >= 0) {
        set_high(to, 2 * pair, waiting_, false);
        set_high(to, 2 * pair + 1, channel, false);
        waiting_ = -1;
        ++pair;
      } else {
        waiting_ = channel;
      }
    }
    if (pair < R && waiting_ >= 0) {
      set_high(to, 2 * pair, waiting_, false);
      set_none(to, 2 * pair + 1, 2 * pair);
      waiting_ = -1;
      ++pair;
    }
    if (pair == 0) return false;
    for (int row = 2 * pair; row < 2 * R; ++row) set_none(to, row, 0);
    return true;
  }

 private:
  void set_high(PairBlock<R>& to, int row, int64_t channel, bool has_low) {
    const uint8_t* scales = scales_ + channel * scale_stride_;
    to.rows[row] = {scales, rows_.high + channel * rows_.stride};
    prefetch_bytes(scales, scale_size_);
    for (int n = 0; n < N; ++n) {
      const float value = reads_.high[n * reads_.inputs + channel];
      if (!rows_.has_low()) {
        to.factors[n][row] = {value, zero_};
        continue;
      }
      const bool both = has_low && reads_.low[n * reads_.inputs + channel] != 0.0f;
      to.factors[n][row] = {16.0f * value, both ? both_offset_ : high_offset_};
    }
  }
  void set_low(PairBlock<R>& to, int row, int64_t channel) {
    to.rows[row] = {scales_ + channel * scale_stride_, rows_.low + channel * rows_.stride};
    for (int n = 0; n < N; ++n) {
      to.factors[n][row] = {reads_.low[n * reads_.inputs + channel], 0.0f};
    }
  }
  void set_none(PairBlock<R>& to, int row, int like) {
    to.rows[row] = to.rows[like];
    for (int n = 0; n < N; ++n) to.factors[n][row] = {};
  }

  const ChannelReads& reads_;
  int64_t next_, last_;
  const PlaneRows& rows_;
  int64_t scale_size_;
  const float zero_, both_offset_, high_offset_;  // of a high nibble, with the low one or without
  std::vector<at::BFloat16> ones_;
  const uint8_t* scales_;
  int64_t scale_stride_;
  int64_t waiting_ = -1;  // a channel
};

// Adds entries [first, last) to the sums.
template <typename T, int N>
void add_entries(
    const ChannelReads& reads, int64_t first, int64_t last, const PlaneRows& rows, PlaneSums sums) {
  constexpr int R = pair_block<N>;
  using Kernel = PairKernel<std::is_same_v<T, float>>;
  // Sums of more outputs than these would outgrow L1.
  constexpr int64_t panel_blocks = 8192 / block_values;
  const std::unique_ptr<uint8_t[]> scratch(
      new uint8_t[Kernel::scratch_size(N, R, std::min(rows.blocks(), panel_blocks))]);
  PairBlock<R> blocks[2];
  for (int64_t from = 0; from < rows.blocks(); from += panel_blocks) {
    const PlaneRows panel = rows.panel(from, std::min(rows.blocks(), from + panel_blocks));
    const PlaneSums to{
        sums.values + from * block_values, sums.corrections + from, sums.value_stride,
        sums.correction_stride};
    PairReader<N, R> reader(reads, first, last, panel);
    int current = 0;
    bool more = reader.read(blocks[current]);
    while (more) {
      const int next = 1 - current;
      more = reader.read(blocks[next]);
      Kernel::template add<N, R>(
          blocks[current], blocks[more ? next : current], panel.blocks(), to, scratch.get());
      current = next;
    }
  }
}

// f(index in lane order, index in order, count) for each run of neighbouring outputs of a block.
template <typename F>
void for_lane_runs(int64_t block, int64_t length, F&& f) {
  const int64_t chunk = block / chunk_blocks, lane = block % chunk_blocks * block_dwords;
  for (int64_t j = 0; j < dword_nibbles; ++j) {
    const int64_t output = block * block_values + j * block_dwords;
    const int64_t count = std::min(block_dwords, length - output);
    if (count <= 0) return;
    f(chunk * chunk_values + j * chunk_lanes + lane, output, count);
  }
}

// One weight of plane_gemv() and its output; base_of(n) is a row in float32 or nullptr.
template <typename T, typename F>
struct PlaneOutput {
  PlaneRows rows;
  ScaleGroups groups;
  const T* bias;
  F base_of;
  T* y;

  int64_t value_stride() const { return round_up(rows.blocks(), chunk_blocks) * block_values; }
  int64_t correction_stride() const { return round_up(rows.blocks(), factor_blocks); }
  int64_t sum_size(int64_t tokens) const {
    return tokens * (value_stride() + correction_stride());
  }
  PlaneSums sums(float* from, int64_t tokens) const {
    return {from, from + tokens * value_stride(), value_stride(), correction_stride()};
  }
};

// Entries [first, last) of a weight whose scales stand outside of its rows: group by group, as a
// group's sum of integers is scaled as a whole.
template <typename T, int N, typename F>
void add_groups(
    const ChannelReads& reads, int64_t first, int64_t last, const PlaneOutput<T, F>& output,
    PlaneSums totals) {
  const ScaleGroups& groups = output.groups;
  const int64_t length = output.rows.length;
  std::vector<float> buffer(output.sum_size(N));
  const PlaneSums sums = output.sums(buffer.data(), N);
  while (first < last) {
    const int64_t group = (reads.entries[first] >> 1) / groups.inputs;
    const auto end = std::lower_bound(
        reads.entries + first, reads.entries + last, 2 * (group + 1) * groups.inputs);
    std::fill(buffer.begin(), buffer.end(), 0.0f);
    add_entries<T, N>(reads, first, end - reads.entries, output.rows, sums);
    const float* scale = groups.scale + group * length;
    const float* zero = groups.zero ? groups.zero + group * length : nullptr;
    for (int n = 0; n < N; ++n) {
      float read = 0.0f;
      for (int64_t i = first; i < end - reads.entries; ++i) {
        read += reads.high[n * reads.inputs + (reads.entries[i] >> 1)];
      }
      const float* values = sums.values + n * sums.value_stride;
      float* to = totals.values + n * totals.value_stride;
      for (int64_t b = 0; b < output.rows.blocks(); ++b) {
        const float correction = sums.corrections[n * sums.correction_stride + b];
        for_lane_runs(b, length, [&](int64_t lane, int64_t out, int64_t count) {
          for (int64_t i = 0; i < count; ++i) {
            const float offset = zero ? read * (zero[out + i] - output.rows.zero()) : 0.0f;
            to[lane + i] += scale[out + i] * (values[lane + i] - correction - offset);
          }
        });
      }
    }
    first = end - reads.entries;
  }
}

// y[first, last) = the sums of all threads + bias + base, block by block.
template <typename T>
void write_blocks(
    const float* values, const float* corrections, int64_t threads, int64_t thread_stride,
    int64_t first, int64_t last, int64_t length, const T* bias, const float* base, T* y) {
  for (int64_t b = first; b < last; ++b) {
    float correction = 0.0f;
    for (int64_t t = 0; t < threads; ++t) correction += corrections[t * thread_stride + b];
    for_lane_runs(b, length, [&](int64_t lane, int64_t out, int64_t count) {
      float sum[block_dwords];
      for (int64_t i = 0; i < count; ++i) sum[i] = values[lane + i] - correction;
      for (int64_t t = 1; t < threads; ++t) {
        for (int64_t i = 0; i < count; ++i) sum[i] += values[t * thread_stride + lane + i];
      }
      for (int64_t i = 0; i < count; ++i) {
        if (bias) sum[i] += static_cast<float>(bias[out + i]);
        if (base) sum[i] += base[out + i];
        y[out + i] = static_cast<T>(sum[i]);
      }
    });
  }
}

// All `outputs`, for up to max_tokens tokens, in one pass: each thread adds up its share of the
// entries, then the threads' sums are added up in a fixed order.
template <typename T, typename F>
void plane_gemv(const ChannelReads& reads, const std::vector<PlaneOutput<T, F>>& outputs) {
  int64_t size = 0, bytes = 0, blocks = 0;
  for (const auto& output : outputs) {
    size += output.sum_size(reads.tokens);
    bytes += output.rows.row_bytes();
    blocks += reads.tokens * output.rows.blocks();
  }
  const int64_t threads = threads_for(reads.count, bytes);
  const std::unique_ptr<float[]> sums(new float[threads * size]);
  dispatch_tokens(reads.tokens, [&](auto count) {
    constexpr int N = decltype(count)::value;
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first = reads.count * t / threads, last = reads.count * (t + 1) / threads;
        float* to = sums.get() + t * size;
        std::fill_n(to, size, 0.0f);
        for (const auto& output : outputs) {
          const PlaneSums part = output.sums(to, N);
          if (output.groups.scale) {
            add_groups<T, N>(reads, first, last, output, part);
          } else {
            add_entries<T, N>(reads, first, last, output.rows, part);
          }
          to += output.sum_size(N);
        }
      }
    });
  });
  const int64_t grain = 1 + sum_grain_bytes / (threads * block_values * int64_t{sizeof(float)});
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    const float* from = sums.get();
    int64_t start = 0;
    for (const auto& output : outputs) {
      const PlaneSums part = output.sums(const_cast<float*>(from), reads.tokens);
      const int64_t width = output.rows.blocks(), length = output.rows.length;
      for (int64_t n = 0; n < reads.tokens; ++n, start += width) {
        const int64_t first = std::max<int64_t>(begin - start, 0);
        const int64_t last = std::min<int64_t>(end - start, width);
        if (first >= last) continue;
        write_blocks<T>(
            part.values + n * part.value_stride, part.corrections + n * part.correction_stride,
            threads, size, first, last, length, output.bias, output.base_of(n),
            output.y + n * length);
      }
      from += output.sum_size(reads.tokens);
    }
  });
}

}  // namespace popc
