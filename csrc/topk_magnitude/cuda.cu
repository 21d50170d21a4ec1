// topk_magnitude / cuda: one read of the data, whatever k, and nothing that waits for the host.
//
// Algorithm  guess and verify (Floyd & Rivest 1975; Monroe et al. 2011), all decisions taken on the device.
//   sample   a stratified sample brackets the k-th key: [lo, hi]
//   filter   the only full read. key > hi: sure, one bit per element or a list of 16-bit positions, whichever
//            is smaller; lo <= key <= hi: band, position and key. Counts are exact
//   select   radix select over the band's keys finds the exact k-th key; the filter counted the first digit. If the bracket
//            missed it, or if the band outgrew its cache, it reads the data instead and filters them with the exact key
//   emit     per tile, band keys above and equal to the threshold. Sums over the tiles below give every tile its place
//            in the output and its share of the ties, which go to the lowest positions; sorted positions, of tiles
//            that have many in a kernel of their own
// Launches   six, of which the first writes the table and zeros. What depends on all blocks of a pass waits inside its
//            kernel where that moves little data: blocks claim items in order, the one that finishes the last goes on.
//            Blocks of the next kernel become resident while one ends, where the device has that (sm_90).
// Traffic    reads sizeof(scalar_t) B/elem once; writes 2 B (at most 1 bit per element) and then 8 B per
//            selected element; 6 B (10 B with fp64) per band element, of which N / 100 are typical at most.
// Contract   the sample only steers; no atomic decides what is selected or in what order. Integer sums alone.

#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/upload.h"
#include "topk_magnitude/cuda_emit.h"
#include "topk_magnitude/cuda_filter.h"
#include "topk_magnitude/cuda_sample.h"
#include "topk_magnitude/cuda_select.h"
#include "topk_magnitude/topk_magnitude.h"

namespace saft {
namespace cuda_topk_magnitude {

// ---- host: plan, table, launches ----

index_t shift_of(const TensorDesc& tensor) {
  if (tensor.ndim != 0) return 0;
  return index_t(reinterpret_cast<uintptr_t>(tensor.data) % 16) / itemsize_of(tensor.dtype);
}

// The parts of the workspace, one after the other.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(index_t n) {
    char* const at = base_ == nullptr ? nullptr : base_ + bytes_;
    bytes_ += ceil_div(n * index_t(sizeof(T)), 256) * 256;
    return reinterpret_cast<T*>(at);
  }
  index_t bytes() const { return bytes_; }

 private:
  char* base_;
  index_t bytes_ = 0;
};

// Fills the pointers into the workspace; returns its size. `table`: in it, for DeviceTensor rows, then layouts. `zeroed`:
// bytes at its start to clear before the first kernel.
template <class Key>
index_t carve(const TopKCudaPlan& plan, void* workspace, Problem<Key>& p, void** table, index_t* zeroed) {
  const index_t num_chunks = ceil_div(plan.num_tiles, kChunkTiles);
  Carver carver(workspace);
  p.state = carver.take<State<Key>>(1);
  p.sample_histograms = carver.take<uint32_t>(kSamplePasses * 2 * kBins);
  *zeroed = carver.bytes();
  p.select_histograms = carver.take<uint64_t>((1 + kSelectPasses<Key>)*kBins);
  *table = carver.take<char>(plan.table_bytes);
  p.tensors = static_cast<const DeviceTensor*>(*table);
  p.tile_tensor = carver.take<uint32_t>(plan.num_tiles);
  p.survivors = carver.take<Survivors>(plan.num_tiles);
  p.chunk_sums = carver.take<uint64_t>(num_chunks);
  p.group_sums = carver.take<uint64_t>(ceil_div(num_chunks, kGroupChunks));
  p.large_tiles = carver.take<LargeTile>(plan.num_tiles);
  p.sample = carver.take<Key>(sample_numel(plan.num_sampled_runs));
  p.band_keys = carver.take<Key>(plan.band_capacity);
  p.band_positions = carver.take<uint16_t>(plan.band_capacity);
  p.slab = carver.take<char>(plan.slab_bytes);
  return carver.bytes();
}

