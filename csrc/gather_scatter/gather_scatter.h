// gather, scatter: selected elements of many tensors to and from packed arrays.
//
// Contract   gather: values[i] = tensor[indices[i]]. scatter: tensor[indices[i]] = values[i], in place; every
//            other element is left alone. Bits are copied: NaN payloads survive. The cpu entries check the
//            indices: with one out of range, scatter has written nothing, and gather's values are undefined.
//            No entry reads or writes beside the tensor, not even for indices that change while it runs: the cuda
//            entries leave out what is out of range.
#pragma once

#include "common.h"

namespace saft {

struct GatherSegment {
  void* data;        // the tensor, of `itemsize`-byte elements
  index_t itemsize;  // 1, 2, 4, 8 or 16
  index_t ndim;      // layout as in TensorDesc
  const index_t* layout;
  const void* indices;  // `count` flat indices
  index_t index_bytes;  // 4 or 8
  void* values;         // `count` elements, packed
  index_t count;
  index_t numel;  // of the tensor: indices are in [0, numel)
};

struct Bytes16 {  // an element of 16 bytes
  uint64_t low, high;
};

// ---- cpu entries ----

// Return -1, or a segment that has an index out of range.
index_t gather_cpu(const GatherSegment* segments, index_t num_segments, int num_threads);
index_t scatter_cpu(const GatherSegment* segments, index_t num_segments, int num_threads);

// ---- cuda entries ----
//
// `segments`: as for gather_cpu, with device addresses for all but the layouts. `device_table`: room for
// gather_scatter_cuda_table_bytes. Everything is enqueued on `stream` (a cudaStream_t) of the current device;
// nothing allocates on the device or waits for it. `max_blocks`: an upper bound on the grid; 0 for what fills
// the device.

index_t gather_scatter_cuda_table_bytes(const GatherSegment* segments, index_t num_segments);

void gather_cuda(const GatherSegment* segments, index_t num_segments, void* device_table, void* stream,
                 int max_blocks);
void scatter_cuda(const GatherSegment* segments, index_t num_segments, void* device_table, void* stream,
                  int max_blocks);

}  // namespace saft
