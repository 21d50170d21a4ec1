// topk_magnitude / cpu: one read of the data, whatever k.
//
// Algorithm  guess and verify (Floyd & Rivest 1975; Monroe et al. 2011).
//   sample   a stratified sample brackets the k-th key: [bracket.lo, bracket.hi]
//   filter   the only full read. key > hi: sure; lo <= key <= hi: band. Per tile and per set, a list of
//            16-bit positions, or a bitmap once that is smaller; keys are kept for the band alone
//   verify   n_sure < k <= n_sure + n_band, both exact. If not, or if the band outgrew its budget: a radix
//            select over the data finds the exact key, and one more filter uses it as both bounds
//   select   the exact k-th key from the band
//   emit     per tile: sure + band keys above the threshold + the tile's share of the ties, which go to the
//            lowest positions by a scan over tiles
// Traffic    reads sizeof(scalar_t) B/elem once; writes 8 B per selected position. Workspace: at most 1 bit
//            per element and 6 B (10 B with fp64) per band element, band <= max(2^17, N / 64).
// Contract   the sample only steers: no guess, budget or schedule can change the answer.
// Threads    tiles are handed out dynamically; each result has a fixed place, so none depends on timing.

#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "cpu_parallel.h"
#include "topk_magnitude.h"
#include "topk_magnitude_filter.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace saft {
namespace {

constexpr index_t kTileWords = kTileNumel / 64;
constexpr uint32_t kListLimit = kTileNumel / 16;  // a longer u16 list is larger than the tile's bitmap
constexpr index_t kLineNumel = 16;                // sampled together: one 64-byte line of fp32
constexpr index_t kSampleLines = index_t(1) << 16;
constexpr index_t kSmallNumel = index_t(1) << 17;  // below this everything is band; no sample
constexpr index_t kBandShare = 64;                 // band budget = numel / kBandShare
// Half-width of the bracket in binomial standard deviations. Gradients are correlated along rows and
// columns: structured gradients gave rank errors up to 2.4 sigma with this sample.
constexpr double kSigmas = 6.0;
constexpr int kSampleBits = 16;
constexpr int kDigitBits = 11;

struct Tile {
  index_t tensor;
  index_t first;
  index_t numel;
};

template <class Key>
struct Bracket {
  Key lo, hi;
};

// A set of positions in a tile: a list or a bitmap, whichever is smaller.
struct PositionSet {
  uint32_t count = 0;
  const uint16_t* list = nullptr;
  const uint64_t* words = nullptr;
};

template <class Key>
struct Survivors {
  PositionSet sure, band;
  const Key* band_keys = nullptr;  // beside band.list; null when the bracket is a single key
  uint32_t num_greater = 0;        // band keys above the threshold
  uint32_t num_equal = 0;          // band keys equal to it
};

// Bump allocator; memory is untouched until used.
class Arena {
 public:
  template <class T>
  T* allocate(size_t n) {
    size_t bytes = (n * sizeof(T) + 15) / 16 * 16;
    if (bytes > available_) {
      available_ = std::max(bytes, kChunkBytes);
      chunks_.emplace_back(new std::byte[available_]);
      next_ = chunks_.back().get();
    }
    T* result = reinterpret_cast<T*>(next_);
    next_ += bytes;
    available_ -= bytes;
    return result;
  }

