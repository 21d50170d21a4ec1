// cpu / chunks: shares the coordinates of many segments out evenly over threads.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/parallel.h"

namespace saft {

// A thread takes `chunk` coordinates at a time: part of a large segment, or many small ones. Calls fn(segment,
// first, last) for what a chunk has of each segment.
template <class Segment, class Fn>
void for_each_chunk(const Segment* segments, index_t num_segments, index_t chunk, int num_threads,
                    const Fn& fn) {
  std::vector<index_t> first_coordinate(size_t(num_segments) + 1, 0);
  for (index_t s = 0; s < num_segments; ++s) {
    first_coordinate[s + 1] = first_coordinate[s] + segments[s].count;
  }
  const index_t total = first_coordinate[num_segments];
  parallel_for(ceil_div(total, chunk), 1, num_threads, [&](index_t c, int) {
    const index_t end = std::min(total, (c + 1) * chunk);
    index_t at = c * chunk;
    index_t s =
        std::upper_bound(first_coordinate.begin(), first_coordinate.end(), at) - first_coordinate.begin() - 1;
    for (; at < end; ++s) {
      const index_t stop = std::min(end, first_coordinate[s + 1]);
      if (at < stop) fn(segments[s], at - first_coordinate[s], stop - first_coordinate[s]);
      at = stop;
    }
  });
}

// Calls fn with a typed pointer to the indices.
template <class Fn>
void dispatch_index(const void* indices, index_t index_bytes, const Fn& fn) {
  if (index_bytes == 4) {
    fn(static_cast<const int32_t*>(indices));
  } else {
    fn(static_cast<const int64_t*>(indices));
  }
}

// Whether the indices it has seen are in [0, numel): then neither `index` nor `last - index` has its sign bit set.
// 32-bit indices of a tensor with more elements than they reach are below 2^31.
template <class index_type>
class InRange {
 public:
  explicit InRange(index_t numel)
      : last_(Unsigned(std::min(numel - 1, index_t(std::numeric_limits<index_type>::max())))) {}
  void see(index_type index) { seen_ |= Unsigned(index) | Unsigned(last_ - Unsigned(index)); }
  bool all() const { return index_type(seen_) >= 0; }

 private:
  using Unsigned = std::make_unsigned_t<index_type>;
  Unsigned last_, seen_ = 0;
};

template <class index_type>
bool all_in_range(const index_type* indices, index_t n, index_t numel) {
  InRange<index_type> in_range(numel);
  for (index_t i = 0; i < n; ++i) in_range.see(indices[i]);
  return in_range.all();
}

// Copies them as well. What is read again may have changed meanwhile; the copy is what was checked.
template <class index_type>
bool copy_in_range(const index_type* indices, index_t n, index_t numel, index_type* __restrict copy) {
  InRange<index_type> in_range(numel);
  for (index_t i = 0; i < n; ++i) {
    copy[i] = indices[i];
    in_range.see(copy[i]);
  }
  return in_range.all();
}

}  // namespace saft
