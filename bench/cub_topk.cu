// CUB DeviceTopK behind a C function: the peer of bench/bench_topk_magnitude.py, where the toolkit has it (CCCL 3.3).
// It takes one flat array of |x| and gives the k largest in no order, ties as they come.
//
//   nvcc -O3 -std=c++17 -arch=native -shared -Xcompiler -fPIC -o bench/libcub_topk.so bench/cub_topk.cu

#include <cuda_runtime.h>

#include <cstdint>
#include <cub/device/device_topk.cuh>
#include <cuda/iterator>

// Without a workspace: the bytes it needs. With one: 0, or -1 when CUB failed.
extern "C" int64_t cub_topk(const float* keys, float* top_keys, int64_t* top_indices, int64_t numel,
                            int64_t k, void* workspace, int64_t workspace_bytes, cudaStream_t stream) {
  const auto requirements = cuda::execution::require(cuda::execution::determinism::not_guaranteed,
                                                     cuda::execution::output_ordering::unsorted);
  const auto environment = cuda::std::execution::env{cuda::stream_ref{stream}, requirements};
  size_t bytes = size_t(workspace_bytes);
  const cudaError_t error =
      cub::DeviceTopK::MaxPairs(workspace, bytes, keys, top_keys, cuda::make_counting_iterator(int64_t(0)),
                                top_indices, numel, k, environment);
  if (error != cudaSuccess) return -1;
  return workspace == nullptr ? int64_t(bytes) : 0;
}
