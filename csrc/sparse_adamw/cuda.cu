// sparse_adamw / cuda: launches, and the table they read. The kernel is in cuda_kernel.h.
//
// Arguments  gradient addresses and hyperparameters, so that a step has nothing to copy: up to 4 KB for a few
//            hundred tensors, else up to 32 KB. More tensors than that (about 4,000), or more than 64
//            AdamWCudaHypers, take another launch each.

#include "cuda/upload.h"
#include "sparse_adamw/cuda_kernel.h"
#include "sparse_adamw/sparse_adamw.h"

namespace saft {
namespace cuda_sparse_adamw {

// ---- host: launches, table ----

// Consecutive segments with coordinates, as many as the arguments hold.
struct Launch {
  index_t first_segment;  // of the device table
  index_t first_tile, end_tile;
  std::vector<index_t> segments;  // rows of the caller's table
  std::vector<index_t> hypers;    // rows of the caller's hypers that these segments name

  index_t words() const { return index_t(hypers.size()) * kHyperWords + index_t(segments.size()); }
  index_t slot(index_t hyper) const {
    return std::find(hypers.begin(), hypers.end(), hyper) - hypers.begin();
  }
};

Form form_of(const AdamWSegment& x) {
  if (x.indices != nullptr || x.param.ndim != 0 || x.grad.ndim != 0) return Form::kScattered;
  if (x.param.dtype == ScalarType::kFloat64) return Form::kPacked;
  const uintptr_t vector = x.param.dtype == ScalarType::kFloat32 ? 16 : 8;  // bytes of four
  uintptr_t state = 0;
  for (const void* array : {static_cast<const void*>(x.exp_avg), static_cast<const void*>(x.exp_avg_sq),
                            static_cast<const void*>(x.max_exp_avg_sq), static_cast<const void*>(x.master)}) {
    state |= reinterpret_cast<uintptr_t>(array);
  }
  const bool aligned = reinterpret_cast<uintptr_t>(x.param.data) % vector == 0 && state % 16 == 0;
  return aligned ? Form::kVectors : Form::kPacked;
}

std::vector<Launch> deal(const AdamWSegment* segments, index_t num_segments) {
  std::vector<Launch> launches;
  index_t num_dealt = 0, tile = 0;
  for (index_t i = 0; i < num_segments; ++i) {
    const AdamWSegment& x = segments[i];
    if (x.count == 0) continue;
    bool fits = false;
    if (!launches.empty()) {
      const Launch& last = launches.back();
      const bool has_hyper = last.slot(x.hyper) < index_t(last.hypers.size());
      fits = last.words() + 1 + (has_hyper ? 0 : kHyperWords) <= kManyWords &&
             (has_hyper || index_t(last.hypers.size()) < kMaxHypers);
    }
    if (!fits) launches.push_back({num_dealt, tile, tile, {}, {}});
    Launch& launch = launches.back();
    if (launch.slot(x.hyper) == index_t(launch.hypers.size())) launch.hypers.push_back(x.hyper);
    launch.segments.push_back(i);
    launch.end_tile = tile += ceil_div(x.count, tile_numel(form_of(x)));
    ++num_dealt;
  }
  return launches;
}

// Where the parts of the device table begin, in words.
struct TableShape {
  index_t num_segments, num_tiles, layouts, tile_segment, words;

