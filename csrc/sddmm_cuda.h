// sddmm / cuda: what the binding calls. The op's contract is in sddmm.h.
#pragma once

#include "sddmm.h"

namespace saft {

// Device memory that a call needs; at most (num_outputs + num_inputs) * (1 + 8,192 * itemsize) + 8 * k bytes,
// give or take the rounding of each part to 256.
index_t sddmm_cuda_workspace_bytes(const SddmmParams& params);

// Enqueues everything on `stream` (a cudaStream_t) of the current device; nothing waits. `params` holds
// device addresses. `workspace`: 256-byte aligned, any content. `max_blocks`: an upper bound on every grid; 0
// for what fills the device.
void sddmm_cuda(const SddmmParams& params, void* workspace, void* stream, int max_blocks);

}  // namespace saft
