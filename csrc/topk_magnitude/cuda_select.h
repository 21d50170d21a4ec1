// topk_magnitude / cuda: the exact k-th key.
#pragma once

#include "topk_magnitude/cuda_tables.h"

namespace saft {
namespace cuda_topk_magnitude {

// ---- select ----

// topk_magnitude / select: one digit of the exact k-th key.
// Traffic    reads 4 B (8 B with fp64) per band element, out of L2. When the bracket missed the key or the
//            cache was too small, every element of the data instead.
// Algorithm  radix select: a histogram of key - lo, 11 bits at a time, from the top of the range.
// Contract   returns at once when the range is one key.
// Launch     grid-stride; the last block narrows the range.
template <class Key>
__global__ void __launch_bounds__(kThreads) select_kernel(Problem<Key> p, int pass) {
  __shared__ uint32_t histogram[kBins];
  __shared__ PickScratch scratch;
  State<Key>& state = *p.state;
  const Key lo = state.select_lo, hi = state.select_hi;
  if (lo == hi) return;
  clear_shared<kBins>(histogram);
  const int bits = sizeof(Key) == 4 ? 32 - __clz(int(uint32_t(hi - lo))) : 64 - __clzll((long long)(hi - lo));
  const int shift = bits > kDigitBits ? bits - kDigitBits : 0;
  if (state.from_data == 0) {
    const index_t thread = index_t(blockIdx.x) * kThreads + threadIdx.x;
    const index_t num_band = index_t(state.num_band[0]);
#pragma unroll 4
    for (index_t i = thread; i < num_band; i += index_t(gridDim.x) * kThreads) {
      const Key key = p.band_keys[i];
      if (key >= lo && key <= hi) atomicAdd(&histogram[(key - lo) >> shift], 1u);
    }
  } else {
    const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
    for (index_t t = index_t(blockIdx.x) * kWarps + warp; t < p.num_tiles; t += index_t(gridDim.x) * kWarps) {
      const DeviceTensor& x = p.tensors[p.tile_tensor[t]];
      const Tile tile = make_tile(x, t);
#pragma unroll 4
      for (int i = tile.begin + lane; i < tile.end; i += kWarpSize) {
        const Key key = widen<Key>(x.dtype, load_native<Key>(x, tile.first + i));
        if (key >= lo && key <= hi) atomicAdd(&histogram[(key - lo) >> shift], 1u);
      }
    }
  }
  __syncthreads();
  uint64_t* global = p.select_histograms + pass * kBins;
  add_histogram(histogram, global);
  if (!is_last_block(&state.tickets[kSamplePasses + 2 + pass])) return;
  uint32_t digit;
  uint64_t rank;
  const bool found = pick_digit(global, state.select_rank, scratch, &digit, &rank);
  if (threadIdx.x != 0) return;
  state.reads += state.from_data;
  if (!found) {
    state.status = 1;
    state.select_hi = lo;  // stop here
    return;
  }
  const Key low = Key(lo + (Key(digit) << shift));
  const Key high = Key(low + ((Key(1) << shift) - 1));
  state.select_lo = low;
  state.select_hi = high < hi ? high : hi;
  state.select_rank = rank;
  if (state.select_lo == state.select_hi) {
    state.threshold = low;
    if (state.refilter != 0) set_bracket(state, low, low);
  }
}

}  // namespace cuda_topk_magnitude
}  // namespace saft
