// cuda / primitives: launches, error checks, and warp and block primitives shared by the CUDA sources.
//
// Device code uses only what tests/cuda_host can execute on a CPU: with SAFT_CUDA_HOST that header stands in
// for the CUDA runtime, and what it cannot offer (PTX) goes through the wrappers below.
#pragma once

#if !defined(SAFT_CUDA_HOST)
#include <cuda_runtime.h>
#endif

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common.h"

namespace saft {

// ---- host side ----

inline void cuda_check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

// kernel<<<grid, block, 0, stream>>>(...) and a check that the launch was accepted.
#if defined(SAFT_CUDA_HOST)
#define SAFT_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), cuda_host::launch(#kernel, (grid), (block), [&] { kernel(__VA_ARGS__); }))
#else
#define SAFT_LAUNCH(kernel, grid, block, stream, ...)          \
  do {                                                         \
    (kernel)<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__);   \
    ::saft::cuda_check(cudaGetLastError(), "launch " #kernel); \
  } while (false)
#endif

// SAFT_LAUNCH of a kernel that begins with `wait_for_previous_kernels`. With `is_early` (see `can_launch_early`), its blocks
// become resident while the kernel before it in the stream ends: programmatic dependent launch.
#if defined(SAFT_CUDA_HOST)
#define SAFT_LAUNCH_EARLY(is_early, kernel, grid, block, stream, ...) \
  ((void)(is_early), SAFT_LAUNCH(kernel, grid, block, stream, __VA_ARGS__))
template <class Kernel>
bool can_launch_early(Kernel*) {
  return false;
}
#else
#define SAFT_LAUNCH_EARLY(is_early, kernel, grid, block, stream, ...) \
  ::saft::launch_early((is_early), "launch " #kernel, (kernel), (grid), (block), (stream), __VA_ARGS__)

// Whether a kernel's code for the current device has the instructions, and a capture into a graph keeps them.
template <class Kernel>
bool can_launch_early(Kernel* kernel) {
#if CUDART_VERSION >= 12030
  int driver = 0;
  cudaFuncAttributes attributes{};
  cuda_check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  cuda_check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  return driver >= 12030 && attributes.ptxVersion >= 90;
#else
  (void)kernel;
  return false;
#endif
}

template <class... Params, class... Args>
void launch_early(bool is_early, const char* what, void (*kernel)(Params...), unsigned grid, unsigned block,
                  cudaStream_t stream, Args... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = is_early ? 1 : 0;
  cuda_check(cudaLaunchKernelEx(&config, kernel, args...), what);
}
#endif

// A grid of `work` blocks, but of no more than are resident at once.
inline unsigned grid_size(index_t work, int blocks_per_sm, int max_blocks) {
  int device = 0, num_sms = 0;
  cuda_check(cudaGetDevice(&device), "cudaGetDevice");
  cuda_check(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device),
             "cudaDeviceGetAttribute");
  index_t blocks = std::min<index_t>(work, index_t(num_sms) * blocks_per_sm);
  if (max_blocks > 0) blocks = std::min<index_t>(blocks, max_blocks);
  return unsigned(std::max<index_t>(blocks, 1));
}

// The bytes of arguments that a kernel may have: __grid_constant__ ones are read where the launch put them.
#if defined(CUDART_VERSION) && CUDART_VERSION >= 12010
constexpr int kMaxArgumentBytes = 32764;  // needs driver 530, see cuda_unavailable
#else
constexpr int kMaxArgumentBytes = 4096;
#endif

// ---- warp ----

constexpr int kWarpSize = 32;
constexpr uint32_t kFullMask = 0xffffffffu;

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullMask, value, offset);
  }
  return value;
}

// The sum over the lanes below this one.
template <class T>
__device__ __forceinline__ T warp_exclusive_sum(T value, int lane) {
  T inclusive = value;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const T below = __shfl_up_sync(kFullMask, inclusive, offset);
    if (lane >= offset) inclusive += below;
  }
  return inclusive - value;
}

// ---- block ----

// The sum over the threads below this one; `total` gets the sum over the block. `scratch`: one per warp.
// Ends with a barrier, so `scratch` may be reused at once.
template <int kThreads, class T>
__device__ __forceinline__ T block_exclusive_sum(T value, T* scratch, T* total) {
  constexpr int kWarps = kThreads / kWarpSize;
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
  const T below = warp_exclusive_sum(value, lane);
  if (lane == kWarpSize - 1) scratch[warp] = below + value;
  __syncthreads();
  T base = 0, sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) base = sum;
    sum += scratch[w];
  }
  __syncthreads();
  *total = sum;
  return base + below;
}

