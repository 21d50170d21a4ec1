// topk_magnitude / cuda: tuning constants, what the kernels share, and the histograms of radix selection.
//
// Units      tile: kTileNumel consecutive elements of ONE tensor, a warp's work. strip: 1,024 of them, a
//            32-bit word of bits per lane. Tiles start at 16-byte boundaries, so a tensor's first tile may be
//            shorter.
#pragma once

#include "cuda/primitives.h"
#include "topk_magnitude/topk_magnitude.h"

namespace saft {
namespace cuda_topk_magnitude {

// ---- tuning: reasoned from bytes, not tuned on hardware ----

#if !defined(SAFT_CUDA_TILE_NUMEL)  // the tests make these small, to have many tiles of little data
#define SAFT_CUDA_TILE_NUMEL 8192
#define SAFT_CUDA_SAMPLED_RUNS_LOG2 17
#define SAFT_CUDA_MIN_BAND_CAPACITY 65536
#define SAFT_CUDA_GROUP_CHUNKS 64
#endif
constexpr int kTileNumel = SAFT_CUDA_TILE_NUMEL;
constexpr int kThreads = 256;
// Loads in flight per multiprocessor: 128 KB with 64 registers per thread, 48 KB with 80 for 8-byte keys.
template <class Key>
constexpr int kFilterBlocksPerSm = sizeof(Key) == 4 ? 4 : 3;
constexpr int kSelectBlocksPerSm = 3;
template <class Key>
constexpr int kSampleBlocksPerSm = sizeof(Key) == 4 ? 4 : 3;  // it waits for memory more than it computes
constexpr int kVectorsInFlight = 8;                           // 16-byte loads per thread
constexpr int kRunNumel = 8;                                  // elements sampled together: 32 bytes of fp32
constexpr int kItemKeys = 8;  // keys per thread that sample and select have in flight, and claim at a time
constexpr int kSampledRunsLog2 = SAFT_CUDA_SAMPLED_RUNS_LOG2;
constexpr int kLargeSampledRunsLog2 = kSampledRunsLog2 + 2;  // above kLargeNumel
constexpr index_t kLargeNumel = 2000000000;
// Half-width of the bracket in binomial standard deviations. Gradients are correlated along both dimensions of a matrix:
// structured gradients gave rank errors up to 2.4 sigma with such a sample.
constexpr double kSigmas = 6.0;
constexpr int kChunkTiles = 32;                       // emitted together
constexpr int kGroupChunks = SAFT_CUDA_GROUP_CHUNKS;  // summed together

// ---- sizes that follow ----

constexpr int kWarps = kThreads / kWarpSize;
static_assert(kItemKeys == kRunNumel, "a run per thread, when it is sampled");
constexpr int kStripNumel = kWarpSize * 32;
constexpr int kTileWords = kTileNumel / 32;
constexpr int kStripSlabBytes = kStripNumel / 8;
constexpr int kStripListCapacity =
    kStripSlabBytes / 2;  // 16-bit positions that fit the place of a strip's bits
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kSamplePasses = 3;
constexpr int kDtypes = 4;
static_assert(kTileNumel % (2 * kStripNumel) == 0 && kTileNumel <= 16 * kStripNumel,
              "strips of a tile are bits of 16");
constexpr int kTileLanes = kThreads / kChunkTiles;  // of a tile in emit
static_assert(kChunkTiles == kWarpSize && kWarpSize % kTileLanes == 0, "emit: a lane per tile of a chunk");
constexpr int kSumBits =
    25;  // of the sums over a group, two of which share a word with the number of its chunks
static_assert(kGroupChunks * kChunkTiles * index_t(kTileNumel) < index_t(1) << kSumBits, "");

template <class Key>
constexpr int kSelectPasses = (CommonKey<Key>::kBits + kDigitBits - 1) / kDigitBits;
// Digits of the sample's keys, from the top: exact for 31-bit keys, 33 of 63 bits for fp64.
template <class Key>
__host__ __device__ constexpr int sample_shift(int pass) {
  return sizeof(Key) == 4 ? (pass == 0 ? 20 : pass == 1 ? 10 : 0) : 52 - 11 * pass;
}
template <class Key>
constexpr Key kAbsent = Key(~Key(0));  // a sample slot past the end of a tensor
template <class Key>
constexpr Key kNoKey = Key(CommonKey<Key>::kNaN + Key(1));  // above every key

// ---- device tables ----

struct DeviceTensor {
  const void* data;
  const index_t* layout;
  index_t numel;
  index_t ndim;
  index_t first_tile;
  index_t first_run;
  index_t slab_offset;  // bytes
  int32_t dtype;
  int32_t itemsize;
  index_t shift;  // elements between the 16-byte boundary below `data` and `data`
};

// The bracket in a dtype's own keys. band: first_band <= key < first_sure.
template <class Key>
struct NativeBracket {
  Key first_band, first_sure, inf;
};

// What the filter found in a tile.
struct Survivors {
  uint32_t counts;       // sure << 16 | band
  uint32_t band_offset;  // into band_keys
};

// A tile that emit leaves to emit_large.
struct LargeTile {
  index_t offset;  // into indices
  uint32_t tile;
  uint32_t counts;  // above the threshold << 16 | equal to it
  uint32_t ties;    // to select of it
};

// Of the bracket's ends, in the sample: descending rank among the keys with this prefix (0: outside the sample), and
// the digits fixed so far.
template <class Key>
struct SampleEnds {
  uint32_t rank[2];
  Key prefix[2];
};

template <class Key>
struct KeyRange {
  Key lo, hi;
};

// Zeroed when the table is uploaded, as are the sample's histograms.
template <class Key>
struct State {
  // sample: [pass], before it
  SampleEnds<Key> ends[kSamplePasses + 1];
  uint32_t is_bracketed[kSamplePasses + 1];  // no further pass
  uint32_t above_sample;                     // hi ranks above all of the sample
  uint32_t few;                              // so few sampled keys more in the bracket do not matter
  Pass sample_passes[kSamplePasses];
  // filter
  Key lo, hi;
  NativeBracket<Key> native[kDtypes];
  uint32_t single;                                      // the bracket is one key: the band needs no keys
  uint32_t refilter;                                    // the second filter has to run
  uint64_t num_sure[2], num_band[2], num_nonfinite[2];  // by filter
  uint64_t band_used;
  uint32_t filter_tickets[2];
  // select: [pass], before it
  KeyRange<Key> ranges[kSelectPasses<Key> + 1];
  Pass select_passes[kSelectPasses<Key>];
  uint32_t from_data;
  uint64_t select_rank;  // in the end, of the k-th element among those equal to it
  Key threshold;
  // emit
  uint32_t next_chunk, num_large;
  // result
  uint32_t status, reads;
};

template <class Key>
struct Problem {
  const DeviceTensor* tensors;
  index_t num_tensors, num_tiles, num_runs, num_sampled_runs, numel, k;
  double share;  // k / numel
  int sampled_runs_log2;
  int zero_bits;  // see possible_lo
  index_t band_capacity;
  State<Key>* state;
  uint32_t* sample_histograms;  // [kSamplePasses][2][kBins]
  uint64_t* select_histograms;  // [1 + kSelectPasses][kBins], the first one by the filter; zeroed by sample
  uint32_t* tile_tensor;
  Survivors* survivors;
  uint64_t* chunk_sums;  // see sums_of in cuda_emit.h; zeroed by sample
  uint64_t* group_sums;  // over kGroupChunks chunks; zeroed by sample
  LargeTile* large_tiles;
  Key* sample;
  Key* band_keys;
  uint16_t* band_positions;
  char* slab;
  index_t* indices;
  index_t* result;
};

struct Tile {
  index_t first;   // flat index of position 0, negative where the tile starts before the tensor
  int begin, end;  // positions that exist
};

__device__ __forceinline__ Tile make_tile(const DeviceTensor& x, index_t t) {
  const index_t in_tensor = t - x.first_tile;
  Tile tile;
  tile.first = in_tensor * kTileNumel - x.shift;
  tile.begin = tile.first < 0 ? int(-tile.first) : 0;
  tile.end = x.numel - tile.first < kTileNumel ? int(x.numel - tile.first) : kTileNumel;
  return tile;
}

__device__ __forceinline__ index_t slab_offset(const DeviceTensor& x, index_t t) {
  return x.slab_offset + (t - x.first_tile) * (kTileNumel / 8);
}

__device__ __forceinline__ int num_strips(const Tile& tile) {
  return (tile.end + kStripNumel - 1) / kStripNumel;
}

template <class Key>
__device__ __forceinline__ Key load_native(const DeviceTensor& x, index_t flat) {
  const index_t at = storage_offset(flat, x.ndim, x.layout);
  if (x.itemsize == 2) return Key(static_cast<const uint16_t*>(x.data)[at] & 0x7fffu);
  if constexpr (sizeof(Key) == 8) {
    if (x.itemsize == 8) return Key(static_cast<const uint64_t*>(x.data)[at] & KeyTraits<double>::kMask);
  }
  return Key(static_cast<const uint32_t*>(x.data)[at] & 0x7fffffffu);
}

template <class Key>
__device__ __forceinline__ Key widen(int32_t dtype, Key native) {
  if constexpr (sizeof(Key) == 8) {
    if (dtype == int32_t(ScalarType::kFloat64)) return widen_key<Key, double>(native);
  }
  if (dtype == int32_t(ScalarType::kFloat32)) return widen_key<Key, float>(uint32_t(native));
  if (dtype == int32_t(ScalarType::kBFloat16)) return widen_key<Key, bfloat16>(uint16_t(native));
  return widen_key<Key, float16>(uint16_t(native));
}

template <class Key, class scalar_t>
__device__ __forceinline__ void set_native(Key lo, Key hi, int end, NativeBracket<Key>* native) {
  if (end == 0) native->first_band = first_native_key<Key, scalar_t>(lo);
  if (end == 1) native->first_sure = first_native_key<Key, scalar_t>(Key(hi + 1));
  if (end == 2) native->inf = KeyTraits<scalar_t>::kInf;
}

// The whole block, which all has `lo` and `hi`: a search each for some threads, in a warp per dtype.
template <class Key>
__device__ void set_bracket(State<Key>& state, Key lo, Key hi) {
  if (threadIdx.x == 0) {
    state.lo = lo;
    state.hi = hi;
    state.single = lo == hi;
  }
  const int dtype = int(threadIdx.x) / kWarpSize, end = int(threadIdx.x) % kWarpSize;
  NativeBracket<Key>* const native = state.native + dtype;
  if (dtype == int(ScalarType::kFloat32)) set_native<Key, float>(lo, hi, end, native);
  if (dtype == int(ScalarType::kBFloat16)) set_native<Key, bfloat16>(lo, hi, end, native);
  if (dtype == int(ScalarType::kFloat16)) set_native<Key, float16>(lo, hi, end, native);
  if constexpr (sizeof(Key) == 8) {
    if (dtype == int(ScalarType::kFloat64)) set_native<Key, double>(lo, hi, end, native);
  }
}

__device__ __forceinline__ void atomic_add(uint64_t* address, uint64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(address), static_cast<unsigned long long>(value));
}

// ---- histograms ----

template <int kCount>
__device__ __forceinline__ void clear_shared(uint32_t* shared) {
  for (int i = int(threadIdx.x); i < kCount; i += kThreads) shared[i] = 0;
  __syncthreads();
}

template <class Count>
__device__ __forceinline__ void add_histogram(const uint32_t* shared, Count* global) {
  for (int bin = int(threadIdx.x); bin < kBins; bin += kThreads) {
    if (shared[bin] == 0) continue;
    if constexpr (sizeof(Count) == 8) {
      atomic_add(global + bin, shared[bin]);
    } else {
      atomicAdd(global + bin, shared[bin]);
    }
  }
}

// The keys of an item, by the whole block; kAbsent past the end. `keys` may have been written in this kernel.
template <class Key, class Visit>
__device__ __forceinline__ void visit_keys(const Key* keys, index_t num_keys, uint32_t item,
                                           const Visit& visit) {
  const index_t first = index_t(item) * (kItemKeys * kThreads) + threadIdx.x;
  Key loaded[kItemKeys];
#pragma unroll
  for (int i = 0; i < kItemKeys; ++i) {
    loaded[i] = first + i * kThreads < num_keys ? __ldcg(keys + first + i * kThreads) : kAbsent<Key>;
  }
#pragma unroll
  for (int i = 0; i < kItemKeys; ++i) visit(loaded[i]);
}

template <class Count>
struct PickScratch {
  Count warp_sums[kWarps], rank, count;
  uint32_t digit;
};

// A histogram in the registers of a block: a thread has kPerThread bins, the first thread the last ones.
template <class Count>
struct BlockHistogram {
  static constexpr int kPerThread = kBins / kThreads;
  Count counts[kPerThread], above, sum, total;

