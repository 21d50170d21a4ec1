// sparse_adamw / cpu.
//
// Algorithm  blocks of kBlock coordinates: gather parameter and gradient into L1, run the element math on the
//            packed block (vectorised per instruction set), scatter the parameter. The next block's lines are
//            prefetched while this one is computed.
// Traffic    per coordinate: one line of the parameter (read, written), one of the gradient (read), index 4 B
//            or 8 B, moments 16 B. A wholly selected tensor: 28 B per fp32 element.
// Threads    split by coordinates, not by tensors.
// Contract   -ffp-contract=off for this file: the same bits on every instruction set.

#include <type_traits>

#include "cpu_chunks.h"
#include "cpu_isa.h"
#include "sparse_adamw.h"

namespace saft {
namespace {

constexpr index_t kBlock = 256;
constexpr index_t kChunk = 16 * kBlock;

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

template <class opmath_t, class scalar_t>
opmath_t load(const scalar_t& x) {
  if constexpr (std::is_same_v<scalar_t, double> || std::is_same_v<scalar_t, float>) {
    return opmath_t(x);
  } else {
    return opmath_t(to_float(x));
  }
}

template <class opmath_t, class scalar_t>
scalar_t store(opmath_t x) {
  if constexpr (std::is_same_v<scalar_t, double>) {
    return double(x);
  } else {
    return from_float<scalar_t>(float(x));
  }
}

// All-elements and compact tensors are addressed by position; `indices` null means position == flat index.
template <class index_type>
index_t element_offset(const TensorDesc& tensor, const index_type* indices, index_t i) {
  const index_t flat = indices == nullptr ? i : index_t(indices[i]);
  return storage_offset(flat, tensor.ndim, tensor.layout);
}

template <class opmath_t, class param_t, class grad_t, class index_type>
void run_chunk(const AdamWSegment& segment, const AdamWScalars<opmath_t>& scalars, Isa isa,
               const index_type* indices, index_t first, index_t last) {
  param_t* param = static_cast<param_t*>(segment.param.data);
  const grad_t* grad = static_cast<const grad_t*>(segment.grad.data);
  const index_type* grad_indices = segment.grad_is_compact ? nullptr : indices;
  const bool prefetch = indices != nullptr && segment.param.ndim == 0 && segment.grad.ndim == 0;
  opmath_t* exp_avg = static_cast<opmath_t*>(segment.exp_avg);
  opmath_t* exp_avg_sq = static_cast<opmath_t*>(segment.exp_avg_sq);
  opmath_t* max_exp_avg_sq = static_cast<opmath_t*>(segment.max_exp_avg_sq);

  const auto prefetch_block = [&](index_t begin) {
    const index_t end = std::min(last, begin + kBlock);
    for (index_t i = begin; i < end; ++i) {
      __builtin_prefetch(param + indices[i], 1);
      if (grad_indices != nullptr) __builtin_prefetch(grad + indices[i], 0);
    }
  };
  if (prefetch) prefetch_block(first);

  opmath_t p[kBlock], g[kBlock];
  for (index_t begin = first; begin < last; begin += kBlock) {
    const index_t n = std::min(kBlock, last - begin);
    if (prefetch) prefetch_block(begin + kBlock);
    for (index_t i = 0; i < n; ++i) {
      p[i] = load<opmath_t>(param[element_offset(segment.param, indices, begin + i)]);
      g[i] = load<opmath_t>(grad[element_offset(segment.grad, grad_indices, begin + i)]);
    }
    if constexpr (sizeof(param_t) == 2) {
      if (segment.master != nullptr) {
        for (index_t i = 0; i < n; ++i) {
          // the parameter wins when someone else wrote it: open_clip clamps logit_scale after each step
          const float master = segment.master[begin + i];
          if (from_float<param_t>(master).bits == from_float<param_t>(float(p[i])).bits) p[i] = master;
        }
      }
    }
    adamw_block(isa, p, g, exp_avg + begin, exp_avg_sq + begin,
                max_exp_avg_sq ? max_exp_avg_sq + begin : nullptr, n, scalars);
    for (index_t i = 0; i < n; ++i) {
      param[element_offset(segment.param, indices, begin + i)] = store<opmath_t, param_t>(p[i]);
    }
    if constexpr (sizeof(param_t) == 2) {
      if (segment.master != nullptr) std::copy_n(p, n, segment.master + begin);
    }
  }
}

template <class opmath_t, class param_t, class grad_t>
void run_segment(const AdamWSegment& segment, const AdamWHyper& hyper, Isa isa, index_t first, index_t last) {
  const AdamWScalars<opmath_t> scalars(hyper);
  dispatch_index(segment.indices, segment.index_bytes, [&](const auto* indices) {
    run_chunk<opmath_t, param_t, grad_t>(segment, scalars, isa, indices, first, last);
  });
}

// A 16-bit parameter may have an fp32 gradient (masters elsewhere, gradient buffers); nothing else mixes.
template <class param_t>
void run_low_precision(const AdamWSegment& segment, const AdamWHyper& hyper, Isa isa, index_t first,
                       index_t last) {
  if (segment.grad.dtype == ScalarType::kFloat32) {
    run_segment<float, param_t, float>(segment, hyper, isa, first, last);
  } else {
    run_segment<float, param_t, param_t>(segment, hyper, isa, first, last);
  }
}

}  // namespace

void sparse_adamw_cpu(const AdamWSegment* segments, index_t num_segments, const AdamWHyper* hypers,
                      int num_threads, int requested_isa) {
  const Isa isa = resolve_isa(requested_isa);
  for_each_chunk(segments, num_segments, kChunk, num_threads,
                 [hypers, isa](const AdamWSegment& segment, index_t first, index_t last) {
                   const AdamWHyper& hyper = hypers[segment.hyper];
                   switch (segment.param.dtype) {
                     case ScalarType::kFloat32:
                       return run_segment<float, float, float>(segment, hyper, isa, first, last);
                     case ScalarType::kBFloat16:
                       return run_low_precision<bfloat16>(segment, hyper, isa, first, last);
                     case ScalarType::kFloat16:
                       return run_low_precision<float16>(segment, hyper, isa, first, last);
                     case ScalarType::kFloat64:
                       return run_segment<double, double, double>(segment, hyper, isa, first, last);
                   }
                 });
}

}  // namespace saft
