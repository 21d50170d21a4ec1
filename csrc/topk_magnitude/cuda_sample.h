// topk_magnitude / cuda: from a sample to a bracket [lo, hi] on the k-th key.
#pragma once

#include "topk_magnitude/cuda_tables.h"

namespace saft {
namespace cuda_topk_magnitude {

// ---- sample ----

// Slots for sampled keys: whole items of a run per thread.
__host__ __device__ inline index_t sample_numel(index_t num_sampled_runs) {
  return ceil_div(num_sampled_runs, kThreads) * (kItemKeys * kThreads);
}

// Ranks of the bracket's ends in a sample of `num_keys`. One thread.
template <class Key>
__device__ void set_ranks(const Problem<Key>& p, uint32_t num_keys, SampleEnds<Key>* ends) {
  State<Key>& state = *p.state;
  if (index_t(num_keys) == p.numel) {  // all of the data
    ends->rank[0] = ends->rank[1] = uint32_t(p.k);
    return;
  }
  const double rank = p.share * double(num_keys);
  const float margin = float(kSigmas) * sqrtf(float(rank * (1 - p.share))) + float(kSigmas * kSigmas / 2);
  const double low = ceil(rank + double(margin)), high = floor(rank - double(margin));
  ends->rank[0] = low > double(num_keys) ? 0 : uint32_t(low);
  ends->rank[1] = high < 1 ? 1 : uint32_t(high);
  state.above_sample = high < 1;
  state.few = uint32_t(margin / 8);
}

// Fixes the next digit of both ends of the bracket. Sets the bracket when they have all digits that matter: the last one,
// or where so few sampled keys share an end's that the bracket may have them all. The block that finishes the pass.
template <class Key>
__device__ void advance_sample(const Problem<Key>& p, int pass, PickScratch<uint32_t>& scratch) {
  State<Key>& state = *p.state;
  SampleEnds<Key>* const ends = state.ends + pass;
  const uint32_t* histograms = p.sample_histograms + pass * 2 * kBins;
  const int shift = sample_shift<Key>(pass);
  BlockHistogram<uint32_t> bins[2];
  bins[0].load(histograms);
  bins[1].load(histograms + (pass == 0 ? 0 : kBins));
  bins[0].add_up(scratch);
  bins[1].add_up(scratch);
  if (pass == 0) {
    if (threadIdx.x == 0) set_ranks(p, bins[0].total, ends);
    __syncthreads();
  }
  uint32_t ranks[2], num_more = 0;
  Key prefixes[2];
#pragma unroll
  for (int end = 0; end < 2; ++end) {
    const bool found = bins[end].pick(ends->rank[end], scratch);
    const int digit_bits = pass == 0 ? 0 : sample_shift<Key>(pass - 1) - shift;
    ranks[end] = found ? scratch.rank : 0;
    prefixes[end] = Key((ends->prefix[end] << digit_bits) | scratch.digit);
    num_more += scratch.count;
    __syncthreads();  // the scratch has been read
  }
  const bool is_bracketed =
      pass == kSamplePasses - 1 || shift <= p.zero_bits || p.k == 0 || (pass > 0 && num_more <= state.few);
  if (threadIdx.x == 0) {
    state.ends[pass + 1] = {{ranks[0], ranks[1]}, {prefixes[0], prefixes[1]}};
    state.is_bracketed[pass + 1] = is_bracketed;
  }
  if (!is_bracketed) return;
  const Key low_bits = Key((Key(1) << shift) - 1);
  Key lo = ranks[0] != 0 ? possible_lo(Key(prefixes[0] << shift), p.zero_bits) : Key(0);
  Key hi = possible_hi(Key((prefixes[1] << shift) | low_bits), p.zero_bits);
  // the sample's largest key is no upper end, unless one long run of ties reaches from it down to lo
  if (state.above_sample != 0 && hi != lo) hi = CommonKey<Key>::kNaN;
  if (p.k == 0) lo = hi = kNoKey<Key>;
  set_bracket(state, lo, hi);
}

// take(i, key) for a run of a tensor without strides, all of it loaded at once; kAbsent past the end of the tensor.
template <class Key, class Word, class Take>
__device__ __forceinline__ void visit_run(const DeviceTensor& x, index_t first, const Take& take) {
  Word words[kRunNumel];
#pragma unroll
  for (int i = 0; i < kRunNumel; ++i) {
    words[i] = first + i < x.numel ? static_cast<const Word*>(x.data)[first + i] : Word(0);
  }
#pragma unroll
  for (int i = 0; i < kRunNumel; ++i) {
    take(i,
         first + i < x.numel ? widen<Key>(x.dtype, Key(words[i] & Word(Word(~Word(0)) >> 1))) : kAbsent<Key>);
  }
}

// Samples a run per thread.
template <class Key>
__device__ __forceinline__ void sample_runs(const Problem<Key>& p, uint32_t item, uint32_t* histogram) {
  Key* const to = p.sample + index_t(item) * (kItemKeys * kThreads) + threadIdx.x;
  const auto take = [&](int i, Key key) {
    to[i * kThreads] = key;
    if (key != kAbsent<Key>) atomicAdd(&histogram[key >> sample_shift<Key>(0)], 1u);
  };
  index_t run = index_t(item) * kThreads + threadIdx.x;
  if (run >= p.num_sampled_runs) {
    for (int i = 0; i < kRunNumel; ++i) take(i, kAbsent<Key>);
    return;
  }
  if (p.num_sampled_runs != p.num_runs) {
    const index_t jitter = index_t(__umul64hi(splitmix64(uint64_t(run)), uint64_t(p.num_runs)));
    run = (run * p.num_runs + jitter) >> p.sampled_runs_log2;
  }
  const DeviceTensor& x = p.tensors[find_row(p.tensors, p.num_tensors, &DeviceTensor::first_run, run)];
  const index_t first = (run - x.first_run) * kRunNumel;
  if (x.ndim != 0) {
#pragma unroll 1
    for (int i = 0; i < kRunNumel; ++i) {
      take(i, first + i < x.numel ? widen<Key>(x.dtype, load_native<Key>(x, first + i)) : kAbsent<Key>);
    }
  } else if (x.itemsize == 2) {
    visit_run<Key, uint16_t>(x, first, take);
  } else if (x.itemsize == 4) {
    visit_run<Key, uint32_t>(x, first, take);
  } else if constexpr (sizeof(Key) == 8) {
    visit_run<Key, uint64_t>(x, first, take);
  }
}

// Of the sampled keys that have an end's digits so far, the next one.
template <class Key>
__device__ __forceinline__ void count_next_digit(const Problem<Key>& p, int pass, uint32_t item,
                                                 uint32_t* histograms) {
  const int above = sample_shift<Key>(pass - 1), shift = sample_shift<Key>(pass);
  const uint32_t digit_mask = (1u << (above - shift)) - 1;
  const SampleEnds<Key>& ends = p.state->ends[pass];
  const Key prefix_lo = ends.prefix[0], prefix_hi = ends.prefix[1];
  visit_keys(p.sample, sample_numel(p.num_sampled_runs), item, [&](Key key) {
    const uint32_t digit = uint32_t(key >> shift) & digit_mask;
    if (key >> above == prefix_lo) atomicAdd(&histograms[digit], 1u);
    if (key >> above == prefix_hi) atomicAdd(&histograms[kBins + digit], 1u);
  });
}

// What later kernels find: the tensor of every tile, and zeros.
template <class Key>
__device__ __forceinline__ void prepare_tiles(const Problem<Key>& p) {
  const int thread = int(blockIdx.x * kThreads + threadIdx.x), num_threads = int(gridDim.x) * kThreads;
#pragma unroll 1
  for (int i = thread; i < (1 + kSelectPasses<Key>)*kBins; i += num_threads) p.select_histograms[i] = 0;
#pragma unroll 1
  for (index_t t = thread; t < p.num_tiles; t += num_threads) {
    p.tile_tensor[t] = uint32_t(find_row(p.tensors, p.num_tensors, &DeviceTensor::first_tile, t));
    if (t % kChunkTiles == 0) p.chunk_sums[t / kChunkTiles] = 0;
    if (t % (kChunkTiles * kGroupChunks) == 0) p.group_sums[t / (kChunkTiles * kGroupChunks)] = 0;
  }
}

// topk_magnitude / sample: from stratified jittered runs to the bracket; the tensor of every tile.
// Traffic    reads a 32-byte sector per run, 4 or 16 MB; writes a key per sampled element, and reads it again, out of L2,
//            for each further digit: one for 16-bit types and mostly for others; writes 4 B per tile.
// Algorithm  one run per stratum: gradients are correlated along both dimensions, and independent places gave
//            rank errors three times as large. Radix select for both ranks at once: a histogram per block, then a global
//            one; the block that finishes a pass picks.
// Contract   where all runs fit, the sample is all of the data.
// Launch     resident blocks, which claim what they read; a run per thread.
template <class Key>
__global__ void __launch_bounds__(kThreads, kSampleBlocksPerSm<Key>) sample_kernel(Problem<Key> p) {
  wait_for_previous_kernels();
  __shared__ uint32_t histograms[2 * kBins];
  __shared__ PickScratch<uint32_t> scratch;
  State<Key>& state = *p.state;
  const uint32_t num_items = uint32_t(sample_numel(p.num_sampled_runs) / (kItemKeys * kThreads));
  for (int pass = 0; state.is_bracketed[pass] == 0; ++pass) {
    clear_shared<2 * kBins>(histograms);
    work_on(
        &state.sample_passes[pass], num_items,
        [&](uint32_t item) {
          if (pass == 0) {
            sample_runs(p, item, histograms);
          } else {
            count_next_digit(p, pass, item, histograms);
          }
        },
        [&] {
          uint32_t* const global = p.sample_histograms + pass * 2 * kBins;
          add_histogram(histograms, global);
          add_histogram(histograms + kBins, global + kBins);
        },
        [&] { advance_sample(p, pass, scratch); });
    if (pass == 0) prepare_tiles(p);  // while others work
    wait_for(&state.sample_passes[pass]);
  }
}

}  // namespace cuda_topk_magnitude
}  // namespace saft
