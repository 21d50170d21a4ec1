// sparse_adamw / cpu.
//
// Algorithm  blocks of kBlock coordinates: gather parameter and gradient into L1, run the element math on the
//            packed block (vectorised per instruction set), scatter the parameter. The loads of a gather do not
//            depend on each other: prefetching the next block's lines was no faster (AMD EPYC, Zen 4).
// Traffic    per coordinate: one line of the parameter (read, written), one of the gradient (read), index 4 B
//            or 8 B, moments 16 B. A wholly selected tensor: 28 B per fp32 element.
// Threads    split by coordinates, not by tensors.
// Contract   what is used of an index is what was checked of it: one out of range ends the step.
//            Compiled with -ffp-contract=off: the same bits on every instruction set and over thread counts.

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

#include "cpu/chunks.h"
#include "cpu/isa.h"
#include "sparse_adamw/sparse_adamw.h"

namespace saft {
namespace {

// Tuned on 2 cores of an AMD EPYC (Zen 3), 2026-11-24. Blocks of 64 or 128 coordinates were no faster; a wholly
// selected tensor in chunks of 4,096 took 1.6 times as long.
constexpr index_t kBlock = 256;
constexpr index_t kMinChunk = 4096, kMaxChunk = 65536;

// torch says 0 for memory that was freed, and the offset of a view of it. Nothing is mapped below.
constexpr uintptr_t kLowestAddress = 1 << 16;

// One loop, compiled per instruction set.
#define SAFT_DEFINE_ADAMW_BLOCK(name, target)                                                               \
  template <class opmath_t>                                                                                 \
  target void name(opmath_t* __restrict param, const opmath_t* __restrict grad,                             \
                   opmath_t* __restrict exp_avg, opmath_t* __restrict exp_avg_sq,                           \
                   opmath_t* __restrict max_exp_avg_sq, index_t n, const AdamWScalars<opmath_t>& scalars) { \
    const AdamWScalars<opmath_t> s = scalars;                                                               \
    if (max_exp_avg_sq == nullptr) {                                                                        \
      for (index_t i = 0; i < n; ++i) {                                                                     \
        adamw_element<opmath_t>(param[i], grad[i], exp_avg[i], exp_avg_sq[i], nullptr, s);                  \
      }                                                                                                     \
    } else {                                                                                                \
      for (index_t i = 0; i < n; ++i) {                                                                     \
        adamw_element<opmath_t>(param[i], grad[i], exp_avg[i], exp_avg_sq[i], max_exp_avg_sq + i, s);       \
      }                                                                                                     \
    }                                                                                                       \
  }
SAFT_DEFINE_ADAMW_BLOCK(adamw_block_baseline, )
#if SAFT_X86_DISPATCH
SAFT_DEFINE_ADAMW_BLOCK(adamw_block_avx2, SAFT_TARGET_AVX2)
SAFT_DEFINE_ADAMW_BLOCK(adamw_block_avx512, SAFT_TARGET_AVX512)
#endif
#undef SAFT_DEFINE_ADAMW_BLOCK

template <class opmath_t>
void adamw_block(Isa isa, opmath_t* param, const opmath_t* grad, opmath_t* exp_avg, opmath_t* exp_avg_sq,
                 opmath_t* max_exp_avg_sq, index_t n, const AdamWScalars<opmath_t>& s) {
#if SAFT_X86_DISPATCH
  if (isa == kIsaAvx512) {
    return adamw_block_avx512(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, n, s);
  }
  if (isa == kIsaAvx2) {
    return adamw_block_avx2(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, n, s);
  }
#endif
  (void)isa;
  adamw_block_baseline(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, n, s);
}

// One operand of a segment: the elements that the indices name, or one per coordinate, through the layout.
template <class scalar_t>
struct Operand {
  scalar_t* data;
  bool is_indexed;
  index_t ndim;
  const index_t* layout;

  bool packed() const { return !is_indexed && ndim == 0; }
  bool scattered() const { return is_indexed && ndim == 0; }

  // Of n coordinates from `begin` on, whose indices are `indices`.
  template <class opmath_t, class index_type>
  void gather(const index_type* indices, index_t begin, index_t n, opmath_t* out) const {
    if (packed()) {
      for (index_t i = 0; i < n; ++i) out[i] = load_as<opmath_t>(data[begin + i]);
    } else if (scattered()) {
      for (index_t i = 0; i < n; ++i) out[i] = load_as<opmath_t>(data[indices[i]]);
    } else {
      for (index_t i = 0; i < n; ++i) out[i] = load_as<opmath_t>(data[offset(indices, begin, i)]);
    }
  }

  template <class opmath_t, class index_type>
  void scatter(const index_type* indices, index_t begin, index_t n, const opmath_t* in) const {
    if (packed()) {
      for (index_t i = 0; i < n; ++i) data[begin + i] = store_as<scalar_t>(in[i]);
    } else if (scattered()) {
      for (index_t i = 0; i < n; ++i) data[indices[i]] = store_as<scalar_t>(in[i]);
    } else {
      for (index_t i = 0; i < n; ++i) data[offset(indices, begin, i)] = store_as<scalar_t>(in[i]);
    }
  }

