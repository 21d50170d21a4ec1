// gather, scatter / cuda: one launch for all tensors, after the upload of its table.
//
// Traffic    per coordinate: a 32-byte sector, read (gather) or read and written (scatter), the packed value
//            and the index.
// Algorithm  a warp takes tiles of 128 coordinates of ONE tensor, found by bisection; a lane's four indices,
//            then its four items, are requested before the first is used.
// Contract   each coordinate is written by one thread: no atomics.
// Launch     resident blocks, grid-stride over tiles.

#include "cuda/primitives.h"
#include "cuda/upload.h"
#include "gather_scatter/gather_scatter.h"

namespace saft {
namespace cuda_gather_scatter {

// ---- tuning: reasoned from bytes, not tuned on hardware ----

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 8;
constexpr int kItems = 4;
constexpr int kTile = kWarpSize * kItems;
constexpr int kWarps = kThreads / kWarpSize;

struct DeviceSegment {
  void* data;
  const void* indices;
  void* values;
  const index_t* layout;
  index_t count, numel;
  index_t first_tile;
  int32_t ndim, itemsize;
  int32_t index_bytes, unused;
};

// A lane's coordinates begin, begin + 32, ...; `at` is negative where there is none.
template <bool kGather, class item_t>
__device__ __forceinline__ void copy_items(const DeviceSegment& x, const index_t (&at)[kItems],
                                           index_t begin) {
  item_t* const data = static_cast<item_t*>(x.data);
  item_t* const values = static_cast<item_t*>(x.values);
  item_t item[kItems] = {};
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    if (at[j] >= 0) item[j] = kGather ? data[at[j]] : values[begin + j * kWarpSize];
  }
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    if (at[j] >= 0) (kGather ? values[begin + j * kWarpSize] : data[at[j]]) = item[j];
  }
}

template <bool kGather>
__global__ __launch_bounds__(kThreads) void copy_kernel(const DeviceSegment* segments, index_t num_segments,
                                                        index_t num_tiles) {
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  const index_t num_warps = index_t(gridDim.x) * kWarps;
  for (index_t tile = index_t(blockIdx.x) * kWarps + warp; tile < num_tiles; tile += num_warps) {
    const DeviceSegment& x = segments[find_row(segments, num_segments, &DeviceSegment::first_tile, tile)];
    const index_t first = (tile - x.first_tile) * kTile, begin = first + lane;
    const int left = (x.count - first < kTile ? int(x.count - first) : kTile) - lane;
    index_t at[kItems];
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      at[j] = -1;
      if (j * kWarpSize >= left) continue;
      at[j] = x.index_bytes == 4 ? index_t(static_cast<const int32_t*>(x.indices)[begin + j * kWarpSize])
                                 : static_cast<const index_t*>(x.indices)[begin + j * kWarpSize];
    }
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if (at[j] >= x.numel) at[j] = -1;
    }
    if (x.ndim != 0) {
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        if (at[j] >= 0) at[j] = storage_offset(at[j], x.ndim, x.layout);
      }
    }
    switch (x.itemsize) {
      case 1:
        copy_items<kGather, uint8_t>(x, at, begin);
        break;
      case 2:
        copy_items<kGather, uint16_t>(x, at, begin);
        break;
      case 4:
        copy_items<kGather, uint32_t>(x, at, begin);
        break;
      case 8:
        copy_items<kGather, uint64_t>(x, at, begin);
        break;
      default:
        copy_items<kGather, Bytes16>(x, at, begin);
    }
  }
}

// ---- host ----

template <bool kGather>
void run(const GatherSegment* segments, index_t num_segments, void* device_table, void* stream,
         int max_blocks) {
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  index_t num_rows = 0, num_tiles = 0;
  for (index_t i = 0; i < num_segments; ++i) num_rows += segments[i].count > 0;
  if (num_rows == 0) return;
  DeviceSegment* const device_rows = static_cast<DeviceSegment*>(device_table);
  TableBuilder rows(device_rows), layouts(device_rows + num_rows);
  for (index_t i = 0; i < num_segments; ++i) {
    const GatherSegment& x = segments[i];
    if (x.count == 0) continue;
    DeviceSegment row{};
    row.data = x.data;
    row.indices = x.indices;
    row.values = x.values;
    row.layout = reinterpret_cast<const index_t*>(layouts.end());
    row.count = x.count;
    row.numel = x.numel;
    row.first_tile = num_tiles;
    row.ndim = int32_t(x.ndim);
    row.itemsize = int32_t(x.itemsize);
    row.index_bytes = int32_t(x.index_bytes);
    rows.append(&row, 1);
    layouts.append(x.layout, size_t(2 * x.ndim));
    num_tiles += ceil_div(x.count, kTile);
  }
  rows.append(layouts.words().data(), layouts.words().size());
  upload(rows.words(), device_table, cuda_stream);
  const unsigned grid = grid_size(ceil_div(num_tiles, kWarps), kBlocksPerSm, max_blocks);
  SAFT_LAUNCH(copy_kernel<kGather>, grid, kThreads, cuda_stream, device_rows, num_rows, num_tiles);
}

}  // namespace cuda_gather_scatter

index_t gather_scatter_cuda_table_bytes(const GatherSegment* segments, index_t num_segments) {
  index_t bytes = num_segments * index_t(sizeof(cuda_gather_scatter::DeviceSegment));
  for (index_t i = 0; i < num_segments; ++i) bytes += 2 * segments[i].ndim * index_t(sizeof(index_t));
  return bytes;
}

void gather_cuda(const GatherSegment* segments, index_t num_segments, void* device_table, void* stream,
                 int max_blocks) {
  cuda_gather_scatter::run<true>(segments, num_segments, device_table, stream, max_blocks);
}

void scatter_cuda(const GatherSegment* segments, index_t num_segments, void* device_table, void* stream,
                  int max_blocks) {
  cuda_gather_scatter::run<false>(segments, num_segments, device_table, stream, max_blocks);
}

}  // namespace saft
