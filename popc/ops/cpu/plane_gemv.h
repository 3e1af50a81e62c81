// Products of a few tokens with channel-major weights in planes, over ATen's threads: of each
// channel, every token reads nothing, the high plane or both.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
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

// The bfloat16 scales of a panel of rows, or ones where they stand outside of rows.
class RowScales {
 public:
  explicit RowScales(const PlaneRows& rows) : from_(rows.scales), stride_(rows.stride) {
    if (from_ != nullptr) return;
    ones_.assign(rows.blocks(), at::BFloat16(1.0f));
    from_ = reinterpret_cast<const uint8_t*>(ones_.data());
    stride_ = 0;
  }
  const uint8_t* of(int64_t row) const { return from_ + row * stride_; }

 private:
  std::vector<at::BFloat16> ones_;
  const uint8_t* from_;
  int64_t stride_;
};

// What the kernel takes the integer for that stands for zero.
inline float kernel_zero(const PlaneRows& rows) {
  return static_cast<float>(rows.has_low() ? constants::zero : constants::plane_zero);
}

// One weight's share of a thread's sums.
struct PlaneTask {
  PlaneRows rows;
  PlaneSums sums;
};

// The rows that entries [first, last) read, of one weight after the other, in groups: first those of
// both planes, then those of the high one. A group takes one row of each sixteenth of them, so that
// the hardware sees as many streams, each in order.
class RowReader {
 public:
  RowReader(
      const ChannelReads& reads, int64_t first, int64_t last, const std::vector<PlaneTask>& tasks)
      : reads_(reads) {
    for (std::vector<int32_t>* list : {&both_, &high_, &all_}) list->reserve(last - first);
    for (int64_t i = first; i < last; ++i) {
      const int32_t channel = reads.entries[i] >> 1;
      all_.push_back(channel);
      const bool has_low = (reads.entries[i] & 1) != 0;
      if (has_low) both_.push_back(channel);
      if (!has_low || (reads.tokens > 1 && is_read_without_low(channel))) high_.push_back(channel);
    }
    // Sums of more outputs than these would outgrow L1.
    constexpr int64_t panel_blocks = 8192 / block_values;
    for (const PlaneTask& task : tasks) {
      for (int64_t from = 0; from < task.rows.blocks(); from += panel_blocks) {
        const int64_t to = std::min(task.rows.blocks(), from + panel_blocks);
        const PlaneTask panel{task.rows.panel(from, to), task.sums.from_block(from)};
        for (bool has_low : {true, false}) {
          const auto& channels = !task.rows.has_low() ? all_ : has_low ? both_ : high_;
          if (task.rows.has_low() || !has_low) parts_.emplace_back(panel, has_low, channels);
        }
      }
    }
  }

  // False where no rows are left.
  bool read(RowGroup& to) {
    for (; part_ < parts_.size(); ++part_, group_ = 0) {
      const Part& part = parts_[part_];
      const size_t count = part.channels.size(), groups = (count + group_rows - 1) / group_rows;
      if (group_ == groups) continue;
      describe(part, to);
      to.count = 0;
      for (size_t i = group_; i < count; i += groups) set(part, part.channels[i], to, to.count++);
      to.quads = (to.count + quad_rows - 1) / quad_rows;
      // Filled up with a row once more, of factors of zero.
      for (int row = to.count; row < group_rows; ++row) {
        to.rows[row] = to.rows[0];
        for (int64_t n = 0; n < reads_.tokens; ++n) to.factors[n][row] = 0.0f;
      }
      ++group_;
      return true;
    }
    return false;
  }

 private:
  // Of a panel, the rows of both planes or those of one.
  struct Part {
    PlaneTask panel;
    bool has_low;
    const std::vector<int32_t>& channels;
    RowScales scales;

    Part(const PlaneTask& of, bool low, const std::vector<int32_t>& listed)
        : panel(of), has_low(low), channels(listed), scales(of.rows) {}
  };