 private:
  template <class index_type>
  index_t offset(const index_type* indices, index_t begin, index_t i) const {
    return storage_offset(is_indexed ? index_t(indices[i]) : begin + i, ndim, layout);
  }
};

// `indices`: null for a wholly selected segment. False when it met an index out of range.
template <class opmath_t, class param_t, class grad_t, class index_type>
bool run_chunk(const AdamWSegment& segment, const AdamWScalars<opmath_t>& scalars, Isa isa,
               const index_type* indices, index_t first, index_t last) {
  const bool is_indexed = indices != nullptr;
  const Operand<param_t> param{static_cast<param_t*>(segment.param.data), is_indexed, segment.param.ndim,
                               segment.param.layout};
  const Operand<grad_t> grad{static_cast<grad_t*>(segment.grad.data),
                             is_indexed && segment.grad_is_compact == 0, segment.grad.ndim,
                             segment.grad.layout};
  opmath_t* exp_avg = static_cast<opmath_t*>(segment.exp_avg);
  opmath_t* exp_avg_sq = static_cast<opmath_t*>(segment.exp_avg_sq);
  opmath_t* max_exp_avg_sq = static_cast<opmath_t*>(segment.max_exp_avg_sq);

  if constexpr (std::is_same_v<param_t, opmath_t> && std::is_same_v<grad_t, opmath_t>) {
    if (param.packed() && grad.packed()) {  // nothing to gather
      adamw_block(isa, param.data + first, grad.data + first, exp_avg + first, exp_avg_sq + first,
                  max_exp_avg_sq ? max_exp_avg_sq + first : nullptr, last - first, scalars);
      return true;
    }
  }

  index_type block[kBlock];
  opmath_t p[kBlock], g[kBlock];
  for (index_t begin = first; begin < last; begin += kBlock) {
    const index_t n = std::min(kBlock, last - begin);
    if (is_indexed && !copy_in_range(indices + begin, n, segment.param.numel, block)) return false;
    param.gather(block, begin, n, p);
    grad.gather(block, begin, n, g);
    if constexpr (sizeof(param_t) == 2) {
      if (segment.master != nullptr) {
        for (index_t i = 0; i < n; ++i) p[i] = master_or_param<param_t>(segment.master[begin + i], p[i]);
      }
    }
    adamw_block(isa, p, g, exp_avg + begin, exp_avg_sq + begin,
                max_exp_avg_sq ? max_exp_avg_sq + begin : nullptr, n, scalars);
    param.scatter(block, begin, n, p);
    if constexpr (sizeof(param_t) == 2) {
      if (segment.master != nullptr) std::copy_n(p, n, segment.master + begin);
    }
  }
  return true;
}

template <class opmath_t, class param_t, class grad_t>
bool run_segment(const AdamWSegment& segment, const AdamWScalars<opmath_t>& scalars, Isa isa, index_t first,
                 index_t last) {
  bool in_range = false;
  dispatch_index(segment.indices, segment.index_bytes, [&](const auto* indices) {
    in_range = run_chunk<opmath_t, param_t, grad_t>(segment, scalars, isa, indices, first, last);
  });
  return in_range;
}

// A 16-bit parameter may have an fp32 gradient (masters elsewhere, gradient buffers); nothing else mixes.
template <class param_t>
bool run_low_precision(const AdamWSegment& segment, const AdamWScalars<float>& scalars, Isa isa,
                       index_t first, index_t last) {
  return segment.grad.dtype == ScalarType::kFloat32
             ? run_segment<float, param_t, float>(segment, scalars, isa, first, last)
             : run_segment<float, param_t, param_t>(segment, scalars, isa, first, last);
}

bool run_typed(const AdamWSegment& segment, const AdamWScalars<float>& scalars,
               const AdamWScalars<double>& scalars64, Isa isa, index_t first, index_t last) {
  switch (segment.param.dtype) {
    case ScalarType::kFloat32:
      return run_segment<float, float, float>(segment, scalars, isa, first, last);
    case ScalarType::kBFloat16:
      return run_low_precision<bfloat16>(segment, scalars, isa, first, last);
    case ScalarType::kFloat16:
      return run_low_precision<float16>(segment, scalars, isa, first, last);
    case ScalarType::kFloat64:
      return run_segment<double, double, double>(segment, scalars64, isa, first, last);
  }
  return false;
}

}  // namespace

index_t sparse_adamw_cpu(const AdamWSegment* segments, index_t num_segments, const AdamWHyper* hypers,
                         int num_threads, int requested_isa) {
  const Isa isa = resolve_isa(requested_isa);
  index_t count = 0, num_hypers = 0;
  for (index_t s = 0; s < num_segments; ++s) {
    const AdamWSegment& x = segments[s];
    if (x.count > 0 && std::min(uintptr_t(x.param.data), uintptr_t(x.grad.data)) < kLowestAddress) return s;
    count += x.count;
    num_hypers = std::max(num_hypers, x.hyper + 1);
  }
  // once for each: their divisions take as long as ten coordinates
  const std::vector<AdamWScalars<float>> scalars(hypers, hypers + num_hypers);
  const std::vector<AdamWScalars<double>> scalars64(hypers, hypers + num_hypers);
  const index_t chunk = std::clamp(count / (16 * std::max(1, num_threads)), kMinChunk, kMaxChunk);
  std::atomic<index_t> failed{-1};
  for_each_chunk(
      segments, num_segments, chunk, num_threads,
      [&, isa](const AdamWSegment& segment, index_t first, index_t last) {
        if (failed >= 0) return;
        if (!run_typed(segment, scalars[segment.hyper], scalars64[segment.hyper], isa, first, last)) {
          failed = &segment - segments;
        }
      });
  return failed;
}

}  // namespace saft