 private:
  static constexpr size_t kChunkBytes = size_t(1) << 20;
  std::vector<std::unique_ptr<std::byte[]>> chunks_;
  std::byte* next_ = nullptr;
  size_t available_ = 0;
};

// What one thread needs for one tile.
struct Scratch {
  alignas(64) uint64_t candidate[kTileWords];
  alignas(64) uint64_t sure[kTileWords];
  alignas(64) index_t expanded[64 * 64 + 8];
  std::vector<double> gathered;  // a strided tile, made contiguous; double for alignment
  index_t num_nonfinite = 0;
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

template <class scalar_t>
const scalar_t* load_tile(const TensorDesc& tensor, const Tile& tile, Scratch& scratch) {
  if (tensor.ndim == 0) return static_cast<const scalar_t*>(tensor.data) + tile.first;
  scratch.gathered.resize((kTileNumel * sizeof(scalar_t) + 7) / 8);
  scalar_t* out = reinterpret_cast<scalar_t*>(scratch.gathered.data());
  gather_run(tensor, tile.first, tile.numel, out);
  return out;
}

inline uint64_t splitmix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

inline int bit_width(uint64_t x) {
  int n = 0;
  for (; x != 0; x >>= 1) ++n;
  return n;
}

template <class Visit>
void for_each_bit(uint64_t word, const Visit& visit) {
  for (; word != 0; word &= word - 1) visit(count_trailing_zeros(word));
}

// Fresh pages cost more than the bytes written to them: ask for huge ones where the system leaves the choice.
void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(1) << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

template <class Key>
class TopKMagnitude {
 public:
  TopKMagnitude(const TensorDesc* tensors, index_t num_tensors, index_t k, int num_threads, Isa isa)
      : tensors_(tensors),
        num_tensors_(num_tensors),
        k_(k),
        num_threads_(std::max(1, num_threads)),
        isa_(isa),
        scratch_(size_t(num_threads_)) {
    for (index_t t = 0; t < num_tensors; ++t) {
      numel_ += tensors[t].numel;
      for (index_t first = 0; first < tensors[t].numel; first += kTileNumel) {
        tiles_.push_back({t, first, std::min(kTileNumel, tensors[t].numel - first)});
      }
    }
    run_ = std::min<index_t>(64, 1 + index_t(tiles_.size()) / (num_threads_ * 256));
    for (auto& scratch : scratch_) scratch = std::make_unique<Scratch>();
  }

  TopKResult run(index_t* indices, index_t* counts) {
    std::fill(counts, counts + num_tensors_, 0);
    Bracket<Key> bracket = sample_bracket();
    bool verified = filter(bracket) && num_sure_ < k_ && k_ <= num_sure_ + num_band_;
    if (!verified && k_ > 0) {
      const Key exact = radix_select({0, CommonKey<Key>::kNaN}, k_, data_visitor());
      bracket = {exact, exact};
      filter(bracket);
    }
    TopKResult result{std::numeric_limits<double>::infinity(), 0};
    for (const auto& scratch : scratch_) result.num_nonfinite += scratch->num_nonfinite;
    if (k_ == 0) return result;
    const Key threshold =
        bracket.lo == bracket.hi ? bracket.lo : radix_select(bracket, k_ - num_sure_, band_visitor());
    advise_huge_pages(indices, size_t(k_) * sizeof(index_t));
    emit(threshold, indices, counts);
    result.threshold = key_to_double(threshold);
    return result;
  }

 private:
  static double key_to_double(Key key) {
    if (key == CommonKey<Key>::kNaN) return std::numeric_limits<double>::quiet_NaN();
    if constexpr (sizeof(Key) == 8) {
      return bit_cast<double>(key);
    } else {
      return bit_cast<double>(double_bits_from_float_bits(key));
    }
  }

  template <class Fn>
  void for_each_tile(const Fn& fn) {
    parallel_for(index_t(tiles_.size()), run_, num_threads_, fn);
  }

  // ---- sample ----

