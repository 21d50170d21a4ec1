// sparse_adamw / cuda: one launch for all parameters.
//
// Algorithm  a warp takes tiles of ONE segment: 64 coordinates, or 1,024 elements of a wholly selected
//            tensor in memory order. A table says which segment holds a tile, so a huge tensor and hundreds
//            of tiny ones balance. State and indices of a lane's coordinates are requested together, then
//            parameters and gradients, before the first is used.
// Traffic    per coordinate: a 32-byte sector of the parameter (read, written) and one of the gradient
//            (read), index 4 B (8 B), moments 16 B: 116 B. A wholly selected tensor: 28 B per fp32 element,
//            22 B per 16-bit one, 30 B with a master.
// Count      CLIP ViT-L/14 at 0.1 % (k = 428 k): 50 MB, 10.3 us at 4.8 TB/s, if every sector holds one
//            coordinate; under it, four dependent loads (tile, segment, index, element), some 2.5 us, the
//            first two of which hide behind the scalars. In flight: 1,792 coordinates per SM. Wholly
//            selected: 12.0 GB, 2.5 ms; 64 instructions per element, 0.9 ms if every issue slot is taken.
// Precision  compiled with -fmad=false: every operation is rounded, as -ffp-contract=off has it in the cpu
//            backend, and the bits are the same. Memory is the bound, so fusing would gain nothing.
// Contract   every coordinate is read and written by one thread; no atomics.
// Launch     up to kWaves blocks for each that is resident, grid-stride: a late block starts when any other
//            ends, where 1.2 tiles for each resident warp would take the time of two. Each block first turns the
//            AdamWCudaHypers into AdamWScalars, in double, two lanes for each; those that are tensors are read
//            here.
#pragma once

#include <cmath>

#include "cuda/primitives.h"
#include "sparse_adamw/sparse_adamw.h"

