// sparse_adamw: one AdamW step (Loshchilov & Hutter, 2019) on selected coordinates of many parameters.
//
// Contract   Only the selected coordinates of a parameter and their optimizer state are written; every other
//            element stays bit-identical. Indices of one segment are distinct, so there are no atomics and
//            two runs give the same bits. Gradients are read only.
// Precision  fp32 arithmetic for fp32, bf16 and fp16 parameters, fp64 for fp64; rounded once, on store.
//            Bias corrections come from the host in double.
#pragma once

#include <cmath>

#include "common.h"

namespace saft {

// One parameter with selected coordinates. All fields are 64-bit: Python fills the table as int64.
struct AdamWSegment {
  TensorDesc param;
  // The gradient: dense, like the parameter; or, with `grad_is_compact`, one value per coordinate.
  TensorDesc grad;
  const void* indices;  // `count` flat indices, ascending; null: every element (count == param.numel)
  index_t index_bytes;  // 4 or 8
  void* exp_avg;        // `count` values of opmath_t (fp32; fp64 for fp64 parameters), as are the next two
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // null: no AMSGrad
  float* master;         // fp32 values of 16-bit parameters, or null: the parameter alone
  index_t count;
  index_t grad_is_compact;
  index_t hyper;  // row of the hyperparameter table
};

// The scalars of one (param group, step count), in double.
struct AdamWHyper {
  double lr;
  double beta1, beta2;
  double eps;
  double weight_decay;
  double bias_correction1;       // 1 - beta1^step
  double bias_correction2_sqrt;  // sqrt(1 - beta2^step)
  double grad_scale;             // gradients are divided by it
  double maximize;               // 0 or 1
};

// What a 16-bit parameter with a master starts from. The parameter wins when someone else wrote it: open_clip
// clamps logit_scale after each step.
template <class param_t>
SAFT_HOST_DEVICE float master_or_param(float master, float param) {
  return from_float<param_t>(master).bits == from_float<param_t>(param).bits ? master : param;
}

// What the element math needs, rounded to opmath_t once.
template <class opmath_t>
struct AdamWScalars {
  opmath_t decay, one_minus_beta1, beta2, one_minus_beta2, step_size, bias_correction2_sqrt, eps;
  opmath_t inverse_grad_scale;  // negative to maximize

  AdamWScalars() = default;
  SAFT_HOST_DEVICE explicit AdamWScalars(const AdamWHyper& h)
      : decay(opmath_t(1 - h.lr * h.weight_decay)),
        one_minus_beta1(opmath_t(1 - h.beta1)),
        beta2(opmath_t(h.beta2)),
        one_minus_beta2(opmath_t(1 - h.beta2)),
        step_size(opmath_t(h.lr / h.bias_correction1)),
        bias_correction2_sqrt(opmath_t(h.bias_correction2_sqrt)),
        eps(opmath_t(h.eps)),
        inverse_grad_scale(opmath_t((h.maximize != 0 ? -1.0 : 1.0) / h.grad_scale)) {}
};

// The element math of torch.optim.AdamW (single-tensor form, same order of operations).
template <class opmath_t>
SAFT_HOST_DEVICE void adamw_element(opmath_t& param, opmath_t grad, opmath_t& exp_avg, opmath_t& exp_avg_sq,
                                    opmath_t* max_exp_avg_sq, const AdamWScalars<opmath_t>& s) {
  grad *= s.inverse_grad_scale;
  param *= s.decay;
  // torch's lerp, from the nearer end: from the other, a small gradient after a large one is lost
  const opmath_t difference = grad - exp_avg;
  exp_avg = s.one_minus_beta1 < opmath_t(0.5) ? exp_avg + difference * s.one_minus_beta1
                                              : grad - difference * (opmath_t(1) - s.one_minus_beta1);
  exp_avg_sq = exp_avg_sq * s.beta2 + s.one_minus_beta2 * grad * grad;
  opmath_t second_moment = exp_avg_sq;
  if (max_exp_avg_sq != nullptr) {
    // NaN propagates, as in torch.maximum
    if (!(*max_exp_avg_sq >= second_moment) && *max_exp_avg_sq == *max_exp_avg_sq) {
      *max_exp_avg_sq = second_moment;
    }
    second_moment = *max_exp_avg_sq;
  }
  const opmath_t denom = std::sqrt(second_moment) / s.bias_correction2_sqrt + s.eps;
  param -= s.step_size * (exp_avg / denom);
}

// ---- cpu entry ----

// Returns -1, or a segment that has no memory, or an index that is no position in its parameter: code outside may
// have freed or written it since it was checked. Nothing out of bounds is touched, but other coordinates may
// have made their step by then. Preconditions (checked by the caller): indices distinct; state arrays of `count`
// values.
index_t sparse_adamw_cpu(const AdamWSegment* segments, index_t num_segments, const AdamWHyper* hypers,
                         int num_threads, int isa);

// ---- cuda entries ----
//
// The caller allocates a device table and has it filled once; a step then is one launch. Gradient addresses
// and scalars are kernel arguments, so a step has no copy to wait for, and a CUDA graph that captures it owns
// all that it needs but the table. Nothing here allocates on the device or waits for it.

// AdamWHyper, with device addresses in the place of numbers. All fields are 64-bit: Python packs them.
struct AdamWCudaHyper {
  AdamWHyper number;
  // One element each, read when the step runs; null: the number. `step` replaces both bias corrections.
  const void *lr, *step, *grad_scale;
  const void* found_inf;  // one element; other than 0: the step writes nothing. Null: none
  ScalarType lr_dtype, step_dtype, grad_scale_dtype, found_inf_dtype;
};

// `segments`: as for sparse_adamw_cpu, with device addresses for all but the layouts. The table holds
// everything of them but the gradients' addresses, which are read from `segments` at every step.
index_t sparse_adamw_cuda_table_bytes(const AdamWSegment* segments, index_t num_segments);

// Enqueues the writes of the table on `stream` (a cudaStream_t) of the current device.
void sparse_adamw_cuda_table(const AdamWSegment* segments, index_t num_segments, void* device_table,
                             void* stream);

// Enqueues the step. `hypers`: the rows that `segments` name. `max_blocks`: an upper bound on the grid; 0 for
// what fills the device.
void sparse_adamw_cuda(const AdamWSegment* segments, index_t num_segments, const AdamWCudaHyper* hypers,
                       const void* device_table, void* stream, int max_blocks);

}  // namespace saft
