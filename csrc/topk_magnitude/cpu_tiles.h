// topk_magnitude / cpu: tiles, what the filter leaves of each, and the memory for it.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "topk_magnitude/cpu_compare.h"
#include "topk_magnitude/topk_magnitude.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace saft {
namespace cpu_topk_magnitude {

constexpr index_t kTileNumel = 65536;  // a position in a tile is 16 bits
constexpr index_t kTileWords = kTileNumel / 64;
constexpr index_t kSmallNumel = index_t(1) << 17;  // up to here everything is band; no sample
constexpr index_t kBandBudget = 64;  // band keys: at most numel / kBandBudget. Tuned as those in cpu.cpp

struct Tile {
  index_t tensor;
  index_t first;
  index_t numel;
};

// Bounds on the k-th key, and how many survivors (key >= lo) to expect.
template <class Key>
struct Bracket {
  Key lo, hi;
  double survivor_share;
};

// Survivors of one tile, ascending. Sure: a list or a bitmap. Band: a list with keys; when the bracket is one
// key, a list or a bitmap without. Emit writes over both.
template <class Key>
struct Survivors {
  uint32_t num_sure = 0;
  uint32_t num_band = 0;
  uint32_t num_greater = 0;  // band keys above the threshold
  uint32_t num_equal = 0;    // band keys equal to it
  const uint16_t* sure_list = nullptr;
  uint64_t* sure_words = nullptr;
  uint16_t* band_list = nullptr;
  const uint64_t* band_words = nullptr;
  const Key* band_keys = nullptr;
};

// ---- memory ----

constexpr size_t kHugePage = size_t(1) << 21;

// A fresh page of 4 KB costs 1.2 us to touch, one of 2 MB 42 us (2026-11-27, a virtual machine): ask for huge ones where
// the system leaves the choice.
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// A growing array that never moves: room for one more tile is reserved, then what was used is kept. Its parts are huge
// pages but for the first, which is all that small inputs need and costs them less.
template <class T>
class Slab {
 public:
  T* reserve(size_t n) {
    if (n > available_) {
      const bool is_first = parts_.empty();
      const size_t bytes = is_first ? kFirstPart : kHugePage;
      void* part =
          is_first ? std::malloc(bytes) : std::aligned_alloc(kHugePage, bytes);  // untouched until written
      if (part == nullptr) throw std::bad_alloc();
      next_ = static_cast<T*>(part);
      parts_.push_back({std::unique_ptr<T[], Free>(next_), 0});
      if (!is_first) advise_huge_pages(part, bytes);
      available_ = bytes / sizeof(T);
    }
    return next_;
  }
  void keep(size_t n) {
    next_ += n;
    available_ -= n;
    if (n > 0) parts_.back().size += n;
  }
  // Calls fn(data, size) for what was kept, part by part.
  template <class Fn>
  void for_each_part(const Fn& fn) const {
    for (const Part& part : parts_) fn(part.data.get(), part.size);
  }

 private:
  static constexpr size_t kFirstPart = size_t(1) << 20;
  static_assert((kTileNumel + 1) * sizeof(T) <= kFirstPart, "a part has room for a tile");
  struct Free {
    void operator()(T* part) const { std::free(part); }
  };
  struct Part {
    std::unique_ptr<T[], Free> data;
    size_t size;  // that was kept
  };
  std::vector<Part> parts_;
  T* next_ = nullptr;
  size_t available_ = 0;
};

template <class Key>
struct Workspace {
  Slab<uint16_t> positions;
  Slab<uint16_t> band_positions;
  Slab<Key> band_keys;
  Slab<uint64_t> words;
  alignas(64) uint64_t scratch_words[kTileWords];
  alignas(64) uint16_t selected[kTileNumel + kPositionsOverrun];
  std::vector<double> gathered;  // a strided tile, made contiguous; double for alignment
  index_t num_nonfinite = 0;

  void clear() {
    positions = {};
    band_positions = {};
    band_keys = {};
    words = {};
    num_nonfinite = 0;
  }
};

template <class scalar_t>
struct Tag {
  using type = scalar_t;
};

template <class Fn>
void dispatch(ScalarType dtype, const Fn& fn) {
  switch (dtype) {
    case ScalarType::kFloat32:
      return fn(Tag<float>{});
    case ScalarType::kBFloat16:
      return fn(Tag<bfloat16>{});
    case ScalarType::kFloat16:
      return fn(Tag<float16>{});
    case ScalarType::kFloat64:
      return fn(Tag<double>{});
  }
}

// Elements [first, first + n) of a strided tensor in logical order. Storage of 2, 4 or 8 bytes.
template <class scalar_t>
void gather_run(const TensorDesc& tensor, index_t first, index_t n, scalar_t* out) {
  const scalar_t* data = static_cast<const scalar_t*>(tensor.data);
  const index_t inner = tensor.layout[tensor.ndim - 1];
  const index_t stride = tensor.layout[2 * tensor.ndim - 1];
  while (n > 0) {
    const index_t count = std::min(n, inner - first % inner);
    const scalar_t* x = data + storage_offset(first, tensor.ndim, tensor.layout);
    for (index_t i = 0; i < count; ++i) out[i] = x[i * stride];
    out += count;
    first += count;
    n -= count;
  }
}

// The elements of one tile, contiguous.
template <class scalar_t>
const scalar_t* load_tile(const TensorDesc& tensor, const Tile& tile, std::vector<double>& gathered) {
  if (tensor.ndim == 0) return static_cast<const scalar_t*>(tensor.data) + tile.first;
  gathered.resize((kTileNumel * sizeof(scalar_t) + 7) / 8);
  scalar_t* out = reinterpret_cast<scalar_t*>(gathered.data());
  gather_run(tensor, tile.first, tile.numel, out);
  return out;
}

inline int bit_width(uint64_t x) {
  int n = 0;
  for (; x != 0; x >>= 1) ++n;
  return n;
}

}  // namespace cpu_topk_magnitude
}  // namespace saft