namespace saft {
namespace cuda_sparse_adamw {

// ---- tuning: reasoned from bytes, not tuned on hardware ----

#if !defined(SAFT_CUDA_ADAMW_WORDS)  // the tests make these small, to have several launches
#define SAFT_CUDA_ADAMW_WORDS (4096 / 8 - 8)
#define SAFT_CUDA_ADAMW_MANY_WORDS (kMaxArgumentBytes / 8 - 8)
#define SAFT_CUDA_ADAMW_HYPERS (kMaxArgumentBytes > 4096 ? 64 : 16)
#endif
constexpr int kWords = SAFT_CUDA_ADAMW_WORDS;
constexpr int kManyWords = SAFT_CUDA_ADAMW_MANY_WORDS;
constexpr int kMaxHypers = SAFT_CUDA_ADAMW_HYPERS;
constexpr int kThreads = 128;
constexpr int kBlocksPerSm = 7;  // 72 registers per thread
constexpr int kWaves = 4;        // blocks for each that is resident: those that come late even out the work
constexpr int kItems = 2;        // coordinates of a lane whose loads are in flight together
constexpr int kScatteredTile = kWarpSize * kItems;
constexpr int kPackedTile = 1024;

// ---- sizes that follow ----

constexpr int kWarps = kThreads / kWarpSize;
constexpr int kHypersPerWarp = kWarpSize / 2;
constexpr int kHyperWords = sizeof(AdamWCudaHyper) / sizeof(uint64_t);
static_assert(kMaxHypers <= kWarps * kHypersPerWarp, "two lanes per hyper");
static_assert(kMaxHypers * kHyperWords < kManyWords, "room for a gradient");

// ---- device tables ----

enum class Form : int32_t {
  kScattered,  // coordinates by index, or through a layout
  kPacked,     // every element, all arrays in one order
  kVectors,    // packed, not fp64, and all arrays but perhaps the gradient are aligned
};

struct DeviceSegment {
  void* param;
  const void* indices;  // null: every element
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;
  float* master;
  const index_t* param_layout;
  const index_t* grad_layout;
  index_t count;
  index_t first_tile;
  int32_t param_ndim, grad_ndim;
  int32_t index_bytes;
  int32_t grad_is_compact;
  int32_t param_dtype, grad_dtype;
  int32_t hyper;  // of its launch
  Form form;
};
static_assert(sizeof(DeviceSegment) < kWarpSize * sizeof(uint32_t), "a lane brings a word, and one has none");

SAFT_HOST_DEVICE int tile_numel(Form form) { return form == Form::kScattered ? kScatteredTile : kPackedTile; }

// What one launch brings along.
template <int kNumWords>
struct Arguments {
  const DeviceSegment* segments;
  const uint32_t* tile_segment;
  index_t first_tile, end_tile;
  int32_t first_segment, num_hypers;
  uint64_t words[kNumWords];  // AdamWCudaHypers, then a gradient address per segment
};

// One AdamWCudaHyper, ready for use.
struct HyperScalars {
  AdamWScalars<float> single;
  AdamWScalars<double> twice;
  uint32_t found_inf;
};

// ---- hyperparameters ----

__device__ __forceinline__ double load_scalar(const void* address, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::kFloat32:
      return double(*static_cast<const float*>(address));
    case ScalarType::kBFloat16:
      return double(to_float(*static_cast<const bfloat16*>(address)));
    case ScalarType::kFloat16:
      return double(to_float(*static_cast<const float16*>(address)));
    case ScalarType::kFloat64:
      break;
  }
  return *static_cast<const double*>(address);
}

// The whole block; `hypers` is complete after the next barrier.
template <int kNumWords>
__device__ __forceinline__ void prepare_hypers(const Arguments<kNumWords>& a, HyperScalars* hypers) {
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  if (warp * kHypersPerWarp >= a.num_hypers) return;
  const int hyper = warp * kHypersPerWarp + lane / 2;
  const bool first = lane % 2 == 0;  // of the two lanes; it has beta1
  const int source = hyper < a.num_hypers ? hyper : a.num_hypers - 1;
  AdamWCudaHyper h;
  memcpy(&h, a.words + source * kHyperWords, sizeof(h));
  double correction = 1;
  if (h.step != nullptr) {
    correction = 1.0 - pow(first ? h.number.beta1 : h.number.beta2, load_scalar(h.step, h.step_dtype));
  }
  const double other = __shfl_xor_sync(kFullMask, correction, 1);
  if (!first || hyper >= a.num_hypers) return;
  if (h.step != nullptr) {
    h.number.bias_correction1 = correction;
    h.number.bias_correction2_sqrt = sqrt(other);
  }
  if (h.lr != nullptr) h.number.lr = load_scalar(h.lr, h.lr_dtype);
  if (h.grad_scale != nullptr) h.number.grad_scale = load_scalar(h.grad_scale, h.grad_scale_dtype);
  hypers[hyper].single = AdamWScalars<float>(h.number);
  hypers[hyper].twice = AdamWScalars<double>(h.number);
  hypers[hyper].found_inf = h.found_inf != nullptr && load_scalar(h.found_inf, h.found_inf_dtype) != 0;
}

// ---- elements ----

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T item[kCount];
};

template <class V, class T>
__device__ __forceinline__ V filled(T value) {
  V vector;
#pragma unroll
  for (T& item : vector.item) item = value;
  return vector;
}

template <class opmath_t>
__device__ __forceinline__ const AdamWScalars<opmath_t>& scalars_of(const HyperScalars& hyper) {
  if constexpr (std::is_same_v<opmath_t, double>) {
    return hyper.twice;
  } else {
    return hyper.single;
  }
}

template <class param_t_, class grad_t_>
struct Types {
  using param_t = param_t_;
  using grad_t = grad_t_;
  using opmath_t = opmath_of<param_t>;
  static constexpr int kItems =
      sizeof(opmath_t) == 4 ? saft::cuda_sparse_adamw::kItems : 1;       // what registers hold
  static constexpr bool kHasVectors = !std::is_same_v<param_t, double>;  // 8 bytes per lane are wide enough
};

// A 16-bit parameter may have an fp32 gradient; nothing else mixes.
template <class Fn>
__device__ __forceinline__ void dispatch(const DeviceSegment& x, Fn fn) {
  const bool single_grad = x.grad_dtype == int32_t(ScalarType::kFloat32);
  switch (ScalarType(x.param_dtype)) {
    case ScalarType::kFloat32:
      return fn(Types<float, float>{});
    case ScalarType::kBFloat16:
      return single_grad ? fn(Types<bfloat16, float>{}) : fn(Types<bfloat16, bfloat16>{});
    case ScalarType::kFloat16:
      return single_grad ? fn(Types<float16, float>{}) : fn(Types<float16, float16>{});
    case ScalarType::kFloat64:
      return fn(Types<double, double>{});
  }
}

