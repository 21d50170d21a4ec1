// topk_magnitude / cuda: what is selected, in order.
#pragma once

#include "topk_magnitude/cuda_filter.h"

namespace saft {
namespace cuda_topk_magnitude {

// ---- emit ----

constexpr int kTileStrips = kTileNumel / kStripNumel;
constexpr int kSmallTile = 32;     // elements selected of a tile that kTileLanes lanes put in order
constexpr int kStageNumel = 1024;  // positions of a large tile that are written together: 12.5 % of it
constexpr int kEmitBlocksPerSm = 6, kLargeBlocksPerSm = 4;
static_assert(kSmallTile <= kStripListCapacity, "the filter made a list of every small tile");

// A warp's. `words`: bits in the order of positions; a lane owns kTileStrips words, and the gap after them lets all
// lanes read theirs at once.
constexpr int kLaneWords = kTileStrips + 1;
struct EmitScratch {
  uint32_t words[kWarpSize * kLaneWords];
  union {
    uint16_t stage[kStageNumel];
    uint32_t tie_words[kWarpSize * kLaneWords];
  };
};

__device__ __forceinline__ uint32_t place_of_word(uint32_t word) { return word + word / kTileStrips; }

__device__ __forceinline__ void clear_words(uint32_t* words, int lane) {
#pragma unroll
  for (int i = 0; i < kLaneWords; ++i) words[i * kWarpSize + lane] = 0;
  __syncwarp();
}

__device__ __forceinline__ void set_bit(uint32_t* words, uint32_t position) {
  atomicOr(&words[place_of_word(position / 32)], 1u << (position % 32));
}

// Bit i of the lower half to bit 2 i, of the upper half to bit 2 i + 1.
__device__ __forceinline__ uint32_t interleave_halves(uint32_t x) {
  x = (x & 0xff0000ffu) | (x & 0x00ff0000u) >> 8 | (x & 0x0000ff00u) << 8;
  x = (x & 0xf00ff00fu) | (x & 0x0f000f00u) >> 4 | (x & 0x00f000f0u) << 4;
  x = (x & 0xc3c3c3c3u) | (x & 0x30303030u) >> 2 | (x & 0x0c0c0c0cu) << 2;
  return (x & 0x99999999u) | (x & 0x44444444u) >> 1 | (x & 0x22222222u) << 1;
}

// A tile's words as the filter left them, in the order of positions. Inside a strip a position is vector, lane, element;
// a word of the filter's has vector and element of one lane, and has to have the low digits of the lane instead of the
// vector: one exchange of bits between two lanes per binary digit, no set bit looked at.
template <int kItemsize>
__device__ __forceinline__ void load_in_order(const char* slab, int strips, int lane, uint32_t* words) {
  constexpr int kElementBits = kItemsize == 2 ? 3 : kItemsize == 4 ? 2 : 1, kVectorBits = 5 - kElementBits;
  const uint32_t* from = reinterpret_cast<const uint32_t*>(slab) + lane;
  uint32_t loaded[kTileStrips];
#pragma unroll
  for (int strip = 0; strip < kTileStrips; ++strip) {
    loaded[strip] = strip < strips ? from[strip * kWarpSize] : 0;
  }
  // now lane has the digits (lane's high ones, vector)
  uint32_t* const to =
      words + place_of_word((uint32_t(lane) & ((1u << kVectorBits) - 1)) << (5 - kVectorBits) |
                            uint32_t(lane) >> kVectorBits);
#pragma unroll
  for (int strip = 0; strip < kTileStrips; ++strip) {
    uint32_t word = kItemsize == 2 ? interleave_halves(loaded[strip]) : __brev(loaded[strip]);
#pragma unroll
    for (int digit = 0; digit < kVectorBits; ++digit) {
      const int shift = 1 << (kElementBits + digit);
      const uint32_t low = 0xffffffffu / ((1u << shift) + 1);
      const uint32_t other = __shfl_xor_sync(kFullMask, word, 1 << digit);
      word = (lane >> digit & 1) != 0 ? (word & ~low) | (other >> shift & low)
                                      : (word & low) | (other & low) << shift;
    }
    to[place_of_word(strip * kWarpSize)] = word;
  }
  __syncwarp();
}

// Clears all but the first `keep` set bits. One warp.
__device__ inline void keep_first_bits(uint32_t* words, uint32_t keep, int lane) {
  words += lane * kLaneWords;
  uint32_t count = 0;
#pragma unroll 1
  for (int i = 0; i < kTileStrips; ++i) count += uint32_t(__popc(words[i]));
  uint32_t before = warp_exclusive_sum(count, lane);
#pragma unroll 1
  for (int i = 0; i < kTileStrips; ++i) {
    const uint32_t word = words[i];
    const uint32_t wanted = before < keep ? keep - before : 0;
    uint32_t rest = word;  // becomes the bits past the wanted ones
    for (uint32_t n = 0; n < wanted && rest != 0; ++n) rest &= rest - 1;
    words[i] = word & ~rest;
    before += uint32_t(__popc(word));
  }
}

// Writes `first` plus each of the `num` positions, two to a store where they stand in one 16-byte word of `to`.
// The first of them is stage[skew].
__device__ __forceinline__ void store_positions(const uint16_t* stage, int skew, int num, index_t first,
                                                index_t* to, int lane) {
  to -= skew;
#pragma unroll 1
  for (int i = 2 * lane; i < skew + num; i += 2 * kWarpSize) {
    const bool has_first = i >= skew, has_second = i + 1 < skew + num;
    if (has_first && has_second) {
      store_pair(to + i, first + stage[i], first + stage[i + 1]);
    } else {
      const int at = has_first ? i : i + 1;
      to[at] = first + stage[at];
    }
  }
}

// One tile, by one warp.
template <class Key>
__device__ __forceinline__ void emit_large_tile(const Problem<Key>& p, const LargeTile& large, int lane,
                                                EmitScratch& scratch) {
  const index_t t = large.tile;
  const uint32_t equal = large.counts & 0xffffu, ties = large.ties;
  const uint32_t num = (large.counts >> 16) + ties;
  const Key threshold = p.state->threshold;
  const DeviceTensor& x = p.tensors[p.tile_tensor[t]];
  const Tile tile = make_tile(x, t);
  const int strips = num_strips(tile);
  const bool all_ties = ties == equal;
  const bool some_ties = ties != 0 && !all_ties;
  const Survivors found = p.survivors[t];
  const uint32_t num_sure = found.counts >> 16, num_band = found.counts & 0xffffu;
  const char* slab = p.slab + slab_offset(x, t);
  uint32_t* const words = scratch.words;
  uint32_t* const tie_words = all_ties ? words : scratch.tie_words;

  __syncwarp();  // what was in the scratch has been read
  if (some_ties) clear_words(tie_words, lane);
  if (num_sure <= uint32_t(strips * kStripListCapacity)) {
    clear_words(words, lane);
    const uint16_t* list = reinterpret_cast<const uint16_t*>(slab);
#pragma unroll 4
    for (uint32_t i = uint32_t(lane); i < num_sure; i += kWarpSize) set_bit(words, list[i]);
  } else if (x.itemsize == 2) {
    load_in_order<2>(slab, strips, lane, words);
  } else if (x.itemsize == 4) {
    load_in_order<4>(slab, strips, lane, words);
  } else if constexpr (sizeof(Key) == 8) {
    load_in_order<8>(slab, strips, lane, words);
  }
  if (p.state->single == 0) {
#pragma unroll 4
    for (uint32_t i = uint32_t(lane); i < num_band; i += kWarpSize) {
      const Key key = p.band_keys[index_t(found.band_offset) + i];
      const uint32_t position = p.band_positions[index_t(found.band_offset) + i];
      if (key > threshold) {
        set_bit(words, position);
      } else if (key == threshold && ties != 0) {
        set_bit(tie_words, position);
      }
    }
  } else if (ties != 0) {  // the band was not kept: its elements are those with this one key
    const NativeBracket<Key>& bracket = p.state->native[x.dtype];
#pragma unroll 1
    for (int i = tile.begin + lane; i < tile.end; i += kWarpSize) {
      const Key key = load_native<Key>(x, tile.first + i);
      if (key >= bracket.first_band && key < bracket.first_sure) set_bit(tie_words, uint32_t(i));
    }
  }
  __syncwarp();
  uint32_t* const mine = words + lane * kLaneWords;
  if (some_ties) {
    keep_first_bits(tie_words, ties, lane);
#pragma unroll 1
    for (int i = 0; i < kTileStrips; ++i) mine[i] |= tie_words[lane * kLaneWords + i];
    __syncwarp();  // the stage lies where the ties did
  }

  uint32_t count = 0;
#pragma unroll
  for (int i = 0; i < kTileStrips; ++i) count += uint32_t(__popc(mine[i]));
  uint32_t rank = warp_exclusive_sum(count, lane);
  const uint32_t last = rank + count < num ? rank + count : num;
  index_t* to = p.indices + large.offset;
  const int skew = int(reinterpret_cast<uintptr_t>(to) / sizeof(index_t) % 2);
  constexpr uint32_t kPart = kStageNumel - 2;  // even, with room for the skew
  uint32_t word = 0;
  int next = 0;
#pragma unroll 1
  for (uint32_t first = 0; first < num; first += kPart) {
    const uint32_t end = first + kPart < num ? first + kPart : num;
#pragma unroll 1
    for (; rank < last && rank < end; ++rank) {
      while (word == 0) word = mine[next++];
      scratch.stage[uint32_t(skew) + rank - first] =
          uint16_t((lane * kTileStrips + next - 1) * 32 + __ffs(int(word)) - 1);
      word &= word - 1;
    }
    __syncwarp();
    store_positions(scratch.stage, skew, int(end - first), tile.first, to + first, lane);
    __syncwarp();
  }
}

// What blocks tell each other of a chunk, and add up for a group: how many chunks it has (1 until kGroupChunks), and their
// elements above and equal to the threshold.
__device__ __forceinline__ uint64_t sums_of(uint32_t greater, uint32_t equal) {
  return uint64_t(1) << (2 * kSumBits) | uint64_t(greater) << kSumBits | equal;
}

// The elements above and equal to the threshold in the chunks below this one, when all of those are counted. One warp.
template <class Key>
__device__ __forceinline__ void sum_below(const Problem<Key>& p, index_t chunk, int lane, uint64_t* greater,
                                          uint64_t* equal) {
  constexpr uint64_t kMask = (uint64_t(1) << kSumBits) - 1;
  const index_t num_groups = chunk / kGroupChunks, num_words = num_groups + chunk % kGroupChunks;
  bool are_ready;
  do {
    *greater = *equal = 0;
    are_ready = true;
#pragma unroll 4
    for (index_t i = lane; i < num_words; i += kWarpSize) {
      const bool is_group = i < num_groups;
      const uint64_t sums = load_relaxed(
          is_group ? p.group_sums + i : p.chunk_sums + num_groups * kGroupChunks + (i - num_groups));
      *greater += sums >> kSumBits & kMask;
      *equal += sums & kMask;
      are_ready &= sums >> (2 * kSumBits) == uint64_t(is_group ? kGroupChunks : 1);
    }
    if (!are_ready) __nanosleep(20);
  } while (!are_ready);
  __syncwarp();
  *greater = warp_sum(*greater);
  *equal = warp_sum(*equal);
}

// Elements of a tile above (upper half) and equal to the threshold, by kTileLanes lanes.
template <class Key>
__device__ __forceinline__ uint32_t count_tile(const Problem<Key>& p, const Survivors& found, int part) {
  const uint32_t num_sure = found.counts >> 16, num_band = found.counts & 0xffffu;
  uint32_t counts = 0;
  if (p.state->single != 0) {
    if (part == 0) counts = num_band;
  } else {
    const Key threshold = p.state->threshold;
#pragma unroll 4
    for (uint32_t i = uint32_t(part); i < num_band; i += kTileLanes) {
      const Key key = p.band_keys[index_t(found.band_offset) + i];
      counts += key > threshold ? 1u << 16 : uint32_t(key == threshold);
    }
  }
#pragma unroll
  for (int offset = kTileLanes / 2; offset > 0; offset /= 2) {
    counts += __shfl_xor_sync(kFullMask, counts, offset);
  }
  return counts + (num_sure << 16);
}

// The positions of a tile's elements above the threshold, then of those equal to it; of more than kSmallTile, some. By
// kTileLanes lanes. `list`: of the sure ones; `num_band`: 0 where none of the band counts.
template <class Key>
__device__ __forceinline__ void stage_small_tile(const Problem<Key>& p, const uint16_t* list,
                                                 uint32_t num_sure, uint32_t greater, uint32_t band_offset,
                                                 uint32_t num_band, int lane, uint16_t* positions) {
  const Key threshold = p.state->threshold;
  const int part = lane % kTileLanes, first_lane = lane - part;
#pragma unroll
  for (uint32_t i = uint32_t(part); i < kSmallTile; i += kTileLanes) {
    if (i < num_sure) positions[i] = list[i];
  }
  uint32_t at_greater = num_sure, at_equal = greater;
  for (uint32_t i = uint32_t(part); __any_sync(kFullMask, i - uint32_t(part) < num_band); i += kTileLanes) {
    bool is_greater = false, is_equal = false;
    uint16_t position = 0;
    if (i < num_band) {
      const Key key = p.band_keys[index_t(band_offset) + i];
      position = p.band_positions[index_t(band_offset) + i];
      is_greater = key > threshold;
      is_equal = key == threshold;
    }
    constexpr uint32_t kMask = (1u << kTileLanes) - 1;
    const uint32_t greater_lanes = __ballot_sync(kFullMask, is_greater) >> first_lane & kMask;
    const uint32_t equal_lanes = __ballot_sync(kFullMask, is_equal) >> first_lane & kMask;
    const uint32_t below = (1u << part) - 1;
    const uint32_t at = is_greater ? at_greater + uint32_t(__popc(greater_lanes & below))
                                   : at_equal + uint32_t(__popc(equal_lanes & below));
    if ((is_greater || is_equal) && at < uint32_t(kSmallTile)) positions[at] = position;
    at_greater += uint32_t(__popc(greater_lanes));
    at_equal += uint32_t(__popc(equal_lanes));
  }
}

// topk_magnitude / emit: each tile's selected elements and ties, where its positions go, and each tensor's; the sorted
// positions of tiles that have few; the result's head.
// Traffic    reads 12 B per tile and what the filter wrote of small tiles; writes 8 B per selected element. For N = 1e9,
//            both kernels, in whole sectors of 32 B: 10 MB at k/N = 1e-4, 21 at 1e-3, 117 at 1e-2, 954 at 1e-1; at the
//            rate of a copy on an H200 (4.3 TB/s) 2, 5, 27 and 222 us; of tiles that emit_large writes, the band's keys
//            twice. Below 1e-3 four round trips in a row per chunk are what it takes: the claim, the tiles, their keys,
//            then positions, and beside those the sums of the chunks below.
// Algorithm  a scan in one pass: blocks claim chunks in order, tell the sums of theirs, and wait for those of the chunks
//            below (decoupled look-back: Merrill & Garland 2016; flat here: 64 words at most, and one per group). Eight
//            lanes per tile, ranks by comparison: no bits. Tiles of more elements, and those of whose ties some are left
//            out or have to be looked for, are listed for emit_large: in any order.
// Contract   ties go to the lowest positions: of all elements equal to the threshold, the first ones. Nothing is written
//            past the k-th index whatever the data did meanwhile; that the last tile ends there is the status. Every
//            chunk that is claimed is told: no block waits for ever.
// Launch     resident blocks; a chunk of kChunkTiles at a time, four tiles per warp.
template <class Key>
__global__ void __launch_bounds__(kThreads, kEmitBlocksPerSm) emit_kernel(Problem<Key> p) {
  wait_for_previous_kernels();
  __shared__ uint32_t counts_of[kChunkTiles];
  __shared__ uint16_t stages[kChunkTiles][kSmallTile];
  State<Key>& state = *p.state;
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    p.result[kResultThreshold] = index_t(state.threshold);
    p.result[kResultNonfinite] = index_t(state.num_nonfinite[0]);
    p.result[kResultReads] = state.reads;
    if (state.status != 0) p.result[kResultStatus] = state.status;
  }
  if (state.status != 0) return;
  // kTileLanes lanes: one of the chunk's tiles
  const int part = lane % kTileLanes, in_chunk = int(threadIdx.x) / kTileLanes;
  uint16_t* const positions = stages[in_chunk];
  const index_t num_chunks = ceil_div(p.num_tiles, kChunkTiles);
  for (;;) {
    const index_t chunk = claim_item(&state.next_chunk);
    if (chunk >= num_chunks) return;
    const index_t t = chunk * kChunkTiles + in_chunk;
    const bool exists = t < p.num_tiles;
    const Survivors found = exists ? p.survivors[t] : Survivors{};
    const uint32_t tensor = exists ? p.tile_tensor[t] : 0;
    const uint32_t counts = count_tile(p, found, part), greater = counts >> 16, equal = counts & 0xffffu;
    if (part == 0) counts_of[in_chunk] = counts;
    __syncthreads();
    const uint32_t counts_of_lane = counts_of[lane];  // tile `lane` of the chunk
    if (warp == 0) {
      const uint32_t chunk_greater = __reduce_add_sync(kFullMask, counts_of_lane >> 16);
      const uint32_t chunk_equal = __reduce_add_sync(kFullMask, counts_of_lane & 0xffffu);
      if (lane == 0) {
        atomic_add(&p.chunk_sums[chunk], sums_of(chunk_greater, chunk_equal));
        atomic_add(&p.group_sums[chunk / kGroupChunks], sums_of(chunk_greater, chunk_equal));
      }
    }

    // while the others tell theirs
    const DeviceTensor& x = p.tensors[tensor];
    const bool may_be_small = counts != 0 && greater <= uint32_t(kSmallTile);
    if (__any_sync(kFullMask, may_be_small)) {
      const uint32_t num_sure = may_be_small ? found.counts >> 16 : 0;
      const bool has_band = may_be_small && state.single == 0 && counts != num_sure << 16;
      stage_small_tile(p, reinterpret_cast<const uint16_t*>(p.slab + slab_offset(x, t)), num_sure, greater,
                       found.band_offset, has_band ? found.counts & 0xffffu : 0, lane, positions);
    }

    uint64_t greater_below, equal_below;
    sum_below(p, chunk, lane, &greater_below, &equal_below);
    greater_below += __shfl_sync(kFullMask, warp_exclusive_sum(counts_of_lane >> 16, lane), in_chunk);
    equal_below += __shfl_sync(kFullMask, warp_exclusive_sum(counts_of_lane & 0xffffu, lane), in_chunk);
    const uint64_t num_ties = state.select_rank;  // to select among the elements equal to the threshold
    const uint64_t ties_below = equal_below < num_ties ? equal_below : num_ties;
    const uint32_t ties = num_ties - ties_below < equal ? uint32_t(num_ties - ties_below) : equal;
    const index_t offset = index_t(greater_below + ties_below), end = offset + greater + ties;
    if (part == 0 && exists) {
      if (x.first_tile == t) p.result[kResultOffsets + tensor] = offset;
      if (t == p.num_tiles - 1) p.result[kResultStatus] = end != p.k;
    }
    const uint32_t num = end <= p.k ? greater + ties : 0;
    const bool is_large =
        num > uint32_t(kSmallTile) || (num != 0 && ties != 0 && (ties != equal || state.single != 0));
    const uint32_t large = __ballot_sync(kFullMask, is_large && part == 0);
    if (large != 0) {
      uint32_t place = 0;
      if (lane == 0) place = atomicAdd(&state.num_large, uint32_t(__popc(large)));
      place = __shfl_sync(kFullMask, place, 0);
      if (is_large && part == 0) {
        p.large_tiles[place + uint32_t(__popc(large & ((1u << lane) - 1)))] = {offset, uint32_t(t), counts,
                                                                               ties};
      }
    }
    const index_t first = (t - x.first_tile) * kTileNumel - x.shift;
    __syncwarp();
    for (uint32_t i = uint32_t(part); i < (is_large ? 0 : num); i += kTileLanes) {
      const uint32_t position = positions[i];
      uint32_t rank = 0;
#pragma unroll 4
      for (uint32_t j = 0; j < num; ++j) rank += positions[j] < position;
      p.indices[offset + rank] = first + position;
    }
  }
}

// topk_magnitude / emit_large: the sorted positions of the tiles that emit listed.
// Traffic    reads what the filter wrote; writes 8 B per selected element. One more read of a tile where the
//            bracket was one key and the tile has ties to select.
// Algorithm  bits in shared memory in the order of positions, a scan of their counts, positions, 16-byte stores.
// Launch     resident blocks; one warp per tile, grid-stride.
template <class Key>
__global__ void __launch_bounds__(kThreads, kLargeBlocksPerSm) emit_large_kernel(Problem<Key> p) {
  wait_for_previous_kernels();
  __shared__ EmitScratch scratches[kWarps];
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
  const uint32_t num_large = p.state->num_large;
  for (uint32_t i = blockIdx.x * kWarps + uint32_t(warp); i < num_large; i += gridDim.x * kWarps) {
    emit_large_tile(p, p.large_tiles[i], lane, scratches[warp]);
  }
}

}  // namespace cuda_topk_magnitude
}  // namespace saft
