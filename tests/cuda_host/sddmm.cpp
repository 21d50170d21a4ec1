// The CUDA backend of sddmm as a plain C library that runs on the CPU; tests/test_sddmm_cuda.py calls it.
#define CUDA_HOST_IMPLEMENTATION 1
#include "cuda_host.h"

// small blocks of tokens: many of them in little data
#define SAFT_CUDA_SDDMM_TOKEN_BLOCK 128

#include "sddmm/cuda.cu"

extern "C" {

int64_t sddmm_workspace_bytes(const saft::SddmmParams* params) {
  return saft::sddmm_cuda_workspace_bytes(*params);
}

void sddmm_run(const saft::SddmmParams* params, void* workspace, int max_blocks, uint64_t seed) {
  cuda_host::scheduler.seed = seed;
  saft::sddmm_cuda(*params, workspace, nullptr, max_blocks);
}

}  // extern "C"