  Bracket<Key> sample_bracket() {
    const Bracket<Key> everything{0, CommonKey<Key>::kNaN};
    if (k_ == 0) return {CommonKey<Key>::kNaN, CommonKey<Key>::kNaN};  // only counts non-finite elements
    if (numel_ <= kSmallNumel) return everything;
    std::vector<index_t> first_line(size_t(num_tensors_) + 1, 0);
    for (index_t t = 0; t < num_tensors_; ++t) {
      first_line[t + 1] = first_line[t] + (tensors_[t].numel + kLineNumel - 1) / kLineNumel;
    }
    const index_t num_lines = first_line[num_tensors_];
    const index_t num_sampled = std::min(num_lines, kSampleLines);
    const double stride = double(num_lines) / double(num_sampled);
    constexpr index_t kRun = 256;
    std::vector<std::vector<uint32_t>> histograms(static_cast<size_t>(num_threads_));
    std::vector<index_t> sampled(static_cast<size_t>(num_threads_), 0);
    parallel_for((num_sampled + kRun - 1) / kRun, 1, num_threads_, [&](index_t run, int thread) {
      auto& histogram = histograms[thread];
      if (histogram.empty()) histogram.assign(size_t(1) << kSampleBits, 0);
      const index_t end = std::min(num_sampled, (run + 1) * kRun);
      index_t line[kRun], tensor[kRun];
      index_t t = 0;
      for (index_t j = run * kRun; j < end; ++j) {
        const double jitter = double(splitmix64(uint64_t(j)) >> 11) * 0x1p-53;
        const index_t l = std::min(num_lines - 1, index_t((double(j) + jitter) * stride));
        if (t == 0 || l >= first_line[t + 1]) {
          t = std::upper_bound(first_line.begin(), first_line.end(), l) - first_line.begin() - 1;
        }
        line[j - run * kRun] = l - first_line[t];
        tensor[j - run * kRun] = t;
        prefetch_line(tensors_[t], l - first_line[t]);
      }
      for (index_t j = 0; j < end - run * kRun; ++j) {
        sampled[thread] += add_line(tensors_[tensor[j]], line[j], histogram.data());
      }
    });
    index_t num_keys = 0;
    for (index_t n : sampled) num_keys += n;

    const double share = double(k_) / double(numel_);
    const double rank = share * double(num_keys);
    const double margin = kSigmas * std::sqrt(rank * (1 - share)) + kSigmas * kSigmas / 2;
    return {key_at_rank(histograms, rank + margin, num_keys).lo,
            key_at_rank(histograms, rank - margin, num_keys).hi};
  }

  static void prefetch_line(const TensorDesc& tensor, index_t line) {
    if (tensor.ndim != 0) return;
    const index_t size = tensor.dtype == ScalarType::kFloat32   ? 4
                         : tensor.dtype == ScalarType::kFloat64 ? 8
                                                                : 2;
    __builtin_prefetch(static_cast<const char*>(tensor.data) + line * kLineNumel * size);
  }

  static index_t add_line(const TensorDesc& tensor, index_t line, uint32_t* histogram) {
    const index_t first = line * kLineNumel;
    const index_t n = std::min(kLineNumel, tensor.numel - first);
    dispatch(tensor.dtype, [&](auto tag) {
      using scalar_t = typename decltype(tag)::type;
      scalar_t gathered[kLineNumel];
      const scalar_t* x = static_cast<const scalar_t*>(tensor.data) + first;
      if (tensor.ndim != 0) {
        gather_run(tensor, first, n, gathered);
        x = gathered;
      }
      for (index_t i = 0; i < n; ++i) {
        ++histogram[widen_key<Key, scalar_t>(native_key(x[i])) >> (CommonKey<Key>::kBits - kSampleBits)];
      }
    });
    return n;
  }

  // The bin that holds descending rank `rank` of the sample: 0 or less means above all, num_keys or more
  // below all.
  static Bracket<Key> key_at_rank(const std::vector<std::vector<uint32_t>>& histograms, double rank,
                                  index_t num_keys) {
    constexpr int shift = CommonKey<Key>::kBits - kSampleBits;
    if (rank < 1) return {CommonKey<Key>::kNaN, CommonKey<Key>::kNaN};
    if (rank >= double(num_keys)) return {0, 0};
    index_t above = 0;
    for (Key bin = Key(1) << kSampleBits; bin-- > 0;) {
      for (const auto& histogram : histograms) above += histogram.empty() ? 0 : histogram[bin];
      if (double(above) >= rank) return {Key(bin << shift), Key(((bin + 1) << shift) - 1)};
    }
    return {0, 0};
  }

  // ---- filter ----

