// The CUDA backend of sparse_adamw_, gather and scatter_ as a plain C library that runs on the CPU;
// tests/test_sparse_ops_cuda.py calls it through ctypes.
#define CUDA_HOST_IMPLEMENTATION 1
#include "cuda_host.h"

// little room: several uploads, both sizes of arguments, and several launches, with a few dozen tensors
#define SAFT_CUDA_UPLOAD_WORDS 50
#define SAFT_CUDA_ADAMW_WORDS 40
#define SAFT_CUDA_ADAMW_MANY_WORDS 70
#define SAFT_CUDA_ADAMW_HYPERS 3

#include "gather_scatter/cuda.cu"
#include "sparse_adamw/cuda.cu"

extern "C" {

void set_seed(uint64_t seed) { cuda_host::scheduler.seed = seed; }

int64_t sparse_adamw_table_bytes(const saft::AdamWSegment* segments, int64_t num_segments) {
  return saft::sparse_adamw_cuda_table_bytes(segments, num_segments);
}

void sparse_adamw_table(const saft::AdamWSegment* segments, int64_t num_segments, void* device_table) {
  saft::sparse_adamw_cuda_table(segments, num_segments, device_table, nullptr);
}

void sparse_adamw(const saft::AdamWSegment* segments, int64_t num_segments,
                  const saft::AdamWCudaHyper* hypers, const void* device_table, int max_blocks) {
  saft::sparse_adamw_cuda(segments, num_segments, hypers, device_table, nullptr, max_blocks);
}

int64_t gather_scatter_table_bytes(const saft::GatherSegment* segments, int64_t num_segments) {
  return saft::gather_scatter_cuda_table_bytes(segments, num_segments);
}

void gather(const saft::GatherSegment* segments, int64_t num_segments, void* device_table, int max_blocks) {
  saft::gather_cuda(segments, num_segments, device_table, nullptr, max_blocks);
}

void scatter(const saft::GatherSegment* segments, int64_t num_segments, void* device_table, int max_blocks) {
  saft::scatter_cuda(segments, num_segments, device_table, nullptr, max_blocks);
}

}  // extern "C"