  TableShape(const AdamWSegment* segments, const std::vector<Launch>& launches)
      : num_segments(0), num_tiles(launches.empty() ? 0 : launches.back().end_tile) {
    index_t layout_words = 0;
    for (const Launch& launch : launches) {
      num_segments += index_t(launch.segments.size());
      for (const index_t i : launch.segments)
        layout_words += 2 * (segments[i].param.ndim + segments[i].grad.ndim);
    }
    layouts = num_segments * index_t(sizeof(DeviceSegment) / sizeof(uint64_t));
    tile_segment = layouts + layout_words;
    words = tile_segment + ceil_div(num_tiles, 2);
  }
};

template <int kNumWords>
void launch_step(const Launch& launch, const AdamWSegment* segments, const AdamWCudaHyper* hypers,
                 const uint64_t* table, const TableShape& shape, cudaStream_t stream, int max_blocks) {
  Arguments<kNumWords> a;
  a.segments = reinterpret_cast<const DeviceSegment*>(table);
  a.tile_segment = reinterpret_cast<const uint32_t*>(table + shape.tile_segment);
  a.first_tile = launch.first_tile;
  a.end_tile = launch.end_tile;
  a.first_segment = int32_t(launch.first_segment);
  a.num_hypers = int32_t(launch.hypers.size());
  uint64_t* word = a.words;
  for (const index_t hyper : launch.hypers) {
    std::memcpy(word, &hypers[hyper], sizeof(AdamWCudaHyper));
    word += kHyperWords;
  }
  for (const index_t i : launch.segments) *word++ = reinterpret_cast<uint64_t>(segments[i].grad.data);
  const unsigned grid =
      grid_size(ceil_div(launch.end_tile - launch.first_tile, kWarps), kBlocksPerSm * kWaves, max_blocks);
  SAFT_LAUNCH(sparse_adamw_kernel<kNumWords>, grid, kThreads, stream, a);
}

}  // namespace cuda_sparse_adamw

index_t sparse_adamw_cuda_table_bytes(const AdamWSegment* segments, index_t num_segments) {
  using namespace cuda_sparse_adamw;
  return TableShape(segments, deal(segments, num_segments)).words * index_t(sizeof(uint64_t));
}

void sparse_adamw_cuda_table(const AdamWSegment* segments, index_t num_segments, void* device_table,
                             void* stream) {
  using namespace cuda_sparse_adamw;
  const std::vector<Launch> launches = deal(segments, num_segments);
  if (launches.empty()) return;
  const TableShape shape(segments, launches);
  uint64_t* const table = static_cast<uint64_t*>(device_table);
  TableBuilder rows(table), layouts(table + shape.layouts);
  for (const Launch& launch : launches) {
    index_t tile = launch.first_tile;
    for (const index_t i : launch.segments) {
      const AdamWSegment& x = segments[i];
      DeviceSegment row{};
      row.param = x.param.data;
      row.indices = x.indices;
      row.exp_avg = x.exp_avg;
      row.exp_avg_sq = x.exp_avg_sq;
      row.max_exp_avg_sq = x.max_exp_avg_sq;
      row.master = x.master;
      row.count = x.count;
      row.first_tile = tile;
      row.param_ndim = int32_t(x.param.ndim);
      row.grad_ndim = int32_t(x.grad.ndim);
      row.index_bytes = int32_t(x.index_bytes);
      row.grad_is_compact = int32_t(x.grad_is_compact);
      row.param_dtype = int32_t(x.param.dtype);
      row.grad_dtype = int32_t(x.grad.dtype);
      row.hyper = int32_t(launch.slot(x.hyper));
      row.form = form_of(x);
      row.param_layout = reinterpret_cast<const index_t*>(layouts.end());
      layouts.append(x.param.layout, size_t(2 * x.param.ndim));
      row.grad_layout = reinterpret_cast<const index_t*>(layouts.end());
      layouts.append(x.grad.layout, size_t(2 * x.grad.ndim));
      rows.append(&row, 1);
      tile += ceil_div(x.count, tile_numel(row.form));
    }
  }
  rows.append(layouts.words().data(), layouts.words().size());
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  upload(rows.words(), table, cuda_stream);
  SAFT_LAUNCH(locate_tiles_kernel, grid_size(ceil_div(shape.num_tiles, kThreads), kBlocksPerSm, 0), kThreads,
              cuda_stream, reinterpret_cast<const DeviceSegment*>(table), shape.num_segments,
              reinterpret_cast<uint32_t*>(table + shape.tile_segment), shape.num_tiles);
}

void sparse_adamw_cuda(const AdamWSegment* segments, index_t num_segments, const AdamWCudaHyper* hypers,
                       const void* device_table, void* stream, int max_blocks) {
  using namespace cuda_sparse_adamw;
  const std::vector<Launch> launches = deal(segments, num_segments);
  const TableShape shape(segments, launches);
  const uint64_t* const table = static_cast<const uint64_t*>(device_table);
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  for (const Launch& launch : launches) {
    if (launch.words() <= kWords) {
      launch_step<kWords>(launch, segments, hypers, table, shape, cuda_stream, max_blocks);
    } else {
      launch_step<kManyWords>(launch, segments, hypers, table, shape, cuda_stream, max_blocks);
    }
  }
}

}  // namespace saft