  // Fills survivors_, num_sure_, num_band_. False: the band outgrew its budget and the pass was abandoned.
  bool filter(Bracket<Key> bracket) {
    const bool keep_keys = bracket.lo != bracket.hi;
    const index_t budget = std::max(kSmallNumel, numel_ / kBandShare);
    std::atomic<index_t> num_sure{0}, num_band{0};
    survivors_.assign(tiles_.size(), {});
    arenas_ = std::vector<Arena>(size_t(num_threads_));
    for (auto& scratch : scratch_) scratch->num_nonfinite = 0;
    const auto overflow = [&] { return keep_keys && num_band.load(std::memory_order_relaxed) > budget; };
    for_each_tile([&](index_t t, int thread) {
      if (overflow()) return;
      const Tile& tile = tiles_[t];
      dispatch(tensors_[tile.tensor].dtype, [&](auto tag) {
        using scalar_t = typename decltype(tag)::type;
        Scratch& scratch = *scratch_[thread];
        const scalar_t* x = load_tile<scalar_t>(tensors_[tile.tensor], tile, scratch);
        const FilterCounts counts = filter_tile(x, tile.numel, bracket, scratch);
        const index_t num_tile_band = counts.num_candidate - counts.num_sure;
        num_sure.fetch_add(counts.num_sure, std::memory_order_relaxed);
        num_band.fetch_add(num_tile_band, std::memory_order_relaxed);
        if (counts.any_nonfinite) scratch.num_nonfinite += count_nonfinite(x, tile.numel);
        if (!overflow()) store_survivors(x, counts, keep_keys, scratch, arenas_[thread], survivors_[t]);
      });
    });
    num_sure_ = num_sure;
    num_band_ = num_band;
    return !overflow();
  }

  template <class scalar_t>
  FilterCounts filter_tile(const scalar_t* x, index_t n, Bracket<Key> bracket, Scratch& scratch) {
    using key_t = typename KeyTraits<scalar_t>::key_t;
    using skey_t = signed_key_t<scalar_t>;
    const FilterThresholds<scalar_t> above{
        skey_t(key_t(first_native_key<Key, scalar_t>(bracket.lo) - 1)),
        skey_t(key_t(first_native_key<Key, scalar_t>(bracket.hi + 1) - 1))};
    const index_t full = n / 64;
    FilterCounts counts = saft::filter(isa_, x, full, above, scratch.candidate, scratch.sure);
    if (const index_t rest = n - full * 64) {
      scalar_t tail[64] = {};
      std::copy_n(x + full * 64, rest, tail);
      uint64_t& candidate = scratch.candidate[full];
      uint64_t& sure = scratch.sure[full];
      const FilterCounts in_tail = filter_baseline(tail, 1, above, &candidate, &sure);
      const uint64_t padding = ~uint64_t(0) << rest;
      // the padding is zeros: all of it passes a threshold, or none
      counts.num_candidate += in_tail.num_candidate - (candidate & padding ? 64 - rest : 0);
      counts.num_sure += in_tail.num_sure - (sure & padding ? 64 - rest : 0);
      counts.any_nonfinite |= in_tail.any_nonfinite;
      candidate &= ~padding;
      sure &= ~padding;
    }
    const index_t words = (n + 63) / 64;
    std::fill(scratch.candidate + words, scratch.candidate + kTileWords, 0);
    std::fill(scratch.sure + words, scratch.sure + kTileWords, 0);
    return counts;
  }

  template <class scalar_t>
  static index_t count_nonfinite(const scalar_t* x, index_t n) {
    index_t count = 0;
    for (index_t i = 0; i < n; ++i) count += native_key(x[i]) >= KeyTraits<scalar_t>::kInf;
    return count;
  }

  template <class scalar_t>
  static void store_survivors(const scalar_t* x, const FilterCounts& counts, bool keep_keys, Scratch& scratch,
                              Arena& arena, Survivors<Key>& out) {
    uint64_t* band = scratch.candidate;  // sure is a subset of candidate; what is left is the band
    for (index_t w = 0; w < kTileWords; ++w) band[w] &= ~scratch.sure[w];
    const uint32_t num_band = uint32_t(counts.num_candidate - counts.num_sure);
    out.sure = store_positions(scratch.sure, uint32_t(counts.num_sure), false, arena);
    out.band = store_positions(band, num_band, keep_keys, arena);
    if (keep_keys && num_band > 0) {
      Key* keys = arena.allocate<Key>(num_band);
      for (uint32_t i = 0; i < num_band; ++i) {
        keys[i] = widen_key<Key, scalar_t>(native_key(x[out.band.list[i]]));
      }
      out.band_keys = keys;
    }
  }

