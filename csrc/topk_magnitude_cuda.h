// topk_magnitude / cuda: what the binding calls. The op's contract is in topk_magnitude.h.
//
// The caller plans on the host, allocates, fills and uploads a table, and launches. Nothing here allocates or
// waits for the device.
#pragma once

#include <string>

#include "topk_magnitude.h"

namespace saft {

// Sizes, all known on the host before anything runs.
struct TopKCudaPlan {
  index_t num_tensors;
  index_t k;
  index_t numel;
  index_t any_double;  // 1: keys are fp64's
  index_t num_tiles;   // see topk_magnitude_cuda.cu
  index_t num_runs;    // of elements that are sampled together
  index_t num_sampled_runs;
  index_t slab_bytes;       // one bit per element, rounded up per tensor
  index_t band_capacity;    // band elements whose keys are kept
  index_t table_bytes;      // host and device
  index_t workspace_bytes;  // device; at most 0.23 (fp64: 0.3) * numel + 300 * num_tensors + 40e6
  index_t result_words;     // int64, device
};

// Words of the result, before one offset into `indices` per tensor (unset for an empty tensor).
enum TopKCudaResult : int {
  kResultThreshold = 0,  // common key of rank k
  kResultNonfinite = 1,
  kResultStatus = 2,  // 0; else the kernels disagree about the data: it was written to meanwhile
  kResultReads = 3,   // passes over all of the data: 1 unless a guess failed
  kResultOffsets = 4,
};

// `tensors`: as for topk_magnitude_cpu, with device addresses in `data` and host addresses in `layout`.
TopKCudaPlan topk_magnitude_cuda_plan(const TensorDesc* tensors, index_t num_tensors, index_t k);

// Writes `plan.table_bytes` to `table` (host); they are to be copied to `device_table`.
void topk_magnitude_cuda_table(const TopKCudaPlan& plan, const TensorDesc* tensors, void* table,
                               const void* device_table);

// Enqueues everything on `stream` (a cudaStream_t) of the current device. `workspace`: 256-byte aligned, any
// content. `indices`: k. `max_blocks`: an upper bound on every grid; 0 for what fills the device.
void topk_magnitude_cuda(const TopKCudaPlan& plan, const void* device_table, void* workspace,
                         index_t* indices, index_t* result, void* stream, int max_blocks);

// |x| of a threshold key; inf when k is 0.
double topk_magnitude_cuda_threshold(const TopKCudaPlan& plan, index_t key);

// What stands in the way of running on this device: "" or the reason. The text of a driver error included.
std::string topk_magnitude_cuda_unavailable(int device);

}  // namespace saft