  bool is_read_without_low(int64_t channel) const {
    for (int64_t n = 0; n < reads_.tokens; ++n) {
      const int64_t at = n * reads_.inputs + channel;
      if (reads_.low[at] == 0.0f && reads_.high[at] != 0.0f) return true;
    }
    return false;
  }
  static void describe(const Part& part, RowGroup& to) {
    // The middle of what the high plane leaves open, in nibbles, is no multiple of 1 / 16.
    constexpr float fine = 1.0f / 32.0f;
    constexpr double high_zero = (constants::zero - constants::midpoint) / 16;
    to.has_low = part.has_low;
    to.center_unit = part.has_low ? 1.0f : fine;
    const double zero = part.has_low              ? constants::zero
                        : part.panel.rows.has_low() ? high_zero
                                                    : constants::plane_zero;
    to.center = static_cast<uint8_t>(zero / to.center_unit);
    to.blocks = part.panel.rows.blocks();
    to.sums = part.panel.sums;
  }
  void set(const Part& part, int64_t channel, RowGroup& to, int row) const {
    const PlaneRows& rows = part.panel.rows;
    const int64_t offset = channel * rows.stride;
    to.rows[row] = {
        part.scales.of(channel), rows.high + offset, part.has_low ? rows.low + offset : nullptr};
    for (int64_t n = 0; n < reads_.tokens; ++n) {
      const int64_t at = n * reads_.inputs + channel;
      float factor = part.has_low ? reads_.low[at] : reads_.high[at];
      if (rows.has_low() && !part.has_low) factor = reads_.low[at] != 0.0f ? 0.0f : 16.0f * factor;
      to.factors[n][row] = factor;
    }
  }

  const ChannelReads& reads_;
  std::vector<int32_t> both_, high_, all_;
  std::vector<Part> parts_;
  size_t part_ = 0, group_ = 0;
};

// Adds entries [first, last) of all weights to their sums.
inline void add_entries(
    const ChannelReads& reads, int64_t first, int64_t last, const std::vector<PlaneTask>& tasks) {
  RowReader reader(reads, first, last, tasks);
  RowGroup groups[2];
  int current = 0;
  bool more = reader.read(groups[current]);
  while (more) {
    const int next = 1 - current;
    more = reader.read(groups[next]);
    RowAdder::add(groups[current], groups[more ? next : current], reads.tokens);
    current = next;
  }
}

// One weight of plane_gemv(), and its outputs: y [tokens, outputs] = products + bias + base_of(n), a
// row in float32 or nullptr.
template <typename T>
struct PlaneOutput {
  PlaneRows rows;
  ScaleGroups groups;
  const T* bias;
  std::function<const float*(int64_t)> base_of;
  T* y;
};

// How the sums of a weight stand in memory.
struct SumLayout {
  int64_t values, corrections;  // of a token

  explicit SumLayout(const PlaneRows& rows)
      : values(round_up(rows.blocks(), chunk_blocks) * block_values),
        corrections(round_up(rows.blocks(), factor_blocks)) {}
  int64_t size(int64_t tokens) const { return tokens * (values + corrections); }
  PlaneSums at(float* from, int64_t tokens) const {
    return {from, from + tokens * values, values, corrections};
  }
};

// Entries [first, last) of a weight whose scales stand outside of its rows: group by group, as a
// group's sum of integers is scaled as a whole.
inline void add_groups(
    const ChannelReads& reads, int64_t first, int64_t last, const PlaneRows& rows,
    const ScaleGroups& groups, PlaneSums totals) {
  const int64_t length = rows.length;
  const SumLayout layout(rows);
  std::vector<float> buffer(layout.size(reads.tokens));
  while (first < last) {
    const int64_t group = (reads.entries[first] >> 1) / groups.inputs;
    const int64_t end =
        std::lower_bound(
            reads.entries + first, reads.entries + last, 2 * (group + 1) * groups.inputs) -
        reads.entries;
    std::fill(buffer.begin(), buffer.end(), 0.0f);
    const PlaneSums sums = layout.at(buffer.data(), reads.tokens);
    add_entries(reads, first, end, {{rows, sums}});
    const float* scale = groups.scale + group * length;
    const float* zero = groups.zero ? groups.zero + group * length : nullptr;
    for (int64_t n = 0; n < reads.tokens; ++n) {
      float read = 0.0f;
      for (int64_t i = first; i < end; ++i) {
        read += reads.high[n * reads.inputs + (reads.entries[i] >> 1)];
      }
      const PlaneSums own = sums.token(n), to = totals.token(n);
      for (int64_t out = 0; out < length; ++out) {
        const int64_t block = out / block_values;
        const int64_t at = sum_start(block) + sum_offset(out % block_values);
        const float offset = (zero ? zero[out] : rows.zero()) - kernel_zero(rows);
        to.values[at] += scale[out] * (own.values[at] - own.corrections[block] - read * offset);
      }
    }
    first = end;
  }
}