  __device__ __forceinline__ static int top() { return kBins - 1 - int(threadIdx.x) * kPerThread; }
  __device__ __forceinline__ void load(const Count* histogram) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) counts[i] = __ldcg(histogram + top() - i);
  }
  __device__ __forceinline__ void add_up(PickScratch<Count>& scratch) {
    sum = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) sum += counts[i];
    above = block_exclusive_sum<kThreads>(sum, scratch.warp_sums, &total);
  }
  // The bin that holds descending rank `rank` (1 = largest), the rank inside that bin, and its count: into the scratch.
  // Returns false when no bin does. Ends with a barrier; so must what reads the scratch.
  __device__ bool pick(Count rank, PickScratch<Count>& scratch) const {
    if (threadIdx.x == 0) {
      scratch.digit = 0;
      scratch.rank = scratch.count = 0;
    }
    __syncthreads();
    if (above < rank && rank <= above + sum) {
      Count before = above;
      bool found = false;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        if (!found && rank <= before + counts[i]) {
          found = true;
          scratch.digit = uint32_t(top() - i);
          scratch.rank = rank - before;
          scratch.count = counts[i];
        }
        before += counts[i];
      }
    }
    __syncthreads();
    return rank >= 1 && rank <= total;
  }
};

// Ends of a range without keys that no element has: all but NaN's are multiples of 2 ** zero_bits.
template <class Key>
__device__ __forceinline__ Key possible_lo(Key lo, int zero_bits) {
  const Key low_bits = Key((Key(1) << zero_bits) - 1);
  lo = Key((lo + low_bits) & ~low_bits);
  return zero_bits != 0 && lo > CommonKey<Key>::kInf ? CommonKey<Key>::kNaN : lo;
}
template <class Key>
__device__ __forceinline__ Key possible_hi(Key hi, int zero_bits) {
  return hi == CommonKey<Key>::kNaN ? hi : Key(hi & ~Key((Key(1) << zero_bits) - 1));
}

