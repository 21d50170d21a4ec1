// topk_magnitude / cuda: what is selected, in order.
#pragma once

#include "topk_magnitude/cuda_filter.h"

namespace saft {
namespace cuda_topk_magnitude {

// ---- count ----

// topk_magnitude / count: each tile's selected elements and ties; sums over chunks of tiles, scanned.
// Traffic    reads the band's keys out of L2, 8 B per tile; writes 4 B per tile.
// Algorithm  eight threads per tile; the last block scans the chunks.
// Contract   the sums of a chunk become the numbers of elements above, and equal to, the threshold in lower
//            chunks.
// Launch     one block per chunk of kChunkTiles, grid-stride.
template <class Key>
__global__ void __launch_bounds__(kThreads) count_kernel(Problem<Key> p) {
  __shared__ uint32_t packed_of[kChunkTiles];
  __shared__ uint64_t warp_sums[kWarps];
  State<Key>& state = *p.state;
  const Key threshold = state.threshold;
  const bool single = state.single != 0;
  const index_t num_chunks = ceil_div(p.num_tiles, kChunkTiles);
  const int part = int(threadIdx.x) % 8, in_chunk = int(threadIdx.x) / 8;
  for (index_t chunk = blockIdx.x; chunk < num_chunks; chunk += gridDim.x) {
    const index_t t = chunk * kChunkTiles + in_chunk;
    uint32_t packed = 0;
    if (t < p.num_tiles && state.status == 0) {
      const uint32_t counts = p.tile_counts[t], num_band = counts & 0xffffu;
      if (part == 0) packed = counts & 0xffff0000u;
      if (single) {
        if (part == 0) packed += num_band;
      } else if (num_band != 0) {
        const Key* keys = p.band_keys + p.tile_band_offset[t];
#pragma unroll 4
        for (uint32_t i = uint32_t(part); i < num_band; i += 8) {
          packed += keys[i] > threshold ? 1u << 16 : uint32_t(keys[i] == threshold);
        }
      }
    }
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2) packed += __shfl_xor_sync(kFullMask, packed, offset);
    if (part == 0) {
      packed_of[in_chunk] = packed;
      if (t < p.num_tiles) p.tile_selected[t] = packed;
    }
    __syncthreads();
    if (threadIdx.x < kWarpSize) {
      const uint32_t greater = __reduce_add_sync(kFullMask, packed_of[threadIdx.x] >> 16);
      const uint32_t equal = __reduce_add_sync(kFullMask, packed_of[threadIdx.x] & 0xffffu);
      if (threadIdx.x == 0) {
        p.chunk_greater[chunk] = greater;
        p.chunk_equal[chunk] = equal;
      }
    }
    __syncthreads();
  }
  if (!is_last_block(&state.tickets[kSamplePasses + 2 + kSelectPasses<Key>])) return;
  constexpr int kPerThread = 4;
  uint64_t greater_below = 0, equal_below = 0;
  for (index_t base = 0; base < num_chunks; base += kThreads * kPerThread) {
    uint64_t greater[kPerThread], equal[kPerThread], greater_sum = 0, equal_sum = 0;
    const index_t first = base + index_t(threadIdx.x) * kPerThread;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const bool exists = first + i < num_chunks;
      greater[i] = exists ? __ldcg(p.chunk_greater + first + i) : 0;
      equal[i] = exists ? __ldcg(p.chunk_equal + first + i) : 0;
      greater_sum += greater[i];
      equal_sum += equal[i];
    }
    uint64_t greater_total, equal_total;
    uint64_t greater_at =
        greater_below + block_exclusive_sum<kThreads>(greater_sum, warp_sums, &greater_total);
    uint64_t equal_at = equal_below + block_exclusive_sum<kThreads>(equal_sum, warp_sums, &equal_total);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (first + i < num_chunks) {
        p.chunk_greater[first + i] = greater_at;
        p.chunk_equal[first + i] = equal_at;
      }
      greater_at += greater[i];
      equal_at += equal[i];
    }
    greater_below += greater_total;
    equal_below += equal_total;
  }
  if (threadIdx.x == 0) {
    const uint64_t k = uint64_t(p.k);
    state.num_ties = k - greater_below;
    // each holds by construction; without them emit would write outside `indices`
    if (greater_below > k || k > greater_below + equal_below) state.status = 1;
  }
}

