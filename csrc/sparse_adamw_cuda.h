// sparse_adamw / cuda: what the binding calls. The op's contract is in sparse_adamw.h.
//
// The caller allocates a device table and has it filled once; a step then is one launch. Gradient addresses
// and scalars are kernel arguments, so a step has no copy to wait for, and a CUDA graph that captures it owns
// all that it needs but the table. Nothing here allocates on the device or waits for it.
#pragma once

#include "sparse_adamw.h"

namespace saft {

// AdamWHyper, with device addresses in the place of numbers. All fields are 64-bit: Python packs them.
struct AdamWCudaHyper {
  AdamWHyper number;
  // One element each, read when the step runs; null: the number. `step` replaces both bias corrections.
  const void *lr, *step, *grad_scale;
  const void* found_inf;  // one element; other than 0: the step writes nothing. Null: none
  ScalarType lr_dtype, step_dtype, grad_scale_dtype, found_inf_dtype;
};

// `segments`: as for sparse_adamw_cpu, with device addresses for all but the layouts. The table holds
// everything of them but the gradients' addresses, which are read from `segments` at every step.
index_t sparse_adamw_cuda_table_bytes(const AdamWSegment* segments, index_t num_segments);

// Enqueues the writes of the table on `stream` (a cudaStream_t) of the current device.
void sparse_adamw_cuda_table(const AdamWSegment* segments, index_t num_segments, void* device_table,
                             void* stream);

// Enqueues the step. `hypers`: the rows that `segments` name. `max_blocks`: an upper bound on the grid; 0 for
// what fills the device.
void sparse_adamw_cuda(const AdamWSegment* segments, index_t num_segments, const AdamWCudaHyper* hypers,
                       const void* device_table, void* stream, int max_blocks);

}  // namespace saft