// A coordinate between its loads and its stores. Values for everything, or it would not stay in registers.
template <class T>
struct Item {
  using opmath_t = typename T::opmath_t;
  typename T::param_t param{};
  typename T::grad_t grad{};
  opmath_t exp_avg = 0, exp_avg_sq = 0;
  opmath_t max_exp_avg_sq = -INFINITY;  // without AMSGrad: the maximum then is exp_avg_sq, NaN included
  opmath_t master = 0;

  // `master` becomes what the parameter was rounded from.
  __device__ __forceinline__ void step(bool has_master, const AdamWScalars<opmath_t>& s) {
    opmath_t p = load_as<opmath_t>(param);
    if constexpr (sizeof(param) == 2) {
      if (has_master) p = master_or_param<typename T::param_t>(master, p);
    }
    adamw_element<opmath_t>(p, load_as<opmath_t>(grad), exp_avg, exp_avg_sq, &max_exp_avg_sq, s);
    param = store_as<typename T::param_t>(p);
    master = p;
  }
};

// Memory that a table names is global; a pointer does not say so, and a load through it could be of any kind.
template <class T>
__device__ __forceinline__ T* global(T* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

__device__ __forceinline__ bool is_strided(const DeviceSegment& x) {
  return x.param_ndim != 0 || x.grad_ndim != 0;
}

// The flat positions of a lane's coordinates i, i + 32, ..., as far as they are less than `left` from i. No
// load waits for another: a narrow index is widened when all are requested.
template <int kCount>
__device__ __forceinline__ void load_positions(const DeviceSegment& x, index_t i, int left,
                                               index_t (&position)[kCount]) {
  const void* const indices = global(x.indices);
  if (indices == nullptr) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) position[j] = i + j * kWarpSize;
  } else if (x.index_bytes == 4) {
    int32_t narrow[kCount] = {};
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (j * kWarpSize < left) narrow[j] = static_cast<const int32_t*>(indices)[i + j * kWarpSize];
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) position[j] = narrow[j];
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      position[j] = 0;
      if (j * kWarpSize < left) position[j] = static_cast<const index_t*>(indices)[i + j * kWarpSize];
    }
  }
}

// Where the one coordinate of a lane lies, in a segment with layouts.
struct Place {
  index_t param, grad;
};

__device__ __forceinline__ Place find_place(const DeviceSegment& x, index_t i, int left) {
  index_t position[1];
  load_positions(x, i, left, position);
  return {storage_offset(position[0], x.param_ndim, global(x.param_layout)),
          storage_offset(x.grad_is_compact != 0 ? i : position[0], x.grad_ndim, global(x.grad_layout))};
}

// A lane's coordinates i, i + 32, ..., as far as they are less than `left` from i; of a segment with layouts,
// i alone, which is at `place`.
template <class T>
__device__ __forceinline__ void step_items(const DeviceSegment& x, const void* grads, const Place& place,
                                           index_t i, int left, const HyperScalars& hyper) {
  using opmath_t = typename T::opmath_t;
  typename T::param_t* const param = static_cast<typename T::param_t*>(global(x.param));
  const typename T::grad_t* const grad = static_cast<const typename T::grad_t*>(global(grads));
  opmath_t* const exp_avg = static_cast<opmath_t*>(global(x.exp_avg));
  opmath_t* const exp_avg_sq = static_cast<opmath_t*>(global(x.exp_avg_sq));
  opmath_t* const max_exp_avg_sq = static_cast<opmath_t*>(global(x.max_exp_avg_sq));
  float* const master = sizeof(typename T::param_t) == 2 ? global(x.master) : nullptr;
  Item<T> item[T::kItems];
  // state first: it is where the lane is, and its loads need not wait for an index
#pragma unroll
  for (int j = 0; j < T::kItems; ++j) {
    const index_t at = i + j * kWarpSize;
    if (j * kWarpSize >= left) continue;
    item[j].exp_avg = exp_avg[at];
    item[j].exp_avg_sq = exp_avg_sq[at];
    if (max_exp_avg_sq != nullptr) item[j].max_exp_avg_sq = max_exp_avg_sq[at];
    if (master != nullptr) item[j].master = master[at];
  }
  index_t param_at[T::kItems] = {}, grad_at[T::kItems] = {};
  if (is_strided(x)) {
    param_at[0] = place.param;
    grad_at[0] = place.grad;
  } else {
    load_positions(x, i, left, param_at);
#pragma unroll
    for (int j = 0; j < T::kItems; ++j) grad_at[j] = x.grad_is_compact != 0 ? i + j * kWarpSize : param_at[j];
  }
#pragma unroll
  for (int j = 0; j < T::kItems; ++j) {
    if (j * kWarpSize >= left) continue;
    item[j].param = param[param_at[j]];
    item[j].grad = grad[grad_at[j]];
  }
  const AdamWScalars<opmath_t>& s = scalars_of<opmath_t>(hyper);
#pragma unroll
  for (int j = 0; j < T::kItems; ++j) {
    const index_t at = i + j * kWarpSize;
    if (j * kWarpSize >= left) continue;
    item[j].step(master != nullptr, s);
    exp_avg[at] = item[j].exp_avg;
    exp_avg_sq[at] = item[j].exp_avg_sq;
    if (max_exp_avg_sq != nullptr) max_exp_avg_sq[at] = item[j].max_exp_avg_sq;
    param[param_at[j]] = item[j].param;
    if (master != nullptr) master[at] = float(item[j].master);
  }
}

