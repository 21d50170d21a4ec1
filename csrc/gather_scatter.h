// gather, scatter: selected elements of many tensors to and from packed arrays.
//
// Contract   gather: values[i] = tensor[indices[i]]. scatter: tensor[indices[i]] = values[i], in place; every
//            other element is left alone. Bits are copied: NaN payloads survive. The cpu entries check the
//            indices: with one out of range, scatter has written nothing, and gather's values are undefined.
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

// Return -1, or a segment that has an index out of range.
index_t gather_cpu(const GatherSegment* segments, index_t num_segments, int num_threads);
index_t scatter_cpu(const GatherSegment* segments, index_t num_segments, int num_threads);

}  // namespace saft
