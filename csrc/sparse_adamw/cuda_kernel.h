// sparse_adamw / cuda: one launch for all parameters.
//
// Algorithm  a warp takes tiles of ONE segment: 128 coordinates, or 1,024 elements of a wholly selected
//            tensor in memory order. A table says which segment holds a tile, so a huge tensor and hundreds
//            of tiny ones balance. Indices are requested together, then parameters, gradients and state of
//            a lane's four coordinates, before the first is used.
// Traffic    per coordinate: a 32-byte sector of the parameter (read, written) and one of the gradient
//            (read), index 4 B (8 B), moments 16 B: 116 B. A wholly selected tensor: 28 B per fp32 element,
//            22 B per 16-bit one, 30 B with a master.
// Count      CLIP ViT-L/14 at 0.1 % (k = 428 k): 50 MB, 10.3 us at 4.8 TB/s, if every sector holds one
//            coordinate; under it, four dependent loads (tile, segment, index, element), some 2.5 us. Wholly
//            selected: 12.0 GB, 2.5 ms; 64 instructions per element, 0.9 ms if every issue slot is taken.
// Precision  compiled with -fmad=false: every operation is rounded, as -ffp-contract=off has it in the cpu
//            backend, and the bits are the same. Memory is the bound, so fusing would gain nothing.
// Contract   every coordinate is read and written by one thread; no atomics.
// Launch     resident blocks, grid-stride. Each block first turns the AdamWCudaHypers into AdamWScalars, in
//            double, two lanes for each; those that are tensors are read here.
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
constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 3;  // 80 registers per thread
constexpr int kItems = 4;        // coordinates of a lane whose loads are in flight together
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

// Where the parameters of a lane's coordinates begin, begin + 32, ... lie, in elements; below, those that are
// less than `left` from `begin` exist.
struct Places {
  index_t param[kItems];
  index_t strided_grad;  // of the one coordinate of a segment with layouts
};

__device__ __forceinline__ bool is_strided(const DeviceSegment& x) {
  return x.param_ndim != 0 || x.grad_ndim != 0;
}

__device__ __forceinline__ Places find_places(const DeviceSegment& x, index_t begin, int left) {
  Places places;
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const index_t i = begin + j * kWarpSize;
    places.param[j] = i;
    if (x.indices != nullptr && j * kWarpSize < left) {
      places.param[j] = x.index_bytes == 4 ? index_t(static_cast<const int32_t*>(x.indices)[i])
                                           : static_cast<const index_t*>(x.indices)[i];
    }
  }
  places.strided_grad = x.grad_is_compact != 0 ? begin : places.param[0];
  if (is_strided(x)) {
    places.strided_grad = storage_offset(places.strided_grad, x.grad_ndim, x.grad_layout);
    places.param[0] = storage_offset(places.param[0], x.param_ndim, x.param_layout);
  }
  return places;
}