// As many of the elements as vectors hold, unless the gradient is not aligned: 16 bytes of opmath_t per lane
// and access. `base`: a multiple of kPackedTile. Returns how many of the `n` elements from there are done.
template <class T>
__device__ __forceinline__ int step_vectors(const DeviceSegment& x, const void* grad, index_t base, int n,
                                            const HyperScalars& hyper) {
  using opmath_t = typename T::opmath_t;
  constexpr int kCount = 16 / sizeof(opmath_t);
  using Params = Vector<typename T::param_t, kCount>;
  using Grads = Vector<typename T::grad_t, kCount>;
  using State = Vector<opmath_t, kCount>;
  if (reinterpret_cast<uintptr_t>(grad) % sizeof(Grads) != 0) return 0;
  const index_t first = base / kCount + int(threadIdx.x) % kWarpSize;
  // pointers that move, for bases and places would take twice the registers
  Params* param = static_cast<Params*>(global(x.param)) + first;
  const Grads* gradient = static_cast<const Grads*>(global(grad)) + first;
  State* exp_avg = static_cast<State*>(global(x.exp_avg)) + first;
  State* exp_avg_sq = static_cast<State*>(global(x.exp_avg_sq)) + first;
  const bool has_max = x.max_exp_avg_sq != nullptr;
  const bool has_master = sizeof(typename T::param_t) == 2 && x.master != nullptr;
  // of what there is not, another moves, and is never read
  State* max_exp_avg_sq = has_max ? static_cast<State*>(global(x.max_exp_avg_sq)) + first : exp_avg_sq;
  State* master = has_master ? reinterpret_cast<State*>(global(x.master)) + first : exp_avg_sq;
  const AdamWScalars<opmath_t>& s = scalars_of<opmath_t>(hyper);
#pragma unroll 1
  for (int left = n / kCount - int(threadIdx.x) % kWarpSize; left > 0; left -= kWarpSize) {
    Params p = *param;
    const Grads g = *gradient;
    State m = *exp_avg, v = *exp_avg_sq;
    State largest = has_max ? *global(max_exp_avg_sq) : filled<State>(opmath_t(-INFINITY));
    State w = has_master ? *global(master) : filled<State>(opmath_t(0));
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      Item<T> item{p.item[j], g.item[j], m.item[j], v.item[j], largest.item[j], w.item[j]};
      item.step(has_master, s);
      p.item[j] = item.param;
      m.item[j] = item.exp_avg;
      v.item[j] = item.exp_avg_sq;
      largest.item[j] = item.max_exp_avg_sq;
      w.item[j] = item.master;
    }
    *exp_avg = m;
    *exp_avg_sq = v;
    if (has_max) *global(max_exp_avg_sq) = largest;
    *param = p;
    if (has_master) *global(master) = w;
    param += kWarpSize;
    gradient += kWarpSize;
    exp_avg += kWarpSize;
    exp_avg_sq += kWarpSize;
    max_exp_avg_sq += kWarpSize;
    master += kWarpSize;
  }
  return n / kCount * kCount;
}

