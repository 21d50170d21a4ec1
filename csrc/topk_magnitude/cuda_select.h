// topk_magnitude / cuda: the exact k-th key.
#pragma once

#include "topk_magnitude/cuda_filter.h"

namespace saft {
namespace cuda_topk_magnitude {

// ---- select ----

// topk_magnitude / select: the exact k-th key, digit by digit; after a bad guess, what is above and equal to it.
// Traffic    reads 4 B (8 B with fp64) per band element, out of L2, once if the filter's digit and the next one are
//            all. When the bracket missed the key or the cache was too small, every element of the data instead: once
//            per digit, and once more to filter it.
// Algorithm  radix select: a histogram of key - lo, 11 bits at a time, from the top of the range; the block that finishes
//            a pass narrows the range.
// Contract   returns at once when the range is one key.
// Launch     resident blocks, which claim what they read.
template <class Key>
__global__ void __launch_bounds__(kThreads, kSelectBlocksPerSm) select_kernel(Problem<Key> p) {
  wait_for_previous_kernels();
  __shared__ FilterScratch<Key> scratch;
  __shared__ PickScratch<uint64_t> pick_scratch;
  State<Key>& state = *p.state;
  uint32_t* const histogram = scratch.histogram;
  const bool from_data = state.from_data != 0;
  const index_t num_band = index_t(state.num_band[0]);
  const uint32_t num_items =
      uint32_t(from_data ? ceil_div(p.num_tiles, kWarps) : ceil_div(num_band, kItemKeys * kThreads));
  for (int pass = 0; pass < kSelectPasses<Key>; ++pass) {
    const KeyRange<Key> range = state.ranges[pass];
    if (range.lo == range.hi) break;
    const int shift = digit_shift(range);
    uint64_t* const global = p.select_histograms + (1 + pass) * kBins;
    clear_shared<kBins>(histogram);
    const auto count_item = [&](uint32_t item) {
      if (!from_data) {
        return visit_keys(p.band_keys, num_band, item,
                          [&](Key key) { count_digit(range, shift, key, histogram); });
      }
      const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
      const index_t t = index_t(item) * kWarps + warp;
      if (t >= p.num_tiles) return;
      const DeviceTensor& x = p.tensors[p.tile_tensor[t]];
      const Tile tile = make_tile(x, t);
#pragma unroll 4
      for (int i = tile.begin + lane; i < tile.end; i += kWarpSize) {
        count_digit(range, shift, widen<Key>(x.dtype, load_native<Key>(x, tile.first + i)), histogram);
      }
    };
    work_on(
        &state.select_passes[pass], num_items, count_item, [&] { add_histogram(histogram, global); },
        [&] {
          narrow(p, range, global, pick_scratch, &state.ranges[pass + 1]);
          if (threadIdx.x == 0) state.reads += from_data;
        });
    wait_for(&state.select_passes[pass]);
  }
  if (state.refilter == 0) return;
  if (filter_tiles(p, 1, scratch) && threadIdx.x == 0) {
    const uint64_t k = uint64_t(p.k), sure = __ldcg(&state.num_sure[1]), band = __ldcg(&state.num_band[1]);
    state.reads += 1;
    if (!(sure < k && k <= sure + band)) state.status = 1;
  }
}

}  // namespace cuda_topk_magnitude
}  // namespace saft
