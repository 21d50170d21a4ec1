// gather, scatter / cpu.
//
// Algorithm  chunks of coordinates: the largest index of a chunk is checked, then its elements are copied, with
//            those to come prefetched. Scatter checks all chunks before it writes the first.
// Traffic    per coordinate one cache line, read (gather) or read and written (scatter), the packed value, and
//            the index from memory (twice for scatter).
// Contract   each coordinate is written by one thread.
// Threads    split by coordinates, not by tensors.

#include <atomic>
#include <type_traits>

#include "cpu/chunks.h"
#include "gather_scatter/gather_scatter.h"

namespace saft {
namespace {

// ---- tuning: reasoned, not tuned on hardware ----

constexpr index_t kChunk = 4096;
constexpr index_t kPrefetchAhead = 32;  // coordinates; hides a DRAM miss behind the copies before it

// Whether all of [first, last) are positions in the tensor. One maximum: a negative index is a huge unsigned one.
template <class index_type>
bool in_range(const GatherSegment& segment, const index_type* indices, index_t first, index_t last) {
  using Unsigned = std::make_unsigned_t<index_type>;
  Unsigned largest = 0;
  for (index_t i = first; i < last; ++i) largest = std::max(largest, Unsigned(indices[i]));
  return uint64_t(largest) < uint64_t(segment.numel);
}

template <bool kGather, class item_t, class index_type>
void copy_items(const GatherSegment& segment, const index_type* indices, index_t first, index_t last) {
  item_t* data = static_cast<item_t*>(segment.data);
  item_t* values = static_cast<item_t*>(segment.values);
  for (index_t i = first; i < last; ++i) {
    if (i + kPrefetchAhead < last && segment.ndim == 0) {
      __builtin_prefetch(data + indices[i + kPrefetchAhead], kGather ? 0 : 1);
    }
    item_t& item = data[storage_offset(indices[i], segment.ndim, segment.layout)];
    if constexpr (kGather) {
      values[i] = item;
    } else {
      item = values[i];
    }
  }
}

template <bool kGather, class index_type>
void copy_chunk(const GatherSegment& segment, const index_type* indices, index_t first, index_t last) {
  switch (segment.itemsize) {
    case 1:
      return copy_items<kGather, uint8_t>(segment, indices, first, last);
    case 2:
      return copy_items<kGather, uint16_t>(segment, indices, first, last);
    case 4:
      return copy_items<kGather, uint32_t>(segment, indices, first, last);
    case 8:
      return copy_items<kGather, uint64_t>(segment, indices, first, last);
    default:
      return copy_items<kGather, Bytes16>(segment, indices, first, last);
  }
}

// Runs fn(segment, indices, first, last) -> bool on every chunk; returns a segment for which it was false, or -1.
template <class Fn>
index_t for_each_index_chunk(const GatherSegment* segments, index_t num_segments, int num_threads,
                             const Fn& fn) {
  std::atomic<index_t> failed{-1};
  for_each_chunk(segments, num_segments, kChunk, num_threads,
                 [&](const GatherSegment& segment, index_t first, index_t last) {
                   dispatch_index(segment.indices, segment.index_bytes, [&](const auto* indices) {
                     if (!fn(segment, indices, first, last)) failed = &segment - segments;
                   });
                 });
  return failed;
}

}  // namespace

index_t gather_cpu(const GatherSegment* segments, index_t num_segments, int num_threads) {
  return for_each_index_chunk(segments, num_segments, num_threads,
                              [](const GatherSegment& segment, auto* indices, index_t first, index_t last) {
                                if (!in_range(segment, indices, first, last)) return false;
                                copy_chunk<true>(segment, indices, first, last);
                                return true;
                              });
}

index_t scatter_cpu(const GatherSegment* segments, index_t num_segments, int num_threads) {
  const index_t failed =
      for_each_index_chunk(segments, num_segments, num_threads,
                           [](const GatherSegment& segment, auto* indices, index_t first, index_t last) {
                             return in_range(segment, indices, first, last);
                           });
  if (failed >= 0) return failed;
  return for_each_index_chunk(segments, num_segments, num_threads,
                              [](const GatherSegment& segment, auto* indices, index_t first, index_t last) {
                                copy_chunk<false>(segment, indices, first, last);
                                return true;
                              });
}

}  // namespace saft