template <class T>
__device__ __forceinline__ void step_items(const DeviceSegment& x, const void* grad, const Places& places,
                                           index_t begin, int left, const HyperScalars& hyper) {
  using opmath_t = typename T::opmath_t;
  constexpr int kTogether = sizeof(opmath_t) == 4 ? kItems : 2;  // what registers hold
  typename T::param_t* const param = static_cast<typename T::param_t*>(x.param);
  opmath_t* const exp_avg = static_cast<opmath_t*>(x.exp_avg);
  opmath_t* const exp_avg_sq = static_cast<opmath_t*>(x.exp_avg_sq);
  opmath_t* const max_exp_avg_sq = static_cast<opmath_t*>(x.max_exp_avg_sq);
  float* const master = sizeof(typename T::param_t) == 2 ? x.master : nullptr;
  const bool strided = is_strided(x), compact = x.grad_is_compact != 0;
  const AdamWScalars<opmath_t>& s = scalars_of<opmath_t>(hyper);
#pragma unroll
  for (int first = 0; first < kItems; first += kTogether) {
    Item<T> item[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const index_t at = places.param[first + j], i = begin + (first + j) * kWarpSize;
      if ((first + j) * kWarpSize >= left) continue;
      item[j].param = param[at];
      item[j].grad = static_cast<const typename T::grad_t*>(grad)[strided   ? places.strided_grad
                                                                  : compact ? i
                                                                            : at];
      item[j].exp_avg = exp_avg[i];
      item[j].exp_avg_sq = exp_avg_sq[i];
      if (max_exp_avg_sq != nullptr) item[j].max_exp_avg_sq = max_exp_avg_sq[i];
      if (master != nullptr) item[j].master = master[i];
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const index_t at = places.param[first + j], i = begin + (first + j) * kWarpSize;
      if ((first + j) * kWarpSize >= left) continue;
      item[j].step(master != nullptr, s);
      exp_avg[i] = item[j].exp_avg;
      exp_avg_sq[i] = item[j].exp_avg_sq;
      if (max_exp_avg_sq != nullptr) max_exp_avg_sq[i] = item[j].max_exp_avg_sq;
      param[at] = item[j].param;
      if (master != nullptr) master[i] = float(item[j].master);
    }
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
  Params* const param = static_cast<Params*>(x.param);
  State* const exp_avg = static_cast<State*>(x.exp_avg);
  State* const exp_avg_sq = static_cast<State*>(x.exp_avg_sq);
  State* const max_exp_avg_sq = static_cast<State*>(x.max_exp_avg_sq);
  State* const master = sizeof(typename T::param_t) == 2 ? reinterpret_cast<State*>(x.master) : nullptr;
  const AdamWScalars<opmath_t>& s = scalars_of<opmath_t>(hyper);
#pragma unroll 1
  for (int at = int(threadIdx.x) % kWarpSize; at < n / kCount; at += kWarpSize) {
    const index_t i = base / kCount + at;
    Params p = param[i];
    const Grads g = static_cast<const Grads*>(grad)[i];
    State m = exp_avg[i], v = exp_avg_sq[i];
    State largest = max_exp_avg_sq != nullptr ? max_exp_avg_sq[i] : filled<State>(opmath_t(-INFINITY));
    State w = master != nullptr ? master[i] : filled<State>(opmath_t(0));
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      Item<T> item{p.item[j], g.item[j], m.item[j], v.item[j], largest.item[j], w.item[j]};
      item.step(master != nullptr, s);
      p.item[j] = item.param;
      m.item[j] = item.exp_avg;
      v.item[j] = item.exp_avg_sq;
      largest.item[j] = item.max_exp_avg_sq;
      w.item[j] = item.master;
    }
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    if (max_exp_avg_sq != nullptr) max_exp_avg_sq[i] = largest;
    param[i] = p;
    if (master != nullptr) master[i] = w;
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
  const int together = is_strided(x) ? kWarpSize : kScatteredTile;
#pragma unroll 1
  for (; done < n; done += together) {
    const int lane = int(threadIdx.x) % kWarpSize;
    const index_t begin = base + done + lane;
    const int left = (n - done < together ? n - done : together) - lane;
    const Places places = find_places(x, begin, left);
    dispatch(x, [&](auto types) { step_items<decltype(types)>(x, grad, places, begin, left, hyper); });
  }
}

// ---- kernels ----

template <int kNumWords>
__global__ __launch_bounds__(kThreads, kBlocksPerSm) void sparse_adamw_kernel(
    const __grid_constant__ Arguments<kNumWords> a) {
  __shared__ HyperScalars hypers[kMaxHypers];
  prepare_hypers(a, hypers);
  __syncthreads();
  for (int h = 0; h < a.num_hypers; ++h) {
    if (hypers[h].found_inf != 0) return;
  }
  for (uint32_t round = 0;; ++round) {  // one register, where a 64-bit tile and its step would take four
    const index_t tile =
        a.first_tile + (index_t(round) * gridDim.x + blockIdx.x) * kWarps + int(threadIdx.x) / kWarpSize;
    if (tile >= a.end_tile) return;
    const int32_t at = int32_t(a.tile_segment[tile]);
    const DeviceSegment& x = a.segments[at];
    const void* const grad =
        reinterpret_cast<const void*>(a.words[a.num_hypers * kHyperWords + at - a.first_segment]);
    step_tile(x, grad, tile - x.first_tile, hypers[x.hyper]);
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
