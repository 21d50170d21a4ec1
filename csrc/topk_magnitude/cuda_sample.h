// topk_magnitude / cuda: from a sample to a bracket [lo, hi] on the k-th key.
#pragma once

#include "topk_magnitude/cuda_tables.h"

namespace saft {
namespace cuda_topk_magnitude {

// ---- sample ----

// Fixes the next digit of both ends of the bracket; after the last one, sets the bracket. The last block.
template <class Key>
__device__ void advance_sample(const Problem<Key>& p, int pass, PickScratch& scratch) {
  State<Key>& state = *p.state;
  const uint32_t* histograms = p.sample_histograms + pass * 2 * kBins;
  if (pass == 0) {
    uint64_t sum = 0, num_keys;
    for (int bin = int(threadIdx.x); bin < kBins; bin += kThreads) sum += __ldcg(histograms + bin);
    block_exclusive_sum<kThreads>(sum, scratch.warp_sums, &num_keys);
    if (threadIdx.x == 0) {
      if (num_keys == uint64_t(p.numel)) {  // all of the data
        state.sample_rank[0] = state.sample_rank[1] = uint64_t(p.k);
      } else {
        const double share = double(p.k) / double(p.numel);
        const double rank = share * double(num_keys);
        const double margin = kSigmas * sqrt(rank * (1 - share)) + kSigmas * kSigmas / 2;
        const double low = ceil(rank + margin), high = floor(rank - margin);
        state.sample_rank[0] = low > double(num_keys) ? 0 : uint64_t(low);
        state.sample_rank[1] = high < 1 ? 1 : uint64_t(high);
        state.above_sample = high < 1;
      }
    }
    __syncthreads();
  }
  const int shift = sample_shift<Key>(pass);
  for (int end = 0; end < 2; ++end) {
    const uint64_t rank = state.sample_rank[end];
    uint32_t digit;
    uint64_t rank_in_bin;
    const bool found =
        pick_digit(histograms + (pass == 0 ? 0 : end * kBins), rank, scratch, &digit, &rank_in_bin);
    if (threadIdx.x == 0) {
      const int digit_bits = pass == 0 ? 0 : sample_shift<Key>(pass - 1) - shift;
      state.sample_rank[end] = found ? rank_in_bin : 0;
      state.sample_prefix[end] = Key((state.sample_prefix[end] << digit_bits) | digit);
    }
  }
  if (pass == kSamplePasses - 1 && threadIdx.x == 0) {
    const Key low_bits = Key((Key(1) << shift) - 1);
    const Key lo = state.sample_rank[0] != 0 ? Key(state.sample_prefix[0] << shift) : Key(0);
    Key hi = Key((state.sample_prefix[1] << shift) | low_bits);
    // the sample's largest key is no upper end, unless one long run of ties reaches from it down to lo
    if (state.above_sample != 0 && hi != lo) hi = CommonKey<Key>::kNaN;
    if (p.k == 0) {
      set_bracket(state, kNoKey<Key>, kNoKey<Key>);
    } else {
      set_bracket(state, lo, hi);
    }
  }
}

// topk_magnitude / sample: stratified jittered runs; the bracket's first digit; the tensor of every tile.
// Traffic    reads a 32-byte sector per run, 4 or 16 MB; writes a key per sampled element, 4 B per tile.
// Algorithm  one run per stratum: gradients are correlated along both dimensions, and independent places gave
//            rank errors three times as large. A histogram per block, then a global one; the last block
//            picks.
// Contract   `sample` holds kAbsent where a run ends early. Where all runs fit, it is all of the data.
// Launch     grid-stride.
template <class Key>
__global__ void __launch_bounds__(kThreads) sample_kernel(Problem<Key> p) {
  __shared__ uint32_t histogram[kBins];
  __shared__ PickScratch scratch;
  clear_shared<kBins>(histogram);
  const index_t thread = index_t(blockIdx.x) * kThreads + threadIdx.x;
  const index_t num_threads = index_t(gridDim.x) * kThreads;
  for (index_t t = thread; t < p.num_tiles; t += num_threads) {
    p.tile_tensor[t] = uint32_t(find_row(p.tensors, p.num_tensors, &DeviceTensor::first_tile, t));
    if (t % kChunkTiles == 0) p.chunk_sums[t / kChunkTiles] = 0;
    if (t % (kChunkTiles * kGroupChunks) == 0) p.group_sums[t / (kChunkTiles * kGroupChunks)] = 0;
  }
  const bool all = p.num_sampled_runs == p.num_runs;
#pragma unroll 1
  for (index_t i = thread; i < p.num_sampled_runs * kRunNumel; i += num_threads) {
    index_t run = i / kRunNumel;
    if (!all) {
      const index_t jitter = index_t(__umul64hi(splitmix64(uint64_t(run)), uint64_t(p.num_runs)));
      run = (run * p.num_runs + jitter) >> p.sampled_runs_log2;
    }
    const DeviceTensor& x = p.tensors[find_row(p.tensors, p.num_tensors, &DeviceTensor::first_run, run)];
    const index_t flat = (run - x.first_run) * kRunNumel + i % kRunNumel;
    Key key = kAbsent<Key>;
    if (flat < x.numel) {
      key = widen<Key>(x.dtype, load_native<Key>(x, flat));
      atomicAdd(&histogram[key >> sample_shift<Key>(0)], 1u);
    }
    p.sample[i] = key;
  }
  __syncthreads();
  add_histogram(histogram, p.sample_histograms);
  if (is_last_block(&p.state->tickets[0])) advance_sample(p, 0, scratch);
}

// topk_magnitude / refine: the next digit of both ends of the bracket.
// Traffic    reads the sample, 4 or 16 MB out of L2.
// Algorithm  radix select for two ranks at once.
// Contract   the last pass sets the bracket.
// Launch     grid-stride.
template <class Key>
__global__ void __launch_bounds__(kThreads) refine_kernel(Problem<Key> p, int pass) {
  __shared__ uint32_t histograms[2 * kBins];
  __shared__ PickScratch scratch;
  clear_shared<2 * kBins>(histograms);
  const int above = sample_shift<Key>(pass - 1), shift = sample_shift<Key>(pass);
  const uint32_t digit_mask = (1u << (above - shift)) - 1;
  const Key prefix_lo = p.state->sample_prefix[0], prefix_hi = p.state->sample_prefix[1];
  const index_t thread = index_t(blockIdx.x) * kThreads + threadIdx.x;
#pragma unroll 4
  for (index_t i = thread; i < p.num_sampled_runs * kRunNumel; i += index_t(gridDim.x) * kThreads) {
    const Key key = p.sample[i];
    const uint32_t digit = uint32_t(key >> shift) & digit_mask;
    if (key >> above == prefix_lo) atomicAdd(&histograms[digit], 1u);
    if (key >> above == prefix_hi) atomicAdd(&histograms[kBins + digit], 1u);
  }
  __syncthreads();
  uint32_t* global = p.sample_histograms + pass * 2 * kBins;
  add_histogram(histograms, global);
  add_histogram(histograms + kBins, global + kBins);
  if (is_last_block(&p.state->tickets[pass])) advance_sample(p, pass, scratch);
}

}  // namespace cuda_topk_magnitude
}  // namespace saft
