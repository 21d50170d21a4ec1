// topk_magnitude / cpu: one read of the data, whatever k.
//
// Algorithm  guess and verify (Floyd & Rivest 1975; Monroe et al. 2011).
//   sample   a stratified sample brackets the k-th key: [bracket.lo, bracket.hi]; looked at again where few
//            distinct keys, or one that most elements share, make a wide band
//   filter   the only full read. key > hi: sure; lo <= key <= hi: band. Per tile: lists of 16-bit positions
//   when few
//            survivors are expected, else a bitmap of the sure ones; keys are kept for the band alone
//   verify   n_sure < k <= n_sure + n_band, both exact. If not, or if a list outgrew its budget: a radix
//   select over
//            the data finds the exact key, and one more filter uses it as both bounds
//   select   the exact k-th key from the band
//   emit     per tile: sure + band keys above the threshold + the tile's share of the ties, which go to the
//   lowest
//            positions by a scan over tiles
// Traffic    reads sizeof(scalar_t) B/elem once; writes 8 B per selected position. Workspace: lists of 2 B
// per survivor
//            (at most N / 16 of them) or 1 bit per element; 6 B (10 B with fp64) per band element (at most N
//            / 64); 1 bit per element more when a single key is the whole bracket.
// Contract   the sample only steers: no guess, budget or schedule can change the answer.
// Threads    tiles are handed out dynamically; each result has a fixed place, so none depends on timing.

#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "cpu_parallel.h"
#include "topk_magnitude.h"
#include "topk_magnitude_compare.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace saft {
namespace {

constexpr index_t kTileWords = kTileNumel / 64;
constexpr index_t kBlockWords = 16;                // compared, then scanned, while its 4 KB of fp32 are in L1
constexpr index_t kLineNumel = 16;                 // sampled together: one 64-byte line of fp32
constexpr index_t kSmallNumel = index_t(1) << 17;  // up to here everything is band; no sample
// Tuned on 2 cores of an AMD EPYC (Zen 3), 2026-11-24.
constexpr double kListShare = 1.0 / 32;  // expect fewer survivors than this: lists; more: bitmaps
constexpr index_t kListBudget = 16;      // lists hold at most numel / kListBudget survivors
constexpr index_t kBandBudget = 64;      // band keys: at most numel / kBandBudget
constexpr index_t kMinSample = index_t(1) << 16, kMaxSample = index_t(1) << 20;  // elements
// Half-width of the bracket in binomial standard deviations. Gradients are correlated along rows and columns:
// structured gradients gave rank errors up to 2.4 sigma with this sample.
constexpr double kSigmas = 6.0;
constexpr int kSampleBits = 16;
constexpr double kNarrowBand =
    0.95 / kBandBudget;       // a band of a larger share of the sample is looked at again
constexpr int kMaxLooks = 4;  // 16 bits each: a 63-bit key
constexpr int kDigitBits = 11;

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
// key, a list or a bitmap without.
template <class Key>
struct Survivors {
  uint32_t num_sure = 0;
  uint32_t num_band = 0;
  uint32_t num_greater = 0;  // band keys above the threshold
  uint32_t num_equal = 0;    // band keys equal to it
  const uint16_t* sure_list = nullptr;
  const uint64_t* sure_words = nullptr;
  const uint16_t* band_list = nullptr;
  const uint64_t* band_words = nullptr;
  const Key* band_keys = nullptr;
};

// A growing array that never moves: room for one more tile is reserved, then what was used is kept.
template <class T>
class Slab {
 public:
  T* reserve(size_t n) {
    if (n > available_) {
      available_ = std::max(n, kChunkBytes / sizeof(T));
      chunks_.emplace_back(new T[available_]);  // untouched until written
      next_ = chunks_.back().get();
    }
    return next_;
  }
  void keep(size_t n) {
    next_ += n;
    available_ -= n;
  }

