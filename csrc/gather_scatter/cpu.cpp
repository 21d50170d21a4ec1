// gather, scatter / cpu.
//
// Algorithm  blocks of coordinates: their indices are copied, the copy is checked, and the elements that it names
//            are copied, with those to come prefetched. Scatter checks all indices before it writes the first element.
// Traffic    per coordinate one cache line, read (gather) or read and written (scatter), the packed value, and
//            the index from memory (twice for scatter).
// Contract   each coordinate is written by one thread. What is used of an index is what was checked of it, so another
//            thread that writes the indices meanwhile makes for an error, not for a read or write elsewhere.
// Threads    split by coordinates, not by tensors.

#include <atomic>

#include "cpu/chunks.h"
#include "gather_scatter/gather_scatter.h"

namespace saft {
namespace {

// ---- tuning: reasoned, not tuned on hardware ----

constexpr index_t kChunk = 4096;
constexpr index_t kBlock = 1024;        // their indices stay in L1
constexpr index_t kPrefetchAhead = 32;  // coordinates; hides a DRAM miss behind the copies before it

// `indices` are those of the n coordinates from `first` on.
template <bool kGather, class item_t, class index_type>
void copy_items(const GatherSegment& segment, const index_type* indices, index_t first, index_t n) {
  item_t* data = static_cast<item_t*>(segment.data);
  item_t* values = static_cast<item_t*>(segment.values) + first;
  constexpr int kWrites = kGather ? 0 : 1;
  if (segment.ndim == 0) {
    for (index_t i = 0; i < std::min(n, kPrefetchAhead); ++i) __builtin_prefetch(data + indices[i], kWrites);
  }
  for (index_t i = 0; i < n; ++i) {
    if (i + kPrefetchAhead < n && segment.ndim == 0) {
      __builtin_prefetch(data + indices[i + kPrefetchAhead], kWrites);
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
void copy_block(const GatherSegment& segment, const index_type* indices, index_t first, index_t n) {
  switch (segment.itemsize) {
    case 1:
      return copy_items<kGather, uint8_t>(segment, indices, first, n);
    case 2:
      return copy_items<kGather, uint16_t>(segment, indices, first, n);
    case 4:
      return copy_items<kGather, uint32_t>(segment, indices, first, n);
    case 8:
      return copy_items<kGather, uint64_t>(segment, indices, first, n);
    default:
      return copy_items<kGather, Bytes16>(segment, indices, first, n);
  }
}

// False when it met an index out of range, and did not use it.
template <bool kGather, class index_type>
bool copy_chunk(const GatherSegment& segment, const index_type* indices, index_t first, index_t last) {
  index_type block[kBlock];
  for (; first < last; first += kBlock) {
    const index_t n = std::min(kBlock, last - first);
    if (!copy_in_range(indices + first, n, segment.numel, block)) return false;
    copy_block<kGather>(segment, block, first, n);
  }
  return true;
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
                                return copy_chunk<true>(segment, indices, first, last);
                              });
}

index_t scatter_cpu(const GatherSegment* segments, index_t num_segments, int num_threads) {
  const index_t failed =
      for_each_index_chunk(segments, num_segments, num_threads,
                           [](const GatherSegment& segment, auto* indices, index_t first, index_t last) {
                             return all_in_range(indices + first, last - first, segment.numel);
                           });
  if (failed >= 0) return failed;
  return for_each_index_chunk(segments, num_segments, num_threads,
                              [](const GatherSegment& segment, auto* indices, index_t first, index_t last) {
                                return copy_chunk<false>(segment, indices, first, last);
                              });
}

}  // namespace saft
