// topk_magnitude / cuda: the one read of the data.
#pragma once

#include "topk_magnitude/cuda_tables.h"

namespace saft {
namespace cuda_topk_magnitude {

// ---- filter ----

// Where in its strip the element of `bit` of `lane`'s word stands. A lane's elements, in the order of its
// loads, fill the word from the top (4 and 8 bytes), or two by two from the bottom of both halves (2 bytes).
__device__ __forceinline__ int position_in_strip(int bit, int lane, int itemsize) {
  const int i = itemsize == 2 ? (bit & 15) << 1 | bit >> 4 : 31 - bit;
  const int log2_per_vector = itemsize == 2 ? 3 : itemsize == 4 ? 2 : 1;
  const int vector = i >> log2_per_vector;
  return (vector * kWarpSize + lane) << log2_per_vector | (i & ((1 << log2_per_vector) - 1));
}

// Compares the elements of one 16-byte vector without branches and shifts one bit each into the words. A key
// is at or above a limit exactly when key + (top bit - limit) has the top bit set; nothing carries out of it.
template <int kItemsize>
struct Compare;

template <>
struct Compare<2> {  // two keys per 32-bit word
  uint32_t band_bias, sure_bias, inf_bias, seen = 0;
  template <class Key>
  __device__ __forceinline__ explicit Compare(const NativeBracket<Key>& b)
      : band_bias((0x8000u - uint32_t(b.first_band)) * 0x10001u),
        sure_bias((0x8000u - uint32_t(b.first_sure)) * 0x10001u),
        inf_bias((0x8000u - uint32_t(b.inf)) * 0x10001u) {}
  __device__ __forceinline__ void word(uint32_t x, uint32_t& survivor, uint32_t& sure) {
    const uint32_t keys = x & 0x7fff7fffu;
    survivor = survivor >> 1 | ((keys + band_bias) & 0x80008000u);
    sure = sure >> 1 | ((keys + sure_bias) & 0x80008000u);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm("max.u16x2 %0, %0, %1;" : "+r"(seen) : "r"(keys));  // one instruction instead of two
#else
    seen |= keys + inf_bias;
#endif
  }
  __device__ __forceinline__ void operator()(const uint4& v, uint32_t& survivor, uint32_t& sure) {
    word(v.x, survivor, sure);
    word(v.y, survivor, sure);
    word(v.z, survivor, sure);
    word(v.w, survivor, sure);
  }
  __device__ __forceinline__ bool nonfinite() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    return ((seen + inf_bias) & 0x80008000u) != 0;
#else
    return (seen & 0x80008000u) != 0;
#endif
  }
};

template <>
struct Compare<4> {
  uint32_t band_bias, sure_bias, largest = 0;
  template <class Key>
  __device__ __forceinline__ explicit Compare(const NativeBracket<Key>& b)
      : band_bias(0x80000000u - uint32_t(b.first_band)), sure_bias(0x80000000u - uint32_t(b.first_sure)) {}
  __device__ __forceinline__ void word(uint32_t x, uint32_t& survivor, uint32_t& sure) {
    const uint32_t key = x & 0x7fffffffu;
    survivor = __funnelshift_l(key + band_bias, survivor, 1);
    sure = __funnelshift_l(key + sure_bias, sure, 1);
    largest = largest > key ? largest : key;
  }
  __device__ __forceinline__ void operator()(const uint4& v, uint32_t& survivor, uint32_t& sure) {
    word(v.x, survivor, sure);
    word(v.y, survivor, sure);
    word(v.z, survivor, sure);
    word(v.w, survivor, sure);
  }
  __device__ __forceinline__ bool nonfinite() const { return largest >= KeyTraits<float>::kInf; }
};

template <>
struct Compare<8> {
  uint64_t band_bias, sure_bias;
  uint32_t largest = 0;  // upper halves: enough to tell inf and NaN
  template <class Key>
  __device__ __forceinline__ explicit Compare(const NativeBracket<Key>& b)
      : band_bias((uint64_t(1) << 63) - b.first_band), sure_bias((uint64_t(1) << 63) - b.first_sure) {}
  __device__ __forceinline__ void word(uint32_t low, uint32_t high, uint32_t& survivor, uint32_t& sure) {
    high &= 0x7fffffffu;
    const uint64_t key = uint64_t(high) << 32 | low;
    survivor = __funnelshift_l(uint32_t((key + band_bias) >> 32), survivor, 1);
    sure = __funnelshift_l(uint32_t((key + sure_bias) >> 32), sure, 1);
    largest = largest > high ? largest : high;
  }
  __device__ __forceinline__ void operator()(const uint4& v, uint32_t& survivor, uint32_t& sure) {
    word(v.x, v.y, survivor, sure);
    word(v.z, v.w, survivor, sure);
  }
  __device__ __forceinline__ bool nonfinite() const {
    return largest >= uint32_t(KeyTraits<double>::kInf >> 32);
  }
};

// What a lane knows of its part of a tile.
struct LaneCounts {
  uint32_t packed = 0;  // sure << 16 | band
  uint32_t strips = 0;  // bit r: the sure word of strip r is not zero; bit 16 + r: the band word
  bool nonfinite = false;