// ---- emit ----

// Clears all but the first `keep` set bits of the position-ordered words. One warp; a lane owns `strips` words.
__device__ inline void keep_first_bits(uint32_t* words, int strips, uint32_t keep, int lane) {
  uint32_t count = 0;
  for (int i = 0; i < strips; ++i) count += uint32_t(__popc(words[lane * strips + i]));
  uint32_t before = warp_exclusive_sum(count, lane);
  for (int i = 0; i < strips; ++i) {
    const uint32_t word = words[lane * strips + i];
    const uint32_t wanted = before < keep ? keep - before : 0;
    uint32_t rest = word;  // becomes the bits past the wanted ones
    for (uint32_t n = 0; n < wanted && rest != 0; ++n) rest &= rest - 1;
    words[lane * strips + i] = word & ~rest;
    before += uint32_t(__popc(word));
  }
}

// What emit has to know of a tile.
struct TileOutput {
  uint32_t counts;  // sure << 16 | band
  uint32_t equal;   // elements equal to the threshold
  uint32_t ties;    // of them, to select
  index_t offset;   // into indices
};

// One tile, by one warp. `words`, `tie_words`: kTileWords each, bits in the order of positions.
template <class Key>
__device__ __forceinline__ void emit_tile(const Problem<Key>& p, index_t t, const TileOutput& out,
                                          Key threshold, bool single, int lane, uint32_t* words,
                                          uint32_t* tie_words) {
  const DeviceTensor& x = p.tensors[p.tile_tensor[t]];
  const Tile tile = make_tile(x, t);
  const int strips = num_strips(tile);
  const bool all_ties = out.ties == out.equal;
  const bool some_ties = out.ties != 0 && !all_ties;
  __syncwarp();  // the previous tile's words have been read
  for (int i = lane; i < strips * kWarpSize; i += kWarpSize) {
    words[i] = 0;
    tie_words[i] = 0;
  }
  __syncwarp();
  const auto set = [](uint32_t* bits, int position) {
    atomicOr(&bits[position / 32], 1u << (position % 32));
  };

  const uint32_t num_sure = out.counts >> 16, num_band = out.counts & 0xffffu;
  const char* slab = p.slab + slab_offset(x, t);
  if (num_sure <= uint32_t(strips * kStripListCapacity)) {
    const uint16_t* list = reinterpret_cast<const uint16_t*>(slab);
    for (uint32_t i = uint32_t(lane); i < num_sure; i += kWarpSize) set(words, list[i]);
  } else {
    const uint32_t* slab_words = reinterpret_cast<const uint32_t*>(slab);
    for (int strip = 0; strip < strips; ++strip) {
      uint32_t word = slab_words[strip * kWarpSize + lane];
      for (; word != 0; word &= word - 1) {
        set(words, strip * kStripNumel + position_in_strip(__ffs(int(word)) - 1, lane, x.itemsize));
      }
    }
  }
  uint32_t* const tie_target = all_ties ? words : tie_words;
  if (!single) {
    const index_t offset = num_band == 0 ? 0 : p.tile_band_offset[t];
    for (uint32_t i = uint32_t(lane); i < num_band; i += kWarpSize) {
      const Key key = p.band_keys[offset + i];
      if (key > threshold) {
        set(words, p.band_positions[offset + i]);
      } else if (key == threshold && out.ties != 0) {
        set(tie_target, p.band_positions[offset + i]);
      }
    }
  } else if (out.ties != 0) {  // the band was not kept: its elements are those with this one key
    const NativeBracket<Key>& bracket = p.state->native[x.dtype];
#pragma unroll 1
    for (int i = tile.begin + lane; i < tile.end; i += kWarpSize) {
      const Key key = load_native<Key>(x, tile.first + i);
      if (key >= bracket.first_band && key < bracket.first_sure) set(tie_target, i);
    }
  }
  __syncwarp();
  if (some_ties) {
    keep_first_bits(tie_words, strips, out.ties, lane);
    for (int i = 0; i < strips; ++i) words[lane * strips + i] |= tie_words[lane * strips + i];
  }
  uint32_t count = 0;
  for (int i = 0; i < strips; ++i) count += uint32_t(__popc(words[lane * strips + i]));
  index_t* indices = p.indices + out.offset + warp_exclusive_sum(count, lane);
  for (int i = 0; i < strips; ++i) {
    const index_t base = tile.first + (lane * strips + i) * 32;
    for (uint32_t word = words[lane * strips + i]; word != 0; word &= word - 1) {
      *indices++ = base + (__ffs(int(word)) - 1);
    }
  }
}