__device__ __forceinline__ void step_tile(const DeviceSegment& x, const void* grad, index_t tile,
                                          const HyperScalars& hyper) {
  const int numel = tile_numel(x.form);
  const index_t base = tile * numel;
  const int n = x.count - base < numel ? int(x.count - base) : numel;
  int done = 0;
  if (x.form == Form::kVectors) {
    dispatch(x, [&](auto types) {
      if constexpr (decltype(types)::kHasVectors)
        done = step_vectors<decltype(types)>(x, grad, base, n, hyper);
    });
  }
  // offsets through layouts are much code, and seldom needed: one at a time
  const bool strided = is_strided(x), is_double = x.param_dtype == int32_t(ScalarType::kFloat64);
  const int together = strided || is_double ? kWarpSize : kScatteredTile;
#pragma unroll 1
  for (; done < n; done += together) {
    const int lane = int(threadIdx.x) % kWarpSize;
    const index_t i = base + done + lane;
    const int left = (n - done < together ? n - done : together) - lane;
    const Place place = strided ? find_place(x, i, left) : Place{};
    dispatch(x, [&](auto types) { step_items<decltype(types)>(x, grad, place, i, left, hyper); });
  }
}

// ---- kernels ----

// What a warp is at. In shared memory: registers are for what is in flight.
struct Work {
  index_t tile;
  DeviceSegment segment;
  const void* grad;
};

// Goes to a tile, if there is such: each lane brings a word of its segment. Complete after a barrier of the
// warp.
template <int kNumWords>
__device__ __forceinline__ void go_to(index_t tile, const Arguments<kNumWords>& a, Work* work) {
  const int lane = int(threadIdx.x) % kWarpSize;
  if (lane == kWarpSize - 1) work->tile = tile;
  if (tile >= a.end_tile) return;
  const int32_t at = int32_t(a.tile_segment[tile]);
  if (lane < int(sizeof(DeviceSegment) / sizeof(uint32_t))) {
    void* const to = reinterpret_cast<char*>(&work->segment) + lane * sizeof(uint32_t);
    const void* const from = reinterpret_cast<const char*>(a.segments + at) + lane * sizeof(uint32_t);
    memcpy(__builtin_assume_aligned(to, 4), __builtin_assume_aligned(from, 4), sizeof(uint32_t));
  } else if (lane == kWarpSize - 1) {
    work->grad = reinterpret_cast<const void*>(a.words[a.num_hypers * kHyperWords + at - a.first_segment]);
  }
}

template <int kNumWords>
__global__ __launch_bounds__(kThreads, kBlocksPerSm) void sparse_adamw_kernel(
    const __grid_constant__ Arguments<kNumWords> a) {
  __shared__ HyperScalars hypers[kMaxHypers];
  __shared__ Work works[kWarps];
  const unsigned warp = threadIdx.x / kWarpSize;
  Work& work = works[warp];
  // before the scalars, which take as long as its two loads
  go_to(a.first_tile + index_t(blockIdx.x) * kWarps + warp, a, &work);
  prepare_hypers(a, hypers);
  __syncthreads();
  for (int h = 0; h < a.num_hypers; ++h) {
    if (hypers[h].found_inf != 0) return;
  }
  while (work.tile < a.end_tile) {
    const DeviceSegment& x = work.segment;
    step_tile(x, work.grad, work.tile - x.first_tile, hypers[x.hyper]);
    const index_t next = work.tile + index_t(gridDim.x) * kWarps;
    __syncwarp();
    go_to(next, a, &work);
    __syncwarp();
  }
}

// sparse_adamw / locate_tiles: the segment of every tile, once per table.
// Traffic    writes 4 B per tile.
// Algorithm  bisection over the segments' first tiles.
// Launch     grid-stride.
__global__ __launch_bounds__(kThreads) void locate_tiles_kernel(const DeviceSegment* segments,
                                                                index_t num_segments, uint32_t* tile_segment,
                                                                index_t num_tiles) {
  const index_t num_threads = index_t(gridDim.x) * kThreads;
  for (index_t t = index_t(blockIdx.x) * kThreads + threadIdx.x; t < num_tiles; t += num_threads) {
    tile_segment[t] = uint32_t(find_row(segments, num_segments, &DeviceSegment::first_tile, t));
  }
}

}  // namespace cuda_sparse_adamw
}  // namespace saft
