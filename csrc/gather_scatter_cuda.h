// gather, scatter / cuda: what the binding calls. The ops' contract is in gather_scatter.h.
//
// `segments`: as for gather_cpu, with device addresses for all but the layouts. `device_table`: room for
// gather_scatter_cuda_table_bytes. Everything is enqueued on `stream` (a cudaStream_t) of the current device;
// nothing allocates on the device or waits for it. `max_blocks`: an upper bound on the grid; 0 for what fills
// the device.
#pragma once

#include "gather_scatter.h"

namespace saft {

index_t gather_scatter_cuda_table_bytes(const GatherSegment* segments, index_t num_segments);

void gather_cuda(const GatherSegment* segments, index_t num_segments, void* device_table, void* stream,
                 int max_blocks);
void scatter_cuda(const GatherSegment* segments, index_t num_segments, void* device_table, void* stream,
                  int max_blocks);

}  // namespace saft
