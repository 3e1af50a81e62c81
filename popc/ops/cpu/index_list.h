// Lists of channel indices, checked against the number of channels.
#pragma once

#include <c10/util/Exception.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace popc {

inline void check_indices(const int64_t* indices, int64_t n, int64_t size, const char* name) {
  for (int64_t i = 0; i < n; ++i) {
    TORCH_CHECK_INDEX(
        indices[i] >= 0 && indices[i] < size, "popc: ", name, " lists channel ", indices[i], " of ",
        size);
  }
}

// A checked list of channels, or all `size` of them. Does not own the indices.
struct IndexList {
  const int64_t* indices = nullptr;
  int64_t count = 0;

  IndexList(const int64_t* listed, int64_t n, int64_t size, const char* name)
      : indices(listed), count(n), is_listed(true) {
    check_indices(listed, n, size, name);
  }
  explicit IndexList(int64_t size) : count(size) {}

  int64_t operator[](int64_t i) const { return is_listed ? indices[i] : i; }
  bool is_all() const { return !is_listed; }

 private:
  bool is_listed = false;
};

// `rows` with each channel once, in `storage` where it had duplicates: threads split the list, and
// no two of them may write to one output.
inline IndexList without_duplicates(
    const IndexList& rows, int64_t size, std::vector<int64_t>& storage) {
  if (rows.is_all()) return rows;
  std::vector<uint8_t> seen(size);
  bool has_duplicates = false;
  for (int64_t i = 0; i < rows.count; ++i) has_duplicates |= std::exchange(seen[rows[i]], 1);
  if (!has_duplicates) return rows;
  for (int64_t i = 0; i < rows.count; ++i) {
    if (std::exchange(seen[rows[i]], 0)) storage.push_back(rows[i]);
  }
  return IndexList(storage.data(), storage.size(), size, "rows");
}

}  // namespace popc