int sampled_runs_log2(index_t numel) {
  return numel > kLargeNumel ? kLargeSampledRunsLog2 : kSampledRunsLog2;
}

// Room for twice the band that the bracket's width implies, and for runs of equal keys at its ends.
index_t band_capacity(index_t numel, index_t k) {
  const double sampled = double(kRunNumel) * double(index_t(1) << sampled_runs_log2(numel));
  const double share = double(k) / double(std::max<index_t>(numel, 1));
  const double margin = kSigmas * std::sqrt(share * sampled * (1 - share)) + kSigmas * kSigmas / 2;
  const double expected = 2 * margin / sampled * double(numel);
  const index_t capacity = SAFT_CUDA_MIN_BAND_CAPACITY + numel / 256 + index_t(2 * expected);
  return std::min({capacity, numel, index_t(std::numeric_limits<uint32_t>::max())});
}

// Enqueues the writes of the table that the kernels read, and of the zeros at the start of the workspace.
void upload_table(const TopKCudaPlan& plan, const TensorDesc* tensors, void* device_table, void* workspace,
                  index_t zeroed, cudaStream_t stream) {
  TableBuilder rows(device_table), layouts(static_cast<DeviceTensor*>(device_table) + plan.num_tensors);
  index_t first_tile = 0, first_run = 0, slab_offset = 0;
  for (index_t i = 0; i < plan.num_tensors; ++i) {
    const TensorDesc& x = tensors[i];
    DeviceTensor row{};
    row.data = x.data;
    row.layout = reinterpret_cast<const index_t*>(layouts.end());
    row.numel = x.numel;
    row.ndim = x.ndim;
    row.first_tile = first_tile;
    row.first_run = first_run;
    row.slab_offset = slab_offset;
    row.dtype = int32_t(x.dtype);
    row.itemsize = int32_t(itemsize_of(x.dtype));
    row.shift = shift_of(x);
    rows.append(&row, 1);
    layouts.append(x.layout, size_t(2 * x.ndim));
    if (x.numel == 0) continue;
    const index_t span = x.numel + row.shift;
    first_tile += ceil_div(span, kTileNumel);
    first_run += ceil_div(x.numel, kRunNumel);
    slab_offset += ceil_div(span, kStripNumel) * kStripSlabBytes;
  }
  rows.append(layouts.words().data(), layouts.words().size());
  upload(rows.words(), device_table, stream, workspace, size_t(zeroed));
}

template <class Key>
void launch(const TopKCudaPlan& plan, const TensorDesc* tensors, void* workspace, index_t* indices,
            index_t* result, cudaStream_t stream, int max_blocks) {
  Problem<Key> p{};
  void* table = nullptr;
  index_t zeroed = 0;
  carve(plan, workspace, p, &table, &zeroed);
  p.num_tensors = plan.num_tensors;
  p.num_tiles = plan.num_tiles;
  p.num_runs = plan.num_runs;
  p.num_sampled_runs = plan.num_sampled_runs;
  p.sampled_runs_log2 = sampled_runs_log2(plan.numel);
  const auto is_narrow = [](const TensorDesc& x) { return itemsize_of(x.dtype) == 2; };
  // bf16 as fp32 ends in 16 zeros, fp16 in 13
  p.zero_bits = std::all_of(tensors, tensors + plan.num_tensors, is_narrow) ? 13 : 0;
  p.numel = plan.numel;
  p.k = plan.k;
  p.share = double(plan.k) / double(plan.numel);
  p.band_capacity = plan.band_capacity;
  p.indices = indices;
  p.result = result;

  const auto grid = [max_blocks](index_t work, int blocks_per_sm) {
    return grid_size(work, blocks_per_sm, max_blocks);
  };
  const unsigned sample_grid = grid(ceil_div(plan.num_sampled_runs, kThreads), kSampleBlocksPerSm<Key>);
  const unsigned filter_grid = grid(ceil_div(plan.num_tiles, kWarps), kFilterBlocksPerSm<Key>);
  const unsigned large_grid = grid(ceil_div(plan.num_tiles, kWarps), kLargeBlocksPerSm);
  const unsigned select_grid = grid(ceil_div(plan.num_tiles, kWarps), kSelectBlocksPerSm);
  const unsigned emit_grid = grid(ceil_div(plan.num_tiles, kChunkTiles), kEmitBlocksPerSm);

  upload_table(plan, tensors, table, workspace, zeroed, stream);
  const bool is_early = can_launch_early(filter_kernel<Key>);
  SAFT_LAUNCH_EARLY(is_early, sample_kernel<Key>, sample_grid, kThreads, stream, p);
  SAFT_LAUNCH_EARLY(is_early, filter_kernel<Key>, filter_grid, kThreads, stream, p);
  SAFT_LAUNCH_EARLY(is_early, select_kernel<Key>, select_grid, kThreads, stream, p);
  SAFT_LAUNCH_EARLY(is_early, emit_kernel<Key>, emit_grid, kThreads, stream, p);
  SAFT_LAUNCH_EARLY(is_early, emit_large_kernel<Key>, large_grid, kThreads, stream, p);
}

}  // namespace cuda_topk_magnitude

