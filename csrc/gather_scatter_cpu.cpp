// gather, scatter / cpu.
// Traffic    one cache line per coordinate, read (gather) or read and written (scatter), plus the packed
//            values and indices.
// Threads    split by coordinates; each coordinate is written by one thread.

#include "cpu_chunks.h"
#include "gather_scatter.h"

namespace saft {
namespace {

constexpr index_t kChunk = 4096;
constexpr index_t kPrefetchAhead = 32;  // coordinates; hides a DRAM miss behind the copies before it

struct Bytes16 {
  uint64_t low, high;
};

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

template <bool kGather>
void run(const GatherSegment* segments, index_t num_segments, int num_threads) {
  for_each_chunk(segments, num_segments, kChunk, num_threads,
                 [](const GatherSegment& segment, index_t first, index_t last) {
                   dispatch_index(segment.indices, segment.index_bytes, [&](const auto* indices) {
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
                   });
                 });
}

}  // namespace

void gather_cpu(const GatherSegment* segments, index_t num_segments, int num_threads) {
  run<true>(segments, num_segments, num_threads);
}

void scatter_cpu(const GatherSegment* segments, index_t num_segments, int num_threads) {
  run<false>(segments, num_segments, num_threads);
}

}  // namespace saft