// topk_magnitude / emit: the sorted positions, where each tensor's start, and the result's head.
// Traffic    reads what the filter wrote; writes 8 B per selected element. One more read of a tile where the
//            bracket was one key and the tile has ties to select.
// Algorithm  per tile: bits of the selected elements in shared memory, a scan of their counts, positions.
// Contract   ties go to the lowest positions: of all elements equal to the threshold, the first `num_ties`.
// Launch     one block per chunk of kChunkTiles, one warp per tile, grid-stride.
template <class Key>
__global__ void __launch_bounds__(kThreads, 3) emit_kernel(Problem<Key> p) {
  __shared__ uint32_t words[kWarps][kTileWords];
  __shared__ uint32_t tie_words[kWarps][kTileWords];
  const State<Key>& state = *p.state;
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    p.result[kResultThreshold] = index_t(state.threshold);
    p.result[kResultNonfinite] = index_t(state.num_nonfinite[0]);
    p.result[kResultStatus] = state.status;
    p.result[kResultReads] = state.reads;
  }
  if (state.status != 0) return;
  const Key threshold = state.threshold;
  const bool single = state.single != 0;
  const uint64_t num_ties = state.num_ties;
  const index_t num_chunks = ceil_div(p.num_tiles, kChunkTiles);
  for (index_t chunk = blockIdx.x; chunk < num_chunks; chunk += gridDim.x) {
    // lane i: tile i of the chunk
    const index_t t = chunk * kChunkTiles + lane;
    const uint32_t packed = t < p.num_tiles ? p.tile_selected[t] : 0;
    const uint32_t greater = packed >> 16, equal = packed & 0xffffu;
    const uint64_t equal_below = p.chunk_equal[chunk] + warp_exclusive_sum(equal, lane);
    const uint64_t greater_below = p.chunk_greater[chunk] + warp_exclusive_sum(greater, lane);
    const uint64_t ties_below = equal_below < num_ties ? equal_below : num_ties;
    TileOutput mine;
    mine.counts = t < p.num_tiles ? p.tile_counts[t] : 0;
    mine.equal = equal;
    mine.ties = num_ties - ties_below < equal ? uint32_t(num_ties - ties_below) : equal;
    mine.offset = index_t(greater_below + ties_below);
    if (warp == 0 && t < p.num_tiles) {
      const uint32_t tensor = p.tile_tensor[t];
      if (p.tensors[tensor].first_tile == t) p.result[kResultOffsets + tensor] = mine.offset;
    }
    const uint32_t occupied = __ballot_sync(kFullMask, greater + mine.ties != 0);
    for (int i = warp; i < kChunkTiles; i += kWarps) {
      TileOutput out;
      out.counts = __shfl_sync(kFullMask, mine.counts, i);
      out.equal = __shfl_sync(kFullMask, mine.equal, i);
      out.ties = __shfl_sync(kFullMask, mine.ties, i);
      out.offset = __shfl_sync(kFullMask, mine.offset, i);
      if ((occupied >> i & 1u) == 0) continue;
      emit_tile(p, chunk * kChunkTiles + i, out, threshold, single, lane, words[warp], tie_words[warp]);
    }
  }
}

}  // namespace cuda_topk_magnitude
}  // namespace saft
