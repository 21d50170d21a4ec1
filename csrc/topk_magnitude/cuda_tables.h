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
constexpr int kBlocksPerSm = 4;      // of sample and select, which wait for memory more than they compute
constexpr int kVectorsInFlight = 8;  // 16-byte loads per thread
constexpr int kRunNumel = 8;         // elements sampled together: 32 bytes of fp32
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

// Zeroed before the first kernel.
template <class Key>
struct State {
  // sample
  uint64_t sample_rank[2];  // of lo and hi: descending, among keys with this prefix; 0: outside the sample
  Key sample_prefix[2];     // the digits fixed so far
  uint32_t above_sample;    // hi ranks above all of the sample
  // filter
  Key lo, hi;
  NativeBracket<Key> native[kDtypes];
  uint32_t single;                                      // the bracket is one key: the band needs no keys
  uint32_t refilter;                                    // the second filter has to run
  uint64_t num_sure[2], num_band[2], num_nonfinite[2];  // by filter
  uint64_t band_used;
  // select
  uint32_t from_data;
  uint64_t select_rank;  // in the end, of the k-th element among those equal to it
  Key select_lo, select_hi;
  Key threshold;
  // emit
  uint32_t next_chunk, num_large;
  // result
  uint32_t status, reads;
  uint32_t tickets[kSamplePasses + 2 + kSelectPasses<Key>];
};

template <class Key>
struct Problem {
  const DeviceTensor* tensors;
  index_t num_tensors, num_tiles, num_runs, num_sampled_runs, numel, k;
  int sampled_runs_log2;
  index_t band_capacity;
  State<Key>* state;
  uint32_t* sample_histograms;  // [kSamplePasses][2][kBins]
  uint64_t* select_histograms;  // [kSelectPasses][kBins]
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
__device__ void set_native(Key lo, Key hi, NativeBracket<Key>* native) {
  native->first_band = first_native_key<Key, scalar_t>(lo);
  native->first_sure = first_native_key<Key, scalar_t>(Key(hi + 1));
  native->inf = KeyTraits<scalar_t>::kInf;
}

// One thread.
template <class Key>
__device__ void set_bracket(State<Key>& state, Key lo, Key hi) {
  state.lo = lo;
  state.hi = hi;
  state.single = lo == hi;
  set_native<Key, float>(lo, hi, &state.native[int(ScalarType::kFloat32)]);
  set_native<Key, bfloat16>(lo, hi, &state.native[int(ScalarType::kBFloat16)]);
  set_native<Key, float16>(lo, hi, &state.native[int(ScalarType::kFloat16)]);
  if constexpr (sizeof(Key) == 8) set_native<Key, double>(lo, hi, &state.native[int(ScalarType::kFloat64)]);
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

struct PickScratch {
  uint64_t warp_sums[kWarps];
  uint32_t digit;
  uint64_t rank;
};

// The whole block: the bin that holds descending rank `rank` (1 = largest), and the rank inside that bin.
// Returns false when no bin does.
template <class Count>
__device__ bool pick_digit(const Count* histogram, uint64_t rank, PickScratch& scratch, uint32_t* digit,
                           uint64_t* rank_in_bin) {
  constexpr int kPerThread = kBins / kThreads;
  const int top = kBins - 1 - int(threadIdx.x) * kPerThread;
  uint64_t counts[kPerThread], sum = 0, total;
  if (threadIdx.x == 0) {
    scratch.digit = 0;
    scratch.rank = 0;
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    counts[i] = __ldcg(histogram + top - i);
    sum += counts[i];
  }
  uint64_t above = block_exclusive_sum<kThreads>(sum, scratch.warp_sums, &total);
  if (above < rank && rank <= above + sum) {
    bool found = false;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (!found && rank <= above + counts[i]) {
        found = true;
        scratch.digit = uint32_t(top - i);
        scratch.rank = rank - above;
      }
      above += counts[i];
    }
  }
  __syncthreads();
  *digit = scratch.digit;
  *rank_in_bin = scratch.rank;
  __syncthreads();
  return rank >= 1 && rank <= total;
}

}  // namespace cuda_topk_magnitude
}  // namespace saft