  static PositionSet store_positions(const uint64_t* words, uint32_t count, bool as_list, Arena& arena) {
    PositionSet set;
    set.count = count;
    if (count == 0) return set;
    if (as_list || count <= kListLimit) {
      uint16_t* list = arena.allocate<uint16_t>(count);
      set.list = list;
      for (index_t w = 0; w < kTileWords; ++w) {
        for_each_bit(words[w], [&](int bit) { *list++ = uint16_t(w * 64 + bit); });
      }
    } else {
      uint64_t* copy = arena.allocate<uint64_t>(kTileWords);
      std::copy_n(words, kTileWords, copy);
      set.words = copy;
    }
    return set;
  }

  // ---- select ----

  // Visitors call fn(key) for the keys of one tile.
  auto band_visitor() {
    return [this](index_t t, int, const auto& fn) {
      const Survivors<Key>& tile = survivors_[t];
      for (uint32_t i = 0; i < tile.band.count; ++i) fn(tile.band_keys[i]);
    };
  }

  auto data_visitor() {
    return [this](index_t t, int thread, const auto& fn) {
      const Tile& tile = tiles_[t];
      dispatch(tensors_[tile.tensor].dtype, [&](auto tag) {
        using scalar_t = typename decltype(tag)::type;
        const scalar_t* x = load_tile<scalar_t>(tensors_[tile.tensor], tile, *scratch_[thread]);
        for (index_t i = 0; i < tile.numel; ++i) fn(widen_key<Key, scalar_t>(native_key(x[i])));
      });
    };
  }

  // The key of descending rank `rank` (1 = largest) among the visited keys inside the bracket.
  template <class Visitor>
  Key radix_select(Bracket<Key> bracket, index_t rank, const Visitor& visit_tile) {
    while (bracket.lo != bracket.hi) {
      const int shift = std::max(0, bit_width(bracket.hi - bracket.lo) - kDigitBits);
      std::vector<std::vector<index_t>> histograms(static_cast<size_t>(num_threads_),
                                                   std::vector<index_t>(size_t(1) << kDigitBits, 0));
      for_each_tile([&](index_t t, int thread) {
        index_t* histogram = histograms[thread].data();
        visit_tile(t, thread, [&](Key key) {
          if (key >= bracket.lo && key <= bracket.hi) ++histogram[(key - bracket.lo) >> shift];
        });
      });
      Key digit = Key((bracket.hi - bracket.lo) >> shift);
      for (;; --digit) {
        index_t in_bin = 0;
        for (const auto& histogram : histograms) in_bin += histogram[digit];
        if (rank <= in_bin || digit == 0) break;
        rank -= in_bin;
      }
      bracket.lo = Key(bracket.lo + (digit << shift));
      bracket.hi = std::min(bracket.hi, Key(bracket.lo + ((Key(1) << shift) - 1)));
    }
    return bracket.lo;
  }

  // ---- emit ----

  void emit(Key threshold, index_t* indices, index_t* counts) {
    for_each_tile([&](index_t t, int) {
      Survivors<Key>& tile = survivors_[t];
      if (tile.band_keys == nullptr) {
        tile.num_equal = tile.band.count;  // the bracket is the threshold
        return;
      }
      for (uint32_t i = 0; i < tile.band.count; ++i) {
        tile.num_greater += tile.band_keys[i] > threshold;
        tile.num_equal += tile.band_keys[i] == threshold;
      }
    });
    index_t ties = k_ - num_sure_;  // wanted among the elements equal to the threshold
    for (const auto& tile : survivors_) ties -= tile.num_greater;
    std::vector<index_t> offsets(tiles_.size() + 1, 0);
    for (size_t t = 0; t < tiles_.size(); ++t) {
      Survivors<Key>& tile = survivors_[t];
      tile.num_equal = uint32_t(std::min<index_t>(tile.num_equal, ties));  // from here on: to take
      ties -= tile.num_equal;
      const index_t selected = index_t(tile.sure.count) + tile.num_greater + tile.num_equal;
      offsets[t + 1] = offsets[t] + selected;
      counts[tiles_[t].tensor] += selected;
    }
    for_each_tile([&](index_t t, int thread) {
      if (offsets[t + 1] == offsets[t]) return;
      emit_tile(tiles_[t].first, survivors_[t], threshold, *scratch_[thread], indices + offsets[t]);
    });
  }

