// topk_magnitude: the exact k positions of largest |x| over many tensors together.
//
// Contract   Exactly the k positions that a stable sort by (descending |x|, ascending tensor, ascending
//            flat index) puts first. NaN ranks above inf whatever its payload; +0 == -0; denormals count.
//            The answer is a function of the input alone: not of threads, instruction set or schedule.
// Keys       The magnitude bits of a float, read as an unsigned integer, order as |x| does. A tensor is
//            compared in its own ("native") key domain; thresholds live in a common one: 31-bit fp32
//            keys, or 63-bit fp64 keys when any tensor is fp64. Widening is monotone, so a common
//            threshold has an exact native counterpart (`first_native_key`).
#pragma once

#include "common.h"

namespace saft {

// ---- native keys ----

template <class scalar_t>
struct KeyTraits;
template <>
struct KeyTraits<float> {
  using key_t = uint32_t;
  static constexpr key_t kMask = 0x7fffffffu, kInf = 0x7f800000u;
};
template <>
struct KeyTraits<bfloat16> {
  using key_t = uint16_t;
  static constexpr key_t kMask = 0x7fffu, kInf = 0x7f80u;
};
template <>
struct KeyTraits<float16> {
  using key_t = uint16_t;
  static constexpr key_t kMask = 0x7fffu, kInf = 0x7c00u;
};
template <>
struct KeyTraits<double> {
  using key_t = uint64_t;
  static constexpr key_t kMask = 0x7fffffffffffffffull, kInf = 0x7ff0000000000000ull;
};

template <class scalar_t>
SAFT_HOST_DEVICE typename KeyTraits<scalar_t>::key_t native_key(scalar_t x) {
  using key_t = typename KeyTraits<scalar_t>::key_t;
  return key_t(bit_cast<key_t>(x) & KeyTraits<scalar_t>::kMask);
}

// ---- common keys ----

// Every NaN has the one key above inf.
template <class Key>
struct CommonKey;
template <>
struct CommonKey<uint32_t> {
  static constexpr uint32_t kNaN = 0x7fffffffu, kInf = 0x7f800000u;
  static constexpr int kBits = 31;
};
template <>
struct CommonKey<uint64_t> {
  static constexpr uint64_t kNaN = 0x7fffffffffffffffull, kInf = 0x7ff0000000000000ull;
  static constexpr int kBits = 63;
};

// Exact fp32 -> fp64 of a magnitude's bits, in integers: hardware conversion would flush denormals when
// the caller set denormals-are-zero.
SAFT_HOST_DEVICE uint64_t double_bits_from_float_bits(uint32_t magnitude) {
  const uint64_t exponent = magnitude >> 23;
  uint64_t mantissa = magnitude & 0x7fffffu;
  if (exponent == 0xff) return 0x7ff0000000000000ull | (mantissa << 29);
  if (exponent != 0) return ((exponent + 896) << 52) | (mantissa << 29);
  if (mantissa == 0) return 0;
  uint64_t shift = 0;
  while (!(mantissa & 0x800000u)) {
    mantissa <<= 1;
    ++shift;
  }
  return ((897 - shift) << 52) | ((mantissa & 0x7fffffu) << 29);
}

template <class Key, class scalar_t>
SAFT_HOST_DEVICE Key widen_key(typename KeyTraits<scalar_t>::key_t key) {
  if (key > KeyTraits<scalar_t>::kInf) return CommonKey<Key>::kNaN;
  if constexpr (sizeof(key) == sizeof(Key)) {
    return key;
  } else {
    uint32_t float_key;
    if constexpr (sizeof(key) == 2) {
      float_key = float_bits(scalar_t{key});
    } else {
      float_key = key;
    }
    if constexpr (sizeof(Key) == 4) {
      return float_key;
    } else {
      return double_bits_from_float_bits(float_key);
    }
  }
}

// The least native key whose common key is >= `common`; kMask + 1 when there is none.
template <class Key, class scalar_t>
SAFT_HOST_DEVICE typename KeyTraits<scalar_t>::key_t first_native_key(Key common) {
  using key_t = typename KeyTraits<scalar_t>::key_t;
  key_t low = 0;
  key_t high = key_t(KeyTraits<scalar_t>::kMask + 1);
  while (low < high) {
    const key_t middle = key_t(low + (high - low) / 2);
    if (widen_key<Key, scalar_t>(middle) >= common) {
      high = middle;
    } else {
      low = key_t(middle + 1);
    }
  }
  return low;
}

// ---- the sample's random numbers ----

SAFT_HOST_DEVICE uint64_t splitmix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// ---- cpu entry ----

struct TopKResult {
  double threshold;       // |x| at rank k; inf when k == 0; NaN when a NaN is at rank k
  index_t num_nonfinite;  // over all elements, selected or not
};

// `indices`: k flat positions, tensor by tensor, ascending inside each. `counts`: selected per tensor.
// Preconditions (checked by the caller): 0 <= k <= total numel. `isa`: an Isa of cpu/isa.h.
TopKResult topk_magnitude_cpu(const TensorDesc* tensors, index_t num_tensors, index_t k, index_t* indices,
                              index_t* counts, int num_threads, int isa);

// ---- cpu entry, row by row ----

// A matrix, whose element (r, i) is data[r * row_stride + i * stride], and how many to select of each row.
struct TopKRows {
  const void* data;
  ScalarType dtype;
  index_t num_rows;
  index_t numel;  // of a row
  index_t row_stride;
  index_t stride;
  index_t k;
};

// `indices`: num_rows * k flat positions in the matrix, ascending. Precondition (checked by the caller): 0 <= k <= numel.
void topk_magnitude_rows_cpu(const TopKRows& rows, index_t* indices, int num_threads);

// ---- cuda entries ----
//
// The caller plans on the host, allocates, and launches. Nothing here allocates on the device or waits for it.

// Sizes, all known on the host before anything runs.
struct TopKCudaPlan {
  index_t num_tensors;
  index_t k;
  index_t numel;
  index_t any_double;  // 1: keys are fp64's
  index_t num_tiles;   // see topk_magnitude/cuda_tables.h
  index_t num_runs;    // of elements that are sampled together
  index_t num_sampled_runs;
  index_t slab_bytes;       // one bit per element, rounded up per tensor
  index_t band_capacity;    // band elements whose keys are kept
  index_t table_bytes;      // of the workspace: what the kernels know of the tensors
  index_t workspace_bytes;  // device; at most 0.23 (fp64: 0.3) * numel + 300 * num_tensors + 40e6
  index_t result_words;     // int64, device
};

// Words of the result, before one offset into `indices` per tensor (unset for an empty tensor).
enum TopKCudaResult : int {
  kResultThreshold = 0,  // common key of rank k
  kResultNonfinite = 1,
  kResultStatus = 2,  // 0; else the kernels disagree about the data: it was written to meanwhile
  kResultReads = 3,   // passes over all of the data: 1 unless a guess failed
  kResultOffsets = 4,
};

// `tensors`: as for topk_magnitude_cpu, with device addresses in `data` and host addresses in `layout`.
TopKCudaPlan topk_magnitude_cuda_plan(const TensorDesc* tensors, index_t num_tensors, index_t k);

// Enqueues everything on `stream` (a cudaStream_t) of the current device. `tensors`: as for the plan; read before this
// returns. `workspace`: 256-byte aligned, any content. `indices`: k. `max_blocks`: an upper bound on every grid; 0 for what fills the device.
void topk_magnitude_cuda(const TopKCudaPlan& plan, const TensorDesc* tensors, void* workspace,
                         index_t* indices, index_t* result, void* stream, int max_blocks);

// |x| of a threshold key; inf when k is 0.
double topk_magnitude_cuda_threshold(const TopKCudaPlan& plan, index_t key);

}  // namespace saft
