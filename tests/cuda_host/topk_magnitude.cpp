// The CUDA backend of topk_magnitude as a plain C library that runs on the CPU;
// tests/test_topk_magnitude_cuda.py calls it through ctypes.
#define CUDA_HOST_IMPLEMENTATION 1
#include "cuda_host.h"

// small tiles and caches: many of them, and all their edges, in little data
#if !defined(SAFT_CUDA_TILE_NUMEL)
#define SAFT_CUDA_TILE_NUMEL 2048
#endif
#define SAFT_CUDA_SAMPLED_RUNS_LOG2 9
#define SAFT_CUDA_MIN_BAND_CAPACITY 512
#define SAFT_CUDA_GROUP_CHUNKS 2

#include "cuda/device.cu"
#include "topk_magnitude/cuda.cu"

extern "C" {

void topk_plan(const saft::TensorDesc* tensors, int64_t num_tensors, int64_t k, saft::TopKCudaPlan* plan) {
  *plan = saft::topk_magnitude_cuda_plan(tensors, num_tensors, k);
}

void topk_run(const saft::TopKCudaPlan* plan, const saft::TensorDesc* tensors, void* workspace,
              int64_t* indices, int64_t* result, int max_blocks, uint64_t seed, unsigned num_resident) {
  cuda_host::scheduler.seed = seed;
  cuda_host::scheduler.num_resident = num_resident;
  saft::topk_magnitude_cuda(*plan, tensors, workspace, indices, result, nullptr, max_blocks);
}

double topk_threshold(const saft::TopKCudaPlan* plan, int64_t key) {
  return saft::topk_magnitude_cuda_threshold(*plan, key);
}

}  // extern "C"
