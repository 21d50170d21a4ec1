// common.h: the types every op shares. Plain C++17; nvcc compiles it too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define SAFT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SAFT_HOST_DEVICE inline
#endif

// ---- words: one meaning each, in csrc/ and in the tables that Python fills ----
//
// coordinate  a selected element, together with what the packed arrays hold of it (index, value, state)
// segment     one tensor with its coordinates: a row of the tables of gather, scatter and sparse_adamw
// row         of a table, of structs or as Python fills it. What a matrix has are channels: outputs, inputs
// hyper       the scalars of one step of one param group; a segment names its row of them
// tile        the part of ONE tensor that a thread, warp or block works on at a time; positions in it are 16 bits
//             where they are stored. topk_magnitude / cuda cuts it into strips of 1,024 elements
// chunk       what is handed out at once, wherever the borders of tensors lie: coordinates, entries, 32 tiles
// sure, band  keys above the bracket, and inside it: together the survivors of a filter
// selected    the outcome: the sure ones, and of the band what is above the threshold, with the first of the ties

namespace saft {

using index_t = int64_t;  // every count, offset and stride

SAFT_HOST_DEVICE constexpr index_t ceil_div(index_t a, index_t b) { return (a + b - 1) / b; }

// Storage types. saft_kernels/ops/dtypes.py has the same numbers; change both together.
enum class ScalarType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

inline index_t itemsize_of(ScalarType dtype) {
  return dtype == ScalarType::kFloat64 ? 8 : dtype == ScalarType::kFloat32 ? 4 : 2;
}

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class To, class From>
SAFT_HOST_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- fp32 <-> 16-bit storage. Integer arithmetic, so denormals survive flush-to-zero modes. ----

SAFT_HOST_DEVICE uint32_t float_bits(bfloat16 x) { return uint32_t(x.bits) << 16; }

SAFT_HOST_DEVICE uint32_t float_bits(float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1fu;
  uint32_t mantissa = x.bits & 0x3ffu;
  if (exponent == 0x1f) return sign | 0x7f800000u | (mantissa << 13);
  if (exponent != 0) return sign | ((exponent + 112) << 23) | (mantissa << 13);
  if (mantissa == 0) return sign;
  uint32_t shift = 0;  // a denormal half is a normal float: shift its leading one out
  while (!(mantissa & 0x400u)) {
    mantissa <<= 1;
    ++shift;
  }
  return sign | ((113 - shift) << 23) | ((mantissa & 0x3ffu) << 13);
}

SAFT_HOST_DEVICE float to_float(float x) { return x; }
SAFT_HOST_DEVICE float to_float(bfloat16 x) { return bit_cast<float>(float_bits(x)); }
SAFT_HOST_DEVICE float to_float(float16 x) { return bit_cast<float>(float_bits(x)); }

// Round to nearest even, NaN stays NaN: what torch does on `.to(dtype)`.
SAFT_HOST_DEVICE bfloat16 to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40u)};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

SAFT_HOST_DEVICE float16 to_float16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to 65536 or more: inf
  if (magnitude < 0x33000001u) return {sign};                       // at most half the least denormal
  const uint32_t exponent = magnitude >> 23;
  uint32_t mantissa = magnitude;
  uint32_t drop = 13;
  if (exponent < 113) {  // a denormal half
    mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    drop = 126 - exponent;
  } else {
    mantissa = magnitude - (112u << 23);
  }
  const uint32_t half = 1u << (drop - 1);
  const uint32_t odd = (mantissa >> drop) & 1u;
  return {uint16_t(sign | ((mantissa + half - 1 + odd) >> drop))};
}

template <class scalar_t>
SAFT_HOST_DEVICE scalar_t from_float(float x);
template <>
SAFT_HOST_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
SAFT_HOST_DEVICE bfloat16 from_float<bfloat16>(float x) {
  return to_bfloat16(x);
}
template <>
SAFT_HOST_DEVICE float16 from_float<float16>(float x) {
  return to_float16(x);
}

// ---- storage type <-> compute type ----

template <class scalar_t>
using opmath_of = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <class opmath_t, class scalar_t>
SAFT_HOST_DEVICE opmath_t load_as(const scalar_t& x) {
  if constexpr (std::is_same_v<scalar_t, double> || std::is_same_v<scalar_t, float>) {
    return opmath_t(x);
  } else {
    return opmath_t(to_float(x));
  }
}

template <class scalar_t, class opmath_t>
SAFT_HOST_DEVICE scalar_t store_as(opmath_t x) {
  if constexpr (std::is_same_v<scalar_t, double>) {
    return double(x);
  } else {
    return from_float<scalar_t>(float(x));
  }
}

// ---- layout: flat (row-major, logical) index to storage offset ----

// One tensor. `ndim == 0` means contiguous; else `layout` holds `ndim` sizes, then `ndim` strides, in
// elements, outermost first, with mergeable dimensions merged.
struct TensorDesc {
  void* data;
  index_t numel;
  ScalarType dtype;
  index_t ndim;
  const index_t* layout;
};

SAFT_HOST_DEVICE index_t storage_offset(index_t flat, index_t ndim, const index_t* layout) {
  if (ndim == 0) return flat;
  index_t offset = 0;
  for (index_t d = ndim - 1; d > 0; --d) {
    const index_t size = layout[d];
    const index_t quotient = flat / size;
    offset += (flat - quotient * size) * layout[ndim + d];
    flat = quotient;
  }
  return offset + flat * layout[ndim];
}

}  // namespace saft
