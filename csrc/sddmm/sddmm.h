// sddmm: selected entries of a weight gradient, dW = dY^T X, and nothing else of it (a sampled dense-dense
// matrix product).
//
// Contract   values[j] = sum over tokens t of dy[t, output_j] * x[t, input_j], where indices[j] = output_j *
//            num_inputs + input_j; added to what `values` holds if `accumulate`. Indices may repeat and need no
//            order; ascending ones reuse a channel of dY while it is in cache.
// Precision  products and sums in opmath_t: fp32, and fp64 for fp64. The order of summation depends on the
//            number of tokens alone: the same bits from run to run and over thread counts.
#pragma once

#include "common.h"

namespace saft {

// One factor: token t of channel n is data[t * token_stride + n * channel_stride]. A channel is an output or an
// input of the layer: one index into dW.
struct SddmmFactor {
  const void* data;
  index_t token_stride;
  index_t channel_stride;
};

// All fields are 64-bit: Python fills the struct as int64.
struct SddmmParams {
  SddmmFactor dy;    // (num_tokens, num_outputs)
  SddmmFactor x;     // (num_tokens, num_inputs)
  ScalarType dtype;  // of both
  index_t num_tokens;
  index_t num_outputs;
  index_t num_inputs;
  const void* indices;  // `k` flat positions in [0, num_outputs * num_inputs)
  index_t index_bytes;  // 4 or 8
  void* values;         // `k` values of opmath_t
  index_t k;
  index_t accumulate;  // 0 or 1
};

// ---- cpu entry ----

// False for an index out of range: nothing was written. Precondition (checked by the caller): num_outputs and
// num_inputs below 2^31.
bool sddmm_cpu(const SddmmParams& params, int num_threads, int isa);

// ---- cuda entries ----

// Precondition (checked by the caller): indices in range.

// Device memory that a call needs; at most (num_outputs + num_inputs) * (1 + 8,192 * itemsize) + 8 * k bytes,
// give or take the rounding of each part to 256.
index_t sddmm_cuda_workspace_bytes(const SddmmParams& params);

// Enqueues everything on `stream` (a cudaStream_t) of the current device; nothing waits. `params` holds
// device addresses. `workspace`: 256-byte aligned, any content. `max_blocks`: an upper bound on every grid; 0
// for what fills the device.
void sddmm_cuda(const SddmmParams& params, void* workspace, void* stream, int max_blocks);

}  // namespace saft