// y[first, last) = the sums of all threads + bias + base, block by block.
template <typename T>
void write_blocks(
    const PlaneSums& sums, int64_t threads, int64_t thread_stride, int64_t first, int64_t last,
    int64_t length, const T* bias, const float* base, T* y) {
  constexpr int64_t parts = block_values / block_dwords;
  for (int64_t b = first; b < last; ++b) {
    float correction = 0.0f, lanes_of[chunk_values];
    for (int64_t t = 0; t < threads; ++t) {
      correction += sums.corrections[t * thread_stride + b];
      const float* from = sums.values + t * thread_stride + sum_start(b);
      for (int64_t part = 0; part < parts; ++part) {
        for (int64_t i = part * chunk_lanes; i < part * chunk_lanes + block_dwords; ++i) {
          lanes_of[i] = t == 0 ? from[i] : lanes_of[i] + from[i];
        }
      }
    }
    const int64_t start = b * block_values, count = std::min(block_values, length - start);
    float out[block_values];
    for (int64_t i = 0; i < block_values; ++i) out[i] = lanes_of[sum_offset(i)] - correction;
    if (bias) {
      for (int64_t i = 0; i < count; ++i) out[i] += static_cast<float>(bias[start + i]);
    }
    if (base) {
      for (int64_t i = 0; i < count; ++i) out[i] += base[start + i];
    }
    if (count == block_values) {
      for (int64_t i = 0; i < block_values; i += pair_lanes) {
        store_ordered_pair(Vec::loadu(out + i), Vec::loadu(out + i + lanes), y + start + i);
      }
    } else {
      for (int64_t i = 0; i < count; ++i) y[start + i] = static_cast<T>(out[i]);
    }
  }
}

// All `outputs`, for up to max_tokens tokens, in one pass: each thread adds up its share of the
// entries, then the threads' sums are added up in a fixed order.
template <typename T>
void plane_gemv(const ChannelReads& reads, const std::vector<PlaneOutput<T>>& outputs) {
  const int64_t tokens = reads.tokens;
  int64_t size = 0, bytes = 0, blocks = 0;
  for (const auto& output : outputs) {
    size += SumLayout(output.rows).size(tokens);
    bytes += output.rows.row_bytes();
    blocks += tokens * output.rows.blocks();
  }
  const int64_t threads = threads_for(reads.count, bytes);
  const std::unique_ptr<float[]> sums(new float[threads * size]);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = reads.count * t / threads, last = reads.count * (t + 1) / threads;
      float* to = sums.get() + t * size;
      std::fill_n(to, size, 0.0f);
      std::vector<PlaneTask> tasks;
      for (const auto& output : outputs) {
        const SumLayout layout(output.rows);
        if (output.groups.scale) {
          add_groups(reads, first, last, output.rows, output.groups, layout.at(to, tokens));
        } else {
          tasks.push_back({output.rows, layout.at(to, tokens)});
        }
        to += layout.size(tokens);
      }
      add_entries(reads, first, last, tasks);
    }
  });
  const int64_t grain = 1 + sum_grain_bytes / (threads * block_values * int64_t{sizeof(float)});
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    float* from = sums.get();
    int64_t start = 0;
    for (const auto& output : outputs) {
      const SumLayout layout(output.rows);
      const int64_t width = output.rows.blocks(), length = output.rows.length;
      for (int64_t n = 0; n < tokens; ++n, start += width) {
        const int64_t first = std::max<int64_t>(begin - start, 0);
        const int64_t last = std::min<int64_t>(end - start, width);
        if (first >= last) continue;
        write_blocks<T>(
            layout.at(from, tokens).token(n), threads, size, first, last, length, output.bias,
            output.base_of(n), output.y + n * length);
      }
      from += layout.size(tokens);
    }
  });
}

}  // namespace popc