  // Calls fn(position), ascending, for the band's share of the selection.
  template <class Fn>
  static void for_each_band_winner(const Survivors<Key>& tile, Key threshold, const Fn& fn) {
    uint32_t ties = tile.num_equal;
    if (tile.band.words != nullptr) {
      for (index_t w = 0; w < kTileWords && ties > 0; ++w) {
        for (uint64_t word = tile.band.words[w]; word != 0 && ties > 0; word &= word - 1, --ties) {
          fn(uint16_t(w * 64 + count_trailing_zeros(word)));
        }
      }
      return;
    }
    for (uint32_t i = 0; i < tile.band.count; ++i) {
      const bool equal = tile.band_keys == nullptr || tile.band_keys[i] == threshold;
      if (equal ? ties > 0 : tile.band_keys[i] > threshold) {
        fn(tile.band.list[i]);
        ties -= equal;
      }
    }
  }

  void emit_tile(index_t first, const Survivors<Key>& tile, Key threshold, Scratch& scratch,
                 index_t* out) const {
    if (tile.sure.words == nullptr && tile.num_greater + tile.num_equal <= kListLimit) {
      const uint16_t* sure = tile.sure.list;
      const uint16_t* const end = sure + tile.sure.count;
      for_each_band_winner(tile, threshold, [&](uint16_t position) {
        while (sure != end && *sure < position) *out++ = first + *sure++;
        *out++ = first + position;
      });
      while (sure != end) *out++ = first + *sure++;
      return;
    }
    uint64_t* words = scratch.sure;
    if (tile.sure.words != nullptr) {
      std::copy_n(tile.sure.words, kTileWords, words);
    } else {
      std::fill_n(words, kTileWords, 0);
      for (uint32_t i = 0; i < tile.sure.count; ++i) {
        words[tile.sure.list[i] / 64] |= uint64_t(1) << (tile.sure.list[i] % 64);
      }
    }
    for_each_band_winner(tile, threshold,
                         [&](uint16_t position) { words[position / 64] |= uint64_t(1) << (position % 64); });
    const ExpandFn expand = expand_fn(isa_);
    for (index_t w = 0; w < kTileWords; w += 64) {
      // expand overruns its count; the next tile's output is another thread's
      const index_t n = expand(words + w, 64, first + w * 64, scratch.expanded);
      out = std::copy_n(scratch.expanded, n, out);
    }
  }

  const TensorDesc* tensors_;
  index_t num_tensors_;
  index_t k_;
  int num_threads_;
  Isa isa_;
  index_t numel_ = 0;
  index_t run_ = 1;
  std::vector<Tile> tiles_;
  std::vector<std::unique_ptr<Scratch>> scratch_;
  std::vector<Survivors<Key>> survivors_;
  std::vector<Arena> arenas_;
  index_t num_sure_ = 0;
  index_t num_band_ = 0;
};

}  // namespace

TopKResult topk_magnitude_cpu(const TensorDesc* tensors, index_t num_tensors, index_t k, index_t* indices,
                              index_t* counts, int num_threads, int isa) {
  const bool any_double = std::any_of(tensors, tensors + num_tensors, [](const TensorDesc& tensor) {
    return tensor.dtype == ScalarType::kFloat64;
  });
  const auto run = [&](auto key) {
    return TopKMagnitude<decltype(key)>(tensors, num_tensors, k, num_threads, resolve_isa(isa))
        .run(indices, counts);
  };
  return any_double ? run(uint64_t{}) : run(uint32_t{});
}

}  // namespace saft