 private:
  static constexpr size_t kChunkBytes = size_t(1) << 20;
  std::vector<std::unique_ptr<T[]>> chunks_;
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
        isa_(isa) {
    for (index_t t = 0; t < num_tensors; ++t) {
      numel_ += tensors[t].numel;
      for (index_t first = 0; first < tensors[t].numel; first += kTileNumel) {
        tiles_.push_back({t, first, std::min(kTileNumel, tensors[t].numel - first)});
      }
    }
    num_threads_ = int(std::min<index_t>(num_threads_, std::max<index_t>(1, index_t(tiles_.size()))));
    run_ = std::min<index_t>(64, 1 + index_t(tiles_.size()) / (num_threads_ * 256));
    for (int i = 0; i < num_threads_; ++i) workspaces_.push_back(std::make_unique<Workspace<Key>>());
  }

  TopKResult run(index_t* indices, index_t* counts) {
    std::fill(counts, counts + num_tensors_, 0);
    Bracket<Key> bracket = sample_bracket();
    bool verified = filter(bracket) && num_sure_ < k_ && k_ <= num_sure_ + num_band_;
    if (!verified && k_ > 0) {
      const Key exact = radix_select(0, CommonKey<Key>::kNaN, k_, data_visitor());
      bracket = {exact, exact, 1.0};
      filter(bracket);
    }
    TopKResult result{std::numeric_limits<double>::infinity(), 0};
    for (const auto& workspace : workspaces_) result.num_nonfinite += workspace->num_nonfinite;
    if (k_ == 0) return result;
    const Key threshold = radix_select(bracket.lo, bracket.hi, k_ - num_sure_, band_visitor());
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

  // The best sample size: reading more of it costs as much as the narrower band saves.
  index_t sample_numel() const {
    const double share = double(k_) / double(numel_);
    const double best = std::pow(9.0 * double(numel_) * std::sqrt(share), 2.0 / 3.0);
    return std::clamp(index_t(best), kMinSample, kMaxSample);
  }

  Bracket<Key> sample_bracket() {
    constexpr Key kNaN = CommonKey<Key>::kNaN;
    if (k_ == 0) return {kNaN, kNaN, 1.0};  // only counts non-finite elements: no list, no budget
    if (numel_ <= kSmallNumel) return {0, kNaN, 0.0};
    std::vector<index_t> first_line(size_t(num_tensors_) + 1, 0);
    for (index_t t = 0; t < num_tensors_; ++t) {
      first_line[t + 1] = first_line[t] + (tensors_[t].numel + kLineNumel - 1) / kLineNumel;
    }
    // Narrowed until the band is small: bins of the first histogram are too wide for data with few distinct
    // keys, or one that most elements share.
    Bracket<Key> bracket{0, kNaN, 1.0};
    index_t num_above = 0;  // sampled keys above the bracket
    for (int look = 1;; ++look) {
      const int shift = std::max(0, bit_width(bracket.hi - bracket.lo) - kSampleBits);
      const SampleHistogram sample = sample_keys(first_line, bracket.lo, bracket.hi, shift);
      const double num_keys = double(sample.num_keys);
      const double share = double(k_) / double(numel_);
      const double rank = share * num_keys;
      const double margin = kSigmas * std::sqrt(rank * (1 - share)) + kSigmas * kSigmas / 2;
      const auto first_key = [&](Key bin) { return Key(bracket.lo + (bin << shift)); };
      Key lo = bracket.lo, hi = bracket.hi;
      // a rank above the sample's first leaves the upper bound open, unless the band is too large that way
      bool has_hi = look == 1 && rank - margin < 1;
      index_t reached = num_above;  // sampled keys in this bin and above
      for (Key bin = Key((bracket.hi - bracket.lo) >> shift);; --bin) {
        const index_t before = reached;
        reached += sample.counts[bin];
        // a bin too large for the band stays out of it, unless it has the rank itself; if a look has not
        // helped, it is then all of the band
        const bool is_large = double(reached - before) >= kNarrowBand * num_keys;
        if (look > 1 && is_large && double(before) < rank && rank <= double(reached)) {
          lo = first_key(bin);
          hi = std::min(bracket.hi, Key(lo + ((Key(1) << shift) - 1)));
          num_above = before;
          break;
        }
        if (!has_hi && reached > 0 && double(reached) >= rank - margin &&
            !(is_large && double(reached) < rank)) {
          hi = std::min(bracket.hi, Key(first_key(bin) + ((Key(1) << shift) - 1)));
          num_above = before;
          has_hi = true;
        }
        const bool is_last = double(reached) >= rank + margin && rank + margin < num_keys;
        if (is_last || bin == 0) {
          const bool leave_out = is_large && double(before) >= rank && before > num_above;
          if (leave_out) reached = before;
          if (is_last || leave_out) lo = first_key(bin + leave_out);
          break;
        }
      }
      bracket = {lo, hi, double(reached) / num_keys};
      const bool is_narrow = double(reached - num_above) < kNarrowBand * num_keys;
      if (is_narrow || shift == 0 || look == kMaxLooks) return bracket;
    }
  }

  struct SampleHistogram {
    std::vector<index_t> counts;  // of (key - lo) >> shift, for keys in [lo, hi]
    index_t num_keys;             // sampled, inside or outside
  };

  SampleHistogram sample_keys(const std::vector<index_t>& first_line, Key lo, Key hi, int shift) const {
    const index_t num_lines = first_line[num_tensors_];
    const index_t num_sampled = std::min(num_lines, sample_numel() / kLineNumel);
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
        sampled[thread] += add_line(tensors_[tensor[j]], line[j], lo, hi, shift, histogram.data());
      }
    });
    SampleHistogram sum{std::vector<index_t>(size_t(1) << kSampleBits, 0), 0};
    for (size_t thread = 0; thread < histograms.size(); ++thread) {
      for (size_t bin = 0; bin < histograms[thread].size(); ++bin) sum.counts[bin] += histograms[thread][bin];
      sum.num_keys += sampled[thread];
    }
    return sum;
  }

  static void prefetch_line(const TensorDesc& tensor, index_t line) {
    if (tensor.ndim != 0) return;
    const index_t size = tensor.dtype == ScalarType::kFloat32   ? 4
                         : tensor.dtype == ScalarType::kFloat64 ? 8
                                                                : 2;
    __builtin_prefetch(static_cast<const char*>(tensor.data) + line * kLineNumel * size);
  }

  static index_t add_line(const TensorDesc& tensor, index_t line, Key lo, Key hi, int shift,
                          uint32_t* histogram) {
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
        const Key key = widen_key<Key, scalar_t>(native_key(x[i]));
        if (key >= lo && key <= hi) ++histogram[(key - lo) >> shift];
      }
    });
    return n;
  }

  // ---- filter ----

  // Fills survivors_, num_sure_, num_band_. False: a budget was outgrown and the pass was abandoned.
  bool filter(const Bracket<Key>& bracket) {
    const bool lists = bracket.survivor_share < kListShare;
    const bool keep_keys = lists || bracket.lo != bracket.hi;
    const index_t budget = std::max(kSmallNumel, numel_ / kListBudget);
    const index_t band_budget = std::max(kSmallNumel, numel_ / kBandBudget);
    std::atomic<index_t> num_sure{0}, num_band{0};
    survivors_.assign(tiles_.size(), {});
    for (auto& workspace : workspaces_) workspace->clear();
    const std::tuple<Thresholds<float>, Thresholds<bfloat16>, Thresholds<float16>, Thresholds<double>>
        thresholds(bracket, bracket, bracket, bracket);
    const auto outgrown = [&] {
      const index_t band = num_band.load(std::memory_order_relaxed);
      return (keep_keys && band > band_budget) ||
             (lists && num_sure.load(std::memory_order_relaxed) + band > budget);
    };
    for_each_tile([&](index_t t, int thread) {
      if (outgrown()) return;
      const Tile& tile = tiles_[t];
      const TensorDesc& tensor = tensors_[tile.tensor];
      Workspace<Key>& workspace = *workspaces_[thread];
      Survivors<Key>& out = survivors_[t];
      dispatch(tensor.dtype, [&](auto tag) {
        using scalar_t = typename decltype(tag)::type;
        const scalar_t* x = load_tile<scalar_t>(tensor, tile, workspace.gathered);
        const auto& above = std::get<Thresholds<scalar_t>>(thresholds);
        if (lists) {
          filter_to_lists(x, tile.numel, above, workspace, out);
        } else {
          filter_to_words(x, tile.numel, above, keep_keys, workspace, out);
        }
      });
      num_sure.fetch_add(out.num_sure, std::memory_order_relaxed);
      num_band.fetch_add(out.num_band, std::memory_order_relaxed);
    });
    num_sure_ = num_sure;
    num_band_ = num_band;
    return !outgrown();
  }

  // The bracket in a tensor's own keys.
  template <class scalar_t>
  struct Thresholds {
    using key_t = typename KeyTraits<scalar_t>::key_t;
    signed_key_t<scalar_t> candidate, sure;
    explicit Thresholds(const Bracket<Key>& bracket)
        : candidate(signed_key_t<scalar_t>(key_t(first_native_key<Key, scalar_t>(bracket.lo) - 1))),
          sure(signed_key_t<scalar_t>(key_t(first_native_key<Key, scalar_t>(bracket.hi + 1) - 1))) {}
  };

  // Compares up to kBlockWords words from x[first]; bits past the end of the tile are cleared.
  template <bool kCheckFinite, class scalar_t>
  bool compare_block(const scalar_t* x, index_t first, index_t n, signed_key_t<scalar_t> above,
                     uint64_t* words) const {
    const index_t count = std::min(n - first, kBlockWords * 64);
    bool nonfinite = compare<kCheckFinite>(isa_, x + first, count / 64, above, words);
    if (const index_t rest = count % 64) {
      scalar_t tail[64] = {};
      std::copy_n(x + first + count - rest, rest, tail);
      uint64_t& word = words[count / 64];
      nonfinite |= compare_baseline<kCheckFinite>(tail, 1, above, &word);
      word &= ~(~uint64_t(0) << rest);
    }
    return nonfinite;
  }

  // Calls visit(bit) for the set bits of up to kBlockWords sparse words, ascending. Empty words are left out
  // first: skipping them one by one would mispredict.
  template <class Visit>
  static void visit_bits(const uint64_t* words, index_t num_words, const Visit& visit) {
    uint8_t occupied[kBlockWords];
    uint32_t num_occupied = 0;
    for (index_t w = 0; w < num_words; ++w) {
      occupied[num_occupied] = uint8_t(w);
      num_occupied += words[w] != 0;
    }
    for (uint32_t i = 0; i < num_occupied; ++i) {
      uint64_t word = words[occupied[i]];
      do {
        visit(index_t(occupied[i]) * 64 + __builtin_ctzll(word));
        word &= word - 1;
      } while (word != 0);
    }
  }

  template <class scalar_t>
  void filter_to_lists(const scalar_t* x, index_t n, const Thresholds<scalar_t>& above,
                       Workspace<Key>& workspace, Survivors<Key>& out) const {
    using key_t = typename KeyTraits<scalar_t>::key_t;
    uint16_t* sure = workspace.positions.reserve(size_t(n) + 1);
    uint16_t* band = workspace.band_positions.reserve(size_t(n) + 1);
    Key* band_keys = workspace.band_keys.reserve(size_t(n) + 1);
    uint32_t num_sure = 0, num_band = 0;
    index_t num_nonfinite = 0;
    // inf and NaN are survivors, unless the bracket starts above inf
    const signed_key_t<scalar_t> candidate = std::min(above.candidate, kBelowInf<scalar_t>);
    for (index_t first = 0; first < n; first += kBlockWords * 64) {
      uint64_t words[kBlockWords];
      compare_block<false>(x, first, n, candidate, words);
      visit_bits(words, std::min(kBlockWords, (n - first + 63) / 64), [&](index_t bit) {
        // written to both lists, kept in one or none: no branch on the data
        const index_t position = first + bit;
        const key_t key = native_key(x[position]);
        const bool is_candidate = signed_key_t<scalar_t>(key) > above.candidate;
        const bool is_sure = signed_key_t<scalar_t>(key) > above.sure;
        sure[num_sure] = uint16_t(position);
        num_sure += is_sure;
        band[num_band] = uint16_t(position);
        band_keys[num_band] = widen_key<Key, scalar_t>(key);
        num_band += is_candidate && !is_sure;
        num_nonfinite += key >= KeyTraits<scalar_t>::kInf;
      });
    }
    out.num_sure = num_sure;
    out.num_band = num_band;
    out.sure_list = sure;
    out.band_list = band;
    out.band_keys = band_keys;
    workspace.positions.keep(num_sure);
    workspace.band_positions.keep(num_band);
    workspace.band_keys.keep(num_band);
    workspace.num_nonfinite += num_nonfinite;
  }

  template <class scalar_t>
  void filter_to_words(const scalar_t* x, index_t n, const Thresholds<scalar_t>& above, bool keep_keys,
                       Workspace<Key>& workspace, Survivors<Key>& out) const {
    const index_t num_words = (n + 63) / 64;
    uint64_t* sure = workspace.words.reserve(size_t(num_words));
    workspace.words.keep(size_t(num_words));
    uint64_t* band = keep_keys ? workspace.scratch_words : workspace.words.reserve(size_t(num_words));
    if (!keep_keys) workspace.words.keep(size_t(num_words));
    uint16_t* list = keep_keys ? workspace.band_positions.reserve(size_t(n)) : nullptr;
    Key* keys = keep_keys ? workspace.band_keys.reserve(size_t(n)) : nullptr;
    uint32_t num_band = 0;
    bool nonfinite = false;
    for (index_t first = 0; first < num_words; first += kBlockWords) {
      nonfinite |= compare_block<true>(x, first * 64, n, above.candidate, band + first);
      compare_block<false>(x, first * 64, n, above.sure, sure + first);
      const index_t last = std::min(num_words, first + kBlockWords);
      for (index_t w = first; w < last; ++w) band[w] &= ~sure[w];
      if (!keep_keys) continue;
      visit_bits(band + first, last - first, [&](index_t bit) {
        const index_t position = first * 64 + bit;
        list[num_band] = uint16_t(position);
        keys[num_band] = widen_key<Key, scalar_t>(native_key(x[position]));
        ++num_band;
      });
    }
    out.num_sure = uint32_t(count_bits(isa_, sure, num_words));
    out.num_band = keep_keys ? num_band : uint32_t(count_bits(isa_, band, num_words));
    out.sure_words = sure;
    if (keep_keys) {
      workspace.band_positions.keep(num_band);
      workspace.band_keys.keep(num_band);
      out.band_list = list;
      out.band_keys = keys;
    } else {
      out.band_words = band;
    }
    if (nonfinite) {
      for (index_t i = 0; i < n; ++i)
        workspace.num_nonfinite += native_key(x[i]) >= KeyTraits<scalar_t>::kInf;
    }
  }

  // ---- select ----

  // Visitors call fn(key) for the keys of one tile.
  auto band_visitor() {
    return [this](index_t t, int, const auto& fn) {
      const Survivors<Key>& tile = survivors_[t];
      for (uint32_t i = 0; i < tile.num_band; ++i) fn(tile.band_keys[i]);
    };
  }

  auto data_visitor() {
    return [this](index_t t, int thread, const auto& fn) {
      const Tile& tile = tiles_[t];
      dispatch(tensors_[tile.tensor].dtype, [&](auto tag) {
        using scalar_t = typename decltype(tag)::type;
        const scalar_t* x = load_tile<scalar_t>(tensors_[tile.tensor], tile, workspaces_[thread]->gathered);
        for (index_t i = 0; i < tile.numel; ++i) fn(widen_key<Key, scalar_t>(native_key(x[i])));
      });
    };
  }

  // The key of descending rank `rank` (1 = largest) among the visited keys in [lo, hi].
  template <class Visitor>
  Key radix_select(Key lo, Key hi, index_t rank, const Visitor& visit_tile) {
    while (lo != hi) {
      const int shift = std::max(0, bit_width(hi - lo) - kDigitBits);
      std::vector<std::vector<index_t>> histograms(static_cast<size_t>(num_threads_),
                                                   std::vector<index_t>(size_t(1) << kDigitBits, 0));
      for_each_tile([&](index_t t, int thread) {
        index_t* histogram = histograms[thread].data();
        visit_tile(t, thread, [&](Key key) {
          if (key >= lo && key <= hi) ++histogram[(key - lo) >> shift];
        });
      });
      Key digit = Key((hi - lo) >> shift);
      for (;; --digit) {
        index_t in_bin = 0;
        for (const auto& histogram : histograms) in_bin += histogram[digit];
        if (rank <= in_bin || digit == 0) break;
        rank -= in_bin;
      }
      lo = Key(lo + (digit << shift));
      hi = std::min(hi, Key(lo + ((Key(1) << shift) - 1)));
    }
    return lo;
  }

  // ---- emit ----

  void emit(Key threshold, index_t* indices, index_t* counts) {
    for_each_tile([&](index_t t, int) {
      Survivors<Key>& tile = survivors_[t];
      if (tile.band_keys == nullptr) {
        tile.num_equal = tile.num_band;  // the bracket is the threshold
        return;
      }
      for (uint32_t i = 0; i < tile.num_band; ++i) {
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
      const index_t selected = index_t(tile.num_sure) + tile.num_greater + tile.num_equal;
      offsets[t + 1] = offsets[t] + selected;
      counts[tiles_[t].tensor] += selected;
    }
    for_each_tile([&](index_t t, int thread) {
      if (offsets[t + 1] == offsets[t]) return;
      emit_tile(tiles_[t], survivors_[t], threshold, *workspaces_[thread], indices + offsets[t]);
    });
  }

  // Calls fn(position), ascending, for the band's share of the selection.
  template <class Fn>
  static void for_each_band_winner(const Survivors<Key>& tile, Key threshold, const Fn& fn) {
    uint32_t ties = tile.num_equal;
    if (tile.band_words != nullptr) {
      for (index_t w = 0; ties > 0; ++w) {
        for (uint64_t word = tile.band_words[w]; word != 0 && ties > 0; word &= word - 1, --ties) {
          fn(uint16_t(w * 64 + __builtin_ctzll(word)));
        }
      }
      return;
    }
    uint32_t left = ties + tile.num_greater;
    for (uint32_t i = 0; left > 0; ++i) {
      const bool equal = tile.band_keys[i] == threshold;
      if (equal ? ties > 0 : tile.band_keys[i] > threshold) {
        fn(tile.band_list[i]);
        ties -= equal;
        --left;
      }
    }
  }

  void emit_tile(const Tile& tile, const Survivors<Key>& survivors, Key threshold, Workspace<Key>& workspace,
                 index_t* out) const {
    uint16_t* const selected = workspace.selected;
    index_t n = 0;
    if (survivors.sure_words == nullptr) {
      const uint16_t* sure = survivors.sure_list;
      const uint16_t* const end = sure + survivors.num_sure;
      for_each_band_winner(survivors, threshold, [&](uint16_t position) {
        while (sure != end && *sure < position) selected[n++] = *sure++;
        selected[n++] = position;
      });
      while (sure != end) selected[n++] = *sure++;
    } else {
      const index_t num_words = (tile.numel + 63) / 64;
      uint64_t* words = workspace.scratch_words;
      std::copy_n(survivors.sure_words, num_words, words);
      for_each_band_winner(survivors, threshold, [&](uint16_t position) {
        words[position / 64] |= uint64_t(1) << (position % 64);
      });
      n = positions(isa_, words, num_words, selected);
    }
    widen(isa_, selected, n, tile.first, out);
  }

  const TensorDesc* tensors_;
  index_t num_tensors_;
  index_t k_;
  int num_threads_;
  Isa isa_;
  index_t numel_ = 0;
  index_t run_ = 1;
  std::vector<Tile> tiles_;
  std::vector<std::unique_ptr<Workspace<Key>>> workspaces_;
  std::vector<Survivors<Key>> survivors_;
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