// Whether this block is the last of the grid to get here: it then sees what every other block wrote before
// (read it with __ldcg: L1 is not coherent). Call it once per kernel, from all threads.
__device__ __forceinline__ bool is_last_block(uint32_t* ticket) {
  __shared__ uint32_t last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // after the barrier: for what all threads of the block wrote
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return last != 0;
}

// A word that other blocks write while this one waits for it. Orders nothing but itself.
template <class Word>
__device__ __forceinline__ Word load_relaxed(const Word* address) {
#if defined(__CUDA_ARCH__)
  Word word;
  if constexpr (sizeof(Word) == 8) {
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(address) : "memory");
  } else {
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(address) : "memory");
  }
  return word;
#elif defined(SAFT_CUDA_HOST)
  return cuda_host::load_relaxed(address);
#else
  return *address;
#endif
}

// ---- work that blocks claim ----
//
// Whoever claimed a lower item runs or has run. So a block may wait for what becomes of it, however few blocks of the grid
// fit the device beside others: no block waits for one that has not started.

// The next item, from 0. From all threads; has barriers.
__device__ __forceinline__ uint32_t claim_item(uint32_t* next) {
  __shared__ uint32_t item;
  __syncthreads();  // the one before has been read
  if (threadIdx.x == 0) item = atomicAdd(next, 1u);
  __syncthreads();
  return item;
}

// A pass over items inside a kernel that has several. Zeroed before the kernel.
struct Pass {
  uint32_t num_claimed, num_finished, is_over;
};

// The whole block: visit(item) for the items that it claims of `num_items` >= 1, then, after a barrier, tell() what it
// found to memory that others read. The block that finishes the last one runs conclude(), which sees what all have told;
// the pass is over then.
template <class Visit, class Tell, class Conclude>
__device__ __forceinline__ void work_on(Pass* pass, uint32_t num_items, const Visit& visit, const Tell& tell,
                                        const Conclude& conclude) {
  __shared__ uint32_t is_last;
  uint32_t num_mine = 0;
  for (uint32_t item = claim_item(&pass->num_claimed); item < num_items;
       item = claim_item(&pass->num_claimed)) {
    visit(item);
    ++num_mine;
  }
  if (num_mine == 0) return;
  tell();
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // after the barrier: for what all threads of the block wrote
    is_last = atomicAdd(&pass->num_finished, num_mine) + num_mine == num_items;
    __threadfence();
  }
  __syncthreads();
  if (is_last == 0) return;
  conclude();
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(&pass->is_over, 1u);
  }
}

// Until the pass is over: what was concluded can be read then. The whole block.
__device__ __forceinline__ void wait_for(const Pass* pass) {
  if (threadIdx.x == 0) {
    while (load_relaxed(&pass->is_over) == 0) __nanosleep(20);
    __threadfence();
  }
  __syncthreads();
}

// ---- tables whose rows share out a range: tiles, sampled runs ----

// The row that holds `at`: the last one that starts at or below it and is not empty.
template <class Row>
__device__ __forceinline__ index_t find_row(const Row* rows, index_t num_rows, index_t Row::* first,
                                            index_t at) {
  index_t low = 0, high = num_rows;  // rows[low].*first <= at < rows[high].*first
  while (high - low > 1) {
    const index_t middle = low + (high - low) / 2;
    if (rows[middle].*first <= at) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// ---- PTX ----

// Lets the next kernel's blocks become resident, where that one is launched early.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the kernels before this one in its stream have ended, and what they wrote can be read. Every thread of a kernel that
// is launched early begins with it: so the end of one is the end of all before it.
__device__ __forceinline__ void wait_for_previous_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  let_next_kernel_start();
}

// 16 aligned bytes that this kernel reads once and nobody writes meanwhile.
__device__ __forceinline__ uint4 load_once(const uint4* address) {
#if defined(__CUDA_ARCH__)
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(address));
  return v;
#else
  return *address;
#endif
}

// Two neighbours in one store; `to` is a multiple of 16 bytes.
__device__ __forceinline__ void store_pair(index_t* to, index_t first, index_t second) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v2.s64 [%0], {%1, %2};" ::"l"(to), "l"(first), "l"(second) : "memory");
#else
  to[0] = first;
  to[1] = second;
#endif
}

}  // namespace saft