// Where the highest digit of key - lo starts, in a range of keys.
template <class Key>
__device__ __forceinline__ int digit_shift(const KeyRange<Key>& range) {
  const Key width = Key(range.hi - range.lo);
  const int bits = sizeof(Key) == 4 ? 32 - __clz(int(uint32_t(width))) : 64 - __clzll((long long)(width));
  return bits > kDigitBits ? bits - kDigitBits : 0;
}

template <class Key>
__device__ __forceinline__ void count_digit(const KeyRange<Key>& range, int shift, Key key,
                                            uint32_t* histogram) {
  if (key >= range.lo && key <= range.hi) atomicAdd(&histogram[(key - range.lo) >> shift], 1u);
}

// From a histogram of the highest digit of key - lo: the range of the keys that have the digit of the one at
// `select_rank`, and that one's rank among them. The whole block.
template <class Key>
__device__ void narrow(const Problem<Key>& p, const KeyRange<Key>& range, const uint64_t* histogram,
                       PickScratch<uint64_t>& scratch, KeyRange<Key>* narrowed) {
  State<Key>& state = *p.state;
  BlockHistogram<uint64_t> bins;
  bins.load(histogram);
  bins.add_up(scratch);
  const bool found = bins.pick(state.select_rank, scratch);
  const int shift = digit_shift(range);
  const Key first = Key(range.lo + (Key(scratch.digit) << shift)),
            last = Key(first + ((Key(1) << shift) - 1));
  const Key lo = possible_lo(first, p.zero_bits);
  const Key hi = possible_hi(last < range.hi ? last : range.hi, p.zero_bits);
  if (found && lo == hi && state.refilter != 0) set_bracket(state, lo, hi);
  if (threadIdx.x != 0) return;
  *narrowed = {lo, found ? hi : lo};  // else stop here
  state.select_rank = scratch.rank;
  state.threshold = lo;
  if (!found) state.status = 1;
}

}  // namespace cuda_topk_magnitude
}  // namespace saft