TopKCudaPlan topk_magnitude_cuda_plan(const TensorDesc* tensors, index_t num_tensors, index_t k) {
  using namespace cuda_topk_magnitude;
  TopKCudaPlan plan{};
  plan.num_tensors = num_tensors;
  plan.k = k;
  plan.table_bytes = num_tensors * index_t(sizeof(DeviceTensor));
  for (index_t i = 0; i < num_tensors; ++i) {
    const TensorDesc& x = tensors[i];
    plan.any_double |= x.dtype == ScalarType::kFloat64;
    plan.table_bytes += 2 * x.ndim * index_t(sizeof(index_t));
    if (x.numel == 0) continue;
    const index_t span = x.numel + shift_of(x);
    plan.numel += x.numel;
    plan.num_tiles += ceil_div(span, kTileNumel);
    plan.num_runs += ceil_div(x.numel, kRunNumel);
    plan.slab_bytes += ceil_div(span, kStripNumel) * kStripSlabBytes;
  }
  plan.num_sampled_runs = std::min(plan.num_runs, index_t(1) << sampled_runs_log2(plan.numel));
  plan.band_capacity = band_capacity(plan.numel, k);
  void* table;
  index_t zeroed;
  Problem<uint32_t> p32;
  Problem<uint64_t> p64;
  plan.workspace_bytes = plan.any_double ? carve(plan, nullptr, p64, &table, &zeroed)
                                         : carve(plan, nullptr, p32, &table, &zeroed);
  plan.result_words = kResultOffsets + num_tensors;
  return plan;
}

void topk_magnitude_cuda(const TopKCudaPlan& plan, const TensorDesc* tensors, void* workspace,
                         index_t* indices, index_t* result, void* stream, int max_blocks) {
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  if (plan.num_tiles == 0) {
    cuda_check(cudaMemsetAsync(result, 0, size_t(plan.result_words) * sizeof(index_t), cuda_stream),
               "cudaMemsetAsync");
  } else if (plan.any_double != 0) {
    cuda_topk_magnitude::launch<uint64_t>(plan, tensors, workspace, indices, result, cuda_stream, max_blocks);
  } else {
    cuda_topk_magnitude::launch<uint32_t>(plan, tensors, workspace, indices, result, cuda_stream, max_blocks);
  }
}

double topk_magnitude_cuda_threshold(const TopKCudaPlan& plan, index_t key) {
  if (plan.k == 0) return std::numeric_limits<double>::infinity();
  if (plan.any_double != 0) {
    if (uint64_t(key) == CommonKey<uint64_t>::kNaN) return std::numeric_limits<double>::quiet_NaN();
    return bit_cast<double>(uint64_t(key));
  }
  if (uint32_t(key) == CommonKey<uint32_t>::kNaN) return std::numeric_limits<double>::quiet_NaN();
  return bit_cast<double>(double_bits_from_float_bits(uint32_t(key)));
}

}  // namespace saft