  __device__ __forceinline__ void add(int strip, uint32_t sure, uint32_t band) {
    packed += uint32_t(__popc(sure)) << 16 | uint32_t(__popc(band));
    strips |= (uint32_t(sure != 0) | uint32_t(band != 0) << 16) << strip;
  }
};

// Strips [first, last) in whole, aligned 16-byte vectors; `last - first` is even for 2-byte elements.
template <int kItemsize, class Key>
__device__ __forceinline__ void compare_strips(const char* data, int first, int last,
                                               const NativeBracket<Key>& bracket, int lane,
                                               uint32_t* sure_words, uint32_t* band_words,
                                               LaneCounts& counts) {
  constexpr int kVectorsPerStrip = 2 * kItemsize;
  constexpr int kStrips = kVectorsPerStrip < kVectorsInFlight ? kVectorsInFlight / kVectorsPerStrip : 1;
  constexpr int kVectors = kStrips * kVectorsPerStrip;
  constexpr int kInFlight = kItemsize == 8 ? kVectorsInFlight / 2 : kVectorsInFlight;
  Compare<kItemsize> compare(bracket);
  for (int strip = first; strip < last; strip += kStrips) {
    const uint4* vectors =
        reinterpret_cast<const uint4*>(data + index_t(strip) * kStripNumel * kItemsize) + lane;
    uint32_t survivor[kStrips] = {}, sure[kStrips] = {};
#pragma unroll
    for (int done = 0; done < kVectors; done += kInFlight) {
      uint4 loaded[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) loaded[i] = load_once(vectors + (done + i) * kWarpSize);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int r = (done + i) / kVectorsPerStrip;
        compare(loaded[i], survivor[r], sure[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kStrips; ++r) {
      const uint32_t band = survivor[r] & ~sure[r];
      sure_words[(strip + r) * kWarpSize + lane] = sure[r];
      band_words[(strip + r) * kWarpSize + lane] = band;
      counts.add(strip + r, sure[r], band);
    }
  }
  counts.nonfinite |= compare.nonfinite();
}

// One strip, element by element: the ends of a tensor, and strided ones.
template <class Key>
__device__ __forceinline__ void compare_edge_strip(const DeviceTensor& x, const Tile& tile, int strip,
                                                   const NativeBracket<Key>& bracket, int lane,
                                                   uint32_t* sure_words, uint32_t* band_words,
                                                   LaneCounts& counts) {
  uint32_t sure = 0, band = 0;
#pragma unroll 1
  for (int bit = 0; bit < 32; ++bit) {
    const int position = strip * kStripNumel + position_in_strip(bit, lane, x.itemsize);
    if (position < tile.begin || position >= tile.end) continue;
    const Key key = load_native<Key>(x, tile.first + position);
    const bool is_sure = key >= bracket.first_sure;
    sure |= uint32_t(is_sure) << bit;
    band |= uint32_t(key >= bracket.first_band && !is_sure) << bit;
    counts.nonfinite |= key >= bracket.inf;
  }
  sure_words[strip * kWarpSize + lane] = sure;
  band_words[strip * kWarpSize + lane] = band;
  counts.add(strip, sure, band);
}

// Calls visit(position in the tile) for the set bits of a lane's words. `strips`: which words are not zero.
template <class Visit>
__device__ __forceinline__ void visit_bits(const uint32_t* words, uint32_t strips, int lane, int itemsize,
                                           const Visit& visit) {
  uint32_t word = 0;
  int strip = 0;
  while ((strips | word) != 0) {  // one bit per lane and turn, whatever strip it is in
    if (word == 0) {
      strip = __ffs(int(strips)) - 1;
      strips &= strips - 1;
      word = words[strip * kWarpSize + lane];
    }
    const int bit = __ffs(int(word)) - 1;
    word &= word - 1;
    visit(strip * kStripNumel + position_in_strip(bit, lane, itemsize));
  }
}

// One tile's bits, by one warp.
template <class Key>
__device__ __forceinline__ LaneCounts compare_tile(const Problem<Key>& p, index_t t, int lane,
                                                   uint32_t* sure_words, uint32_t* band_words) {
  const DeviceTensor& x = p.tensors[p.tile_tensor[t]];
  const NativeBracket<Key>& bracket = p.state->native[x.dtype];
  const Tile tile = make_tile(x, t);
  const int itemsize = x.itemsize, first = tile.begin > 0 ? 1 : 0;
  int last = x.ndim == 0 ? tile.end / kStripNumel : first;
  if (last < first) last = first;
  if (itemsize == 2) last -= (last - first) & 1;
  const char* data = static_cast<const char*>(x.data) + tile.first * itemsize;
  LaneCounts counts;
  if (itemsize == 2) {
    compare_strips<2>(data, first, last, bracket, lane, sure_words, band_words, counts);
  } else if (itemsize == 4) {
    compare_strips<4>(data, first, last, bracket, lane, sure_words, band_words, counts);
  } else if constexpr (sizeof(Key) == 8) {
    compare_strips<8>(data, first, last, bracket, lane, sure_words, band_words, counts);
  }
  const int strips = num_strips(tile);
  for (int strip = 0; strip < strips; ++strip) {
    if (strip >= first && strip < last) continue;
    compare_edge_strip(x, tile, strip, bracket, lane, sure_words, band_words, counts);
  }
  return counts;
}

// Writes what the bits say. Returns sure << 16 | band. `histogram`: of the block, of the kept band's highest digit.
template <class Key>
__device__ __forceinline__ uint32_t store_tile(const Problem<Key>& p, index_t t, int again, int lane,
                                               const LaneCounts& counts, const uint32_t* sure_words,
                                               const uint32_t* band_words, uint32_t* histogram) {
  const DeviceTensor& x = p.tensors[p.tile_tensor[t]];
  const Tile tile = make_tile(x, t);
  if (__any_sync(kFullMask, counts.nonfinite)) {
    const Key inf = p.state->native[x.dtype].inf;
    uint32_t num_nonfinite = 0;
#pragma unroll 1
    for (int i = tile.begin + lane; i < tile.end; i += kWarpSize) {
      num_nonfinite += load_native<Key>(x, tile.first + i) >= inf;
    }
    num_nonfinite = __reduce_add_sync(kFullMask, num_nonfinite);
    if (lane == 0) atomic_add(&p.state->num_nonfinite[again], num_nonfinite);
  }
  const uint32_t total = __reduce_add_sync(kFullMask, counts.packed);
  if (lane == 0) p.survivors[t].counts = total;
  if (total == 0) return 0;
  const uint32_t below = warp_exclusive_sum(counts.packed, lane);

  const int strips = num_strips(tile), itemsize = x.itemsize;
  char* slab = p.slab + slab_offset(x, t);
  if (total >> 16 <= uint32_t(strips * kStripListCapacity)) {
    uint16_t* list = reinterpret_cast<uint16_t*>(slab) + (below >> 16);
    visit_bits(sure_words, counts.strips & 0xffffu, lane, itemsize,
               [&](int position) { *list++ = uint16_t(position); });
  } else {
    uint32_t* words = reinterpret_cast<uint32_t*>(slab) + lane;
    for (int strip = 0; strip < strips; ++strip)
      words[strip * kWarpSize] = sure_words[strip * kWarpSize + lane];
  }

  const uint32_t num_band = total & 0xffffu;
  if (num_band != 0 && p.state->single == 0) {
    uint64_t offset = 0;
    if (lane == 0) {
      offset = atomicAdd(reinterpret_cast<unsigned long long*>(&p.state->band_used),
                         static_cast<unsigned long long>(num_band));
    }
    offset = __shfl_sync(kFullMask, offset, 0);
    if (offset + num_band <= uint64_t(p.band_capacity)) {
      if (lane == 0) p.survivors[t].band_offset = uint32_t(offset);
      uint32_t at = uint32_t(offset) + (below & 0xffffu);
      const KeyRange<Key> bracket = {p.state->lo, p.state->hi};
      const int shift = digit_shift(bracket);
      visit_bits(band_words, counts.strips >> 16, lane, itemsize, [&](int position) {
        const Key key = widen<Key>(x.dtype, load_native<Key>(x, tile.first + position));
        p.band_positions[at] = uint16_t(position);
        p.band_keys[at] = key;
        count_digit(bracket, shift, key, histogram);
        ++at;
      });
    }
  }
  return total;
}

// Checks the guess; says what is left to do. The last block of the first filter.
template <class Key>
__device__ void verify(const Problem<Key>& p, PickScratch<uint64_t>& scratch) {
  State<Key>& state = *p.state;
  const uint64_t k = uint64_t(p.k), num_sure = __ldcg(&state.num_sure[0]),
                 num_band = __ldcg(&state.num_band[0]);
  const Key lo = state.lo, hi = state.hi;
  const bool is_hit = num_sure < k && k <= num_sure + num_band;
  const bool from_data = !is_hit || (lo != hi && num_band > uint64_t(p.band_capacity));
  KeyRange<Key> range = {lo, hi};
  if (!is_hit)
    range = num_sure >= k ? KeyRange<Key>{Key(hi + 1), CommonKey<Key>::kNaN} : KeyRange<Key>{0, Key(lo - 1)};
  __syncthreads();  // all have read the state
  if (threadIdx.x == 0) {
    state.reads = 1;
    state.select_rank = k - (is_hit ? num_sure : num_sure >= k ? 0 : num_sure + num_band);
  }
  if (k == 0) return;  // the ranges are of one key
  if (threadIdx.x == 0) {
    state.ranges[0] = range;
    state.threshold = range.lo;  // final when the range is one key
    state.from_data = state.refilter = from_data;
  }
  __syncthreads();
  if (range.lo == range.hi) {
    if (from_data) set_bracket(state, range.lo, range.hi);
  } else if (!from_data) {
    narrow(p, range, p.select_histograms, scratch, &state.ranges[0]);
  }
}

template <class Key>
struct FilterScratch {
  uint32_t sure_words[kWarps][kTileWords];
  uint32_t band_words[kWarps][kTileWords];
  uint32_t histogram[kBins];
  uint64_t sums[2];  // sure, band
};

// All tiles, by the grid. Returns whether this block is the last one to get here.
template <class Key>
__device__ __forceinline__ bool filter_tiles(const Problem<Key>& p, int again, FilterScratch<Key>& scratch) {
  State<Key>& state = *p.state;
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
  uint32_t* const sure_words = scratch.sure_words[warp];
  uint32_t* const band_words = scratch.band_words[warp];
  if (threadIdx.x < 2) scratch.sums[threadIdx.x] = 0;
  clear_shared<kBins>(scratch.histogram);
  for (index_t t = index_t(blockIdx.x) * kWarps + warp; t < p.num_tiles; t += index_t(gridDim.x) * kWarps) {
    const LaneCounts counts = compare_tile(p, t, lane, sure_words, band_words);
    __syncwarp();  // also keeps the compiler from holding the tile's description in registers during the read
    const uint32_t total = store_tile(p, t, again, lane, counts, sure_words, band_words, scratch.histogram);
    if (lane == 0 && total != 0) {
      atomic_add(&scratch.sums[0], total >> 16);
      atomic_add(&scratch.sums[1], total & 0xffffu);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    atomic_add(&state.num_sure[again], scratch.sums[0]);
    atomic_add(&state.num_band[again], scratch.sums[1]);
  }
  if (again == 0) add_histogram(scratch.histogram, p.select_histograms);
  return is_last_block(&state.filter_tickets[again]);
}

// topk_magnitude / filter: one read of every element; sure ones and the band, per tile; the first digit of select.
// Traffic    reads sizeof(scalar_t) B/elem; writes 2 B per sure element, at most 1 bit per element, and 6 B
//            (10 B with fp64) per band element, whose sector it reads once more, mostly out of L2.
// Algorithm  branch-free compares into bits; a tile's bits stay in shared memory until their counts say how
//            to write them. Integer instructions per element: 6 for fp32, 4 for 16-bit types.
// Contract   counts exact; no sure element lost at any density; band keys beyond the cache are dropped, and
//            `verify` sees that. A bracket of one key keeps no band.
// Launch     resident blocks; one warp per tile, grid-stride, no block barrier inside the loop.
template <class Key>
__global__ void __launch_bounds__(kThreads, kFilterBlocksPerSm<Key>) filter_kernel(Problem<Key> p) {
  wait_for_previous_kernels();
  __shared__ FilterScratch<Key> scratch;
  __shared__ PickScratch<uint64_t> pick_scratch;
  if (filter_tiles(p, 0, scratch)) verify(p, pick_scratch);
}

}  // namespace cuda_topk_magnitude
}  // namespace saft
