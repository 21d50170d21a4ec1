// sddmm / cuda.
//
// Algorithm  a block of tokens at a time, which bounds the workspace:
//   mark       one byte per channel (an output of dY, an input of X): has it a selected entry?
//   transpose  token-major to channel-major through shared memory, for tiles of channels with a mark alone
//   dot        a warp per entry: two channels, read by vectors of 16 B that the lanes take in turn; adds the
//              sums of the blocks before
// Traffic    per used tile of 32 channels and token: at most 32 * itemsize B read and written. Per entry and token
//            2 * itemsize B, from L2 where the transposed factors fit it; entries of one output are
//            consecutive, so that dY's channel comes from L1. Against num_outputs * num_inputs
//            multiply-adds per token on the tensor cores.
// Precision  fp32 (fp64 for fp64), one running sum per lane and vector element.
// Contract   no atomics; the order of summation depends on the number of tokens alone. A mark may be
//            stored by many threads: the same byte.
// Launch     resident blocks, grid-stride. Sizes are reasoned from bytes, not tuned on hardware.

#include <algorithm>

#include "cuda/primitives.h"
#include "sddmm/sddmm.h"

namespace saft {
namespace cuda_sddmm {

#if !defined(SAFT_CUDA_SDDMM_TOKEN_BLOCK)  // the tests make it small
#define SAFT_CUDA_SDDMM_TOKEN_BLOCK 8192
#endif

constexpr index_t kTokenBlock = SAFT_CUDA_SDDMM_TOKEN_BLOCK;  // a multiple of kTileTokens
constexpr int kTileTokens = 64;                               // a line of 16-bit tokens
constexpr int kTileChannels = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlocksPerSm = 8;

// One block of tokens. The transposed factors lie one after the other: channel n of x is num_outputs + n.
struct Problem {
  SddmmParams params;
  index_t first_token, num_tokens;  // of this block
  index_t padded_tokens;            // of a channel in the transposed factors, a multiple of kTileTokens
  uint8_t* used;                    // by channel
  void* transposed;
  void* sums;  // of the blocks before, by entry
  bool is_first, is_last;
};

template <class scalar_t>
struct Vector {
  static constexpr int kItems = 16 / int(sizeof(scalar_t));
  scalar_t items[kItems];
};

// 16 aligned bytes.
template <class scalar_t>
__device__ __forceinline__ Vector<scalar_t> load_vector(const scalar_t* address) {
  return bit_cast<Vector<scalar_t>>(*reinterpret_cast<const uint4*>(address));
}

__device__ __forceinline__ double to_opmath(double x) { return x; }
__device__ __forceinline__ float to_opmath(float x) { return x; }
__device__ __forceinline__ float to_opmath(bfloat16 x) { return to_float(x); }
__device__ __forceinline__ float to_opmath(float16 x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  return to_float(x);
#endif
}

// ---- kernels ----

// The channels of an entry.
struct Place {
  index_t output, input;
};

__device__ __forceinline__ Place place_of(const SddmmParams& params, index_t j) {
  const index_t flat = params.index_bytes == 4 ? index_t(static_cast<const int32_t*>(params.indices)[j])
                                               : static_cast<const int64_t*>(params.indices)[j];
  const index_t output = flat / params.num_inputs;
  return {output, flat - output * params.num_inputs};
}

__global__ void __launch_bounds__(kThreads) mark_kernel(Problem p) {
  const index_t stride = index_t(gridDim.x) * kThreads;
  for (index_t j = index_t(blockIdx.x) * kThreads + threadIdx.x; j < p.params.k; j += stride) {
    const Place place = place_of(p.params, j);
    p.used[place.output] = 1;
    p.used[p.params.num_outputs + place.input] = 1;
  }
}

// `item_t`: an unsigned integer of the size of an element; the bits are moved.
template <class item_t>
__global__ void __launch_bounds__(kThreads) transpose_kernel(Problem p) {
  // a column more than there are channels: the reads below, down a column, then touch every bank
  __shared__ item_t tile[kTileTokens][kTileChannels + 1];
  __shared__ uint8_t used[kTileChannels];
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
  const index_t dy_tiles = ceil_div(p.params.num_outputs, kTileChannels);
  const index_t x_tiles = ceil_div(p.params.num_inputs, kTileChannels);
  const index_t token_tiles = p.padded_tokens / kTileTokens;
  for (index_t at = blockIdx.x; at < (dy_tiles + x_tiles) * token_tiles; at += gridDim.x) {
    const index_t channel_tile = at / token_tiles;
    const bool is_dy = channel_tile < dy_tiles;
    const SddmmFactor factor = is_dy ? p.params.dy : p.params.x;
    const index_t num_channels = is_dy ? p.params.num_outputs : p.params.num_inputs;
    const index_t first_channel = (is_dy ? channel_tile : channel_tile - dy_tiles) * kTileChannels;
    const index_t first_slot = is_dy ? first_channel : p.params.num_outputs + first_channel;
    const index_t first_token = (at - channel_tile * token_tiles) * kTileTokens;
    const bool mine = first_channel + lane < num_channels && p.used[first_slot + lane] != 0;
    const bool any = __any_sync(kFullMask, mine);  // all warps ask the same
    if (!any) continue;
    __syncthreads();  // the tile before has been written out
    if (warp == 0) used[lane] = uint8_t(mine);
    for (int t = warp; t < kTileTokens; t += kWarps) {
      item_t value{};
      if (mine && first_token + t < p.num_tokens) {
        const item_t* data = static_cast<const item_t*>(factor.data);
        value = data[(p.first_token + first_token + t) * factor.token_stride +
                     (first_channel + lane) * factor.channel_stride];
      }
      tile[t][lane] = value;
    }
    __syncthreads();
    for (int c = warp; c < kTileChannels; c += kWarps) {
      if (used[c] == 0) continue;
      item_t* out = static_cast<item_t*>(p.transposed) + (first_slot + c) * p.padded_tokens + first_token;
      for (int t = lane; t < kTileTokens; t += kWarpSize) out[t] = tile[t][c];
    }
  }
}

template <class scalar_t>
__global__ void __launch_bounds__(kThreads) dot_kernel(Problem p) {
  using opmath_t = opmath_of<scalar_t>;
  constexpr int kItems = Vector<scalar_t>::kItems;
  const scalar_t* transposed = static_cast<const scalar_t*>(p.transposed);
  opmath_t* sums = static_cast<opmath_t*>(p.sums);
  opmath_t* values = static_cast<opmath_t*>(p.params.values);
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
  for (index_t j = index_t(blockIdx.x) * kWarps + warp; j < p.params.k; j += index_t(gridDim.x) * kWarps) {
    const Place place = place_of(p.params, j);
    const scalar_t* dy = transposed + place.output * p.padded_tokens;
    const scalar_t* x = transposed + (p.params.num_outputs + place.input) * p.padded_tokens;
    opmath_t partial[kItems] = {};
#pragma unroll 4
    for (index_t t = lane * kItems; t < p.padded_tokens; t += kWarpSize * kItems) {
      const Vector<scalar_t> a = load_vector(dy + t), b = load_vector(x + t);
#pragma unroll
      for (int i = 0; i < kItems; ++i) partial[i] += to_opmath(a.items[i]) * to_opmath(b.items[i]);
    }
    opmath_t sum = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) sum += partial[i];
    sum = warp_sum(sum);
    if (lane == 0) {
      if (!p.is_first) sum += sums[j];
      if (!p.is_last) {
        sums[j] = sum;
      } else {
        values[j] = p.params.accumulate != 0 ? values[j] + sum : sum;
      }
    }
  }
}

// ---- host ----

index_t round_up(index_t n, index_t multiple) { return ceil_div(n, multiple) * multiple; }

// Fills in the workspace; returns its size.
index_t carve(const SddmmParams& params, void* workspace, Problem& p) {
  const index_t num_channels = params.num_outputs + params.num_inputs;
  p.padded_tokens = round_up(std::min(params.num_tokens, kTokenBlock), kTileTokens);
  const index_t marks = round_up(num_channels, 256);
  const index_t factors = round_up(num_channels * p.padded_tokens * itemsize_of(params.dtype), 256);
  const index_t sums = params.num_tokens > kTokenBlock ? params.k * 8 : 0;
  if (workspace != nullptr) {
    char* const base = static_cast<char*>(workspace);
    p.used = reinterpret_cast<uint8_t*>(base);
    p.transposed = base + marks;
    p.sums = base + marks + factors;
  }
  return marks + factors + sums;
}

template <class scalar_t, class item_t>
void launch(const SddmmParams& params, void* workspace, cudaStream_t stream, int max_blocks) {
  Problem p{};
  p.params = params;
  carve(params, workspace, p);
  const auto grid = [&](index_t work) { return grid_size(work, kBlocksPerSm, max_blocks); };
  const index_t num_channels = params.num_outputs + params.num_inputs;
  cuda_check(cudaMemsetAsync(p.used, 0, size_t(num_channels), stream), "cudaMemsetAsync");
  SAFT_LAUNCH(mark_kernel, grid(ceil_div(params.k, kThreads)), kThreads, stream, p);
  // without tokens, one block of none: the sums are zero
  for (index_t first = 0; first == 0 || first < params.num_tokens; first += kTokenBlock) {
    p.first_token = first;
    p.num_tokens = std::min(kTokenBlock, params.num_tokens - first);
    p.padded_tokens = round_up(p.num_tokens, kTileTokens);
    p.is_first = first == 0;
    p.is_last = first + kTokenBlock >= params.num_tokens;
    const index_t channel_tiles =
        ceil_div(params.num_outputs, kTileChannels) + ceil_div(params.num_inputs, kTileChannels);
    const index_t tiles = channel_tiles * (p.padded_tokens / kTileTokens);
    if (tiles > 0) SAFT_LAUNCH(transpose_kernel<item_t>, grid(tiles), kThreads, stream, p);
    SAFT_LAUNCH(dot_kernel<scalar_t>, grid(ceil_div(params.k, kWarps)), kThreads, stream, p);
  }
}

}  // namespace cuda_sddmm

index_t sddmm_cuda_workspace_bytes(const SddmmParams& params) {
  cuda_sddmm::Problem p{};
  return cuda_sddmm::carve(params, nullptr, p);
}

void sddmm_cuda(const SddmmParams& params, void* workspace, void* stream, int max_blocks) {
  using namespace cuda_sddmm;
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  switch (params.dtype) {
    case ScalarType::kFloat32:
      return launch<float, uint32_t>(params, workspace, cuda_stream, max_blocks);
    case ScalarType::kBFloat16:
      return launch<bfloat16, uint16_t>(params, workspace, cuda_stream, max_blocks);
    case ScalarType::kFloat16:
      return launch<float16, uint16_t>(params, workspace, cuda_stream, max_blocks);
    case ScalarType::kFloat64:
      return launch<double, uint64_t>(params, workspace, cuda_stream, max_blocks);
  }
}

}  // namespace saft
