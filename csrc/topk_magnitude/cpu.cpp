// topk_magnitude / cpu: one read of the data, whatever k.
//
// Algorithm  guess and verify (Floyd & Rivest 1975; Monroe et al. 2011).
//   sample   brackets the k-th key: [bracket.lo, bracket.hi]
//   filter   the only full read. key > hi: sure; lo <= key <= hi: band. Per tile: lists of 16-bit positions
//            when few survivors are expected, else a bitmap of the sure ones; keys are kept for the band
//            alone
//   verify   num_sure < k <= num_sure + num_band, both exact. If not, or if a list outgrew its budget: a radix
//            select over the data finds the exact key, and one more filter uses it as both bounds
//   select   the exact k-th key from the band
//   emit     per tile: sure + band keys above the threshold + the tile's share of the ties, which go to the
//            lowest positions by a scan over tiles
// Traffic    reads sizeof(scalar_t) B/elem once; writes 8 B per selected position. Workspace: lists of 2 B per
//            sure element (with the band at most N / 16) or 1 bit per element; 6 B (10 B with fp64) per band
//            element (at most N / 64), or 1 bit per element beside a bitmap when the bracket is one key.
// Contract   the sample only steers: no guess, budget or schedule can change the answer.
// Threads    tiles are handed out dynamically; each result has a fixed place, so none depends on timing.

#include <atomic>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "cpu/parallel.h"
#include "topk_magnitude/cpu_filter.h"
#include "topk_magnitude/cpu_sample.h"
#include "topk_magnitude/cpu_tiles.h"
#include "topk_magnitude/topk_magnitude.h"

namespace saft {
namespace cpu_topk_magnitude {

// Tuned on 2 cores of an AMD EPYC (Zen 3), 2026-11-24.
constexpr double kListShare = 1.0 / 32;  // expect fewer survivors than this: lists; more: bitmaps
constexpr index_t kListBudget = 16;      // lists hold at most numel / kListBudget survivors
constexpr int kDigitBits = 11;
// Tiles handed out together: many runs per thread for balance, but not one tile at a time where there are many.
constexpr int kMaxRun = 64, kRunsPerThread = 256;

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
    run_ = std::min<index_t>(kMaxRun, 1 + index_t(tiles_.size()) / (num_threads_ * kRunsPerThread));
    for (int i = 0; i < num_threads_; ++i) workspaces_.push_back(std::make_unique<Workspace<Key>>());
  }

  TopKResult run(index_t* indices, index_t* counts) {
    std::fill(counts, counts + num_tensors_, 0);
    Bracket<Key> bracket = Sample<Key>(tensors_, num_tensors_, numel_, k_, num_threads_).bracket();
    bool verified = filter(bracket) && num_sure_ < k_ && k_ <= num_sure_ + num_band_;
    if (!verified && k_ > 0) {
      const Key exact = select_of_data();
      bracket = {exact, exact, 1.0};
      filter(bracket);
    }
    TopKResult result{std::numeric_limits<double>::infinity(), 0};
    for (const auto& workspace : workspaces_) result.num_nonfinite += workspace->num_nonfinite;
    if (k_ == 0) return result;
    const Key threshold = select_of_band(bracket, k_ - num_sure_);
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
    const std::tuple<Thresholds<Key, float>, Thresholds<Key, bfloat16>, Thresholds<Key, float16>,
                     Thresholds<Key, double>>
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
        const auto& above = std::get<Thresholds<Key, scalar_t>>(thresholds);
        if (lists) {
          filter_to_lists(isa_, x, tile.numel, above, workspace, out);
        } else {
          filter_to_words(isa_, x, tile.numel, above, keep_keys, workspace, out);
        }
      });
      num_sure.fetch_add(out.num_sure, std::memory_order_relaxed);
      num_band.fetch_add(out.num_band, std::memory_order_relaxed);
    });
    num_sure_ = num_sure;
    num_band_ = num_band;
    return !outgrown();
  }

  // ---- select ----

  // The key of descending rank `rank` (1 = largest) among those in [lo, hi]. visit(piece, thread, fn) calls fn(key)
  // for the keys of one of `num_pieces`.
  template <class Visit>
  Key radix_select(Key lo, Key hi, index_t rank, index_t num_pieces, index_t run, const Visit& visit) {
    while (lo != hi) {
      const int shift = std::max(0, bit_width(hi - lo) - kDigitBits);
      std::vector<std::vector<index_t>> histograms(static_cast<size_t>(num_threads_),
                                                   std::vector<index_t>(size_t(1) << kDigitBits, 0));
      parallel_for(num_pieces, run, num_threads_, [&](index_t piece, int thread) {
        index_t* histogram = histograms[thread].data();
        visit(piece, thread, [&](Key key) {
          const Key above = Key(key - lo);  // one comparison: either of two would mispredict
          if (above <= Key(hi - lo)) ++histogram[above >> shift];
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

  // Of the band. Its keys are read as they lie in memory: tile by tile, each begins with a line that is in no cache.
  Key select_of_band(const Bracket<Key>& bracket, index_t rank) {
    struct Piece {
      const Key* keys;
      size_t size;
    };
    std::vector<Piece> pieces;
    for (const auto& workspace : workspaces_) {
      workspace->band_keys.for_each_part([&](const Key* keys, size_t size) {
        for (size_t first = 0; first < size; first += kTileNumel) {
          pieces.push_back({keys + first, std::min(size - first, size_t(kTileNumel))});
        }
      });
    }
    const auto visit = [&](index_t p, int, const auto& fn) {
      for (size_t i = 0; i < pieces[p].size; ++i) fn(pieces[p].keys[i]);
    };
    return radix_select(bracket.lo, bracket.hi, rank, index_t(pieces.size()), 1, visit);
  }

  Key select_of_data() {
    const auto visit = [this](index_t t, int thread, const auto& fn) {
      const Tile& tile = tiles_[t];
      dispatch(tensors_[tile.tensor].dtype, [&](auto tag) {
        using scalar_t = typename decltype(tag)::type;
        const scalar_t* x = load_tile<scalar_t>(tensors_[tile.tensor], tile, workspaces_[thread]->gathered);
        for (index_t i = 0; i < tile.numel; ++i) fn(widen_key<Key, scalar_t>(native_key(x[i])));
      });
    };
    return radix_select(0, CommonKey<Key>::kNaN, k_, index_t(tiles_.size()), run_, visit);
  }

  // ---- emit ----

  void emit(Key threshold, index_t* indices, index_t* counts) {
    for_each_tile([&](index_t t, int) {
      Survivors<Key>& survivors = survivors_[t];
      if (survivors.band_keys == nullptr) {
        survivors.num_equal = survivors.num_band;  // the bracket is the threshold
        return;
      }
      uint32_t num_greater = 0, num_equal = 0;
      for (uint32_t i = 0; i < survivors.num_band; ++i) {
        num_greater += survivors.band_keys[i] > threshold;
        num_equal += survivors.band_keys[i] == threshold;
      }
      survivors.num_greater = num_greater;
      survivors.num_equal = num_equal;
    });
    index_t ties = k_ - num_sure_;  // wanted among the elements equal to the threshold
    for (const auto& survivors : survivors_) ties -= survivors.num_greater;
    std::vector<index_t> offsets(tiles_.size() + 1, 0);
    for (size_t t = 0; t < tiles_.size(); ++t) {
      Survivors<Key>& survivors = survivors_[t];
      survivors.num_equal = uint32_t(std::min<index_t>(survivors.num_equal, ties));  // from here on: to take
      ties -= survivors.num_equal;
      const index_t selected = index_t(survivors.num_sure) + survivors.num_greater + survivors.num_equal;
      offsets[t + 1] = offsets[t] + selected;
      counts[tiles_[t].tensor] += selected;
    }
    for_each_tile([&](index_t t, int thread) {
      if (offsets[t + 1] == offsets[t]) return;
      emit_tile(tiles_[t], survivors_[t], threshold, *workspaces_[thread], indices + offsets[t]);
    });
  }

  // Moves the band's share of the selection to the front of its list, and returns how many they are. No branch on the
  // data: half of the band is selected.
  static index_t compact_band(const Survivors<Key>& survivors, Key threshold) {
    uint32_t ties = survivors.num_equal;
    index_t n = 0;
    for (uint32_t i = 0; i < survivors.num_band; ++i) {
      const bool takes_tie = survivors.band_keys[i] == threshold && ties > 0;
      ties -= takes_tie;
      survivors.band_list[n] = survivors.band_list[i];
      n += takes_tie || survivors.band_keys[i] > threshold;
    }
    return n;
  }

  // Adds the band's share to the words of the sure ones; likewise.
  static void add_band(const Survivors<Key>& survivors, Key threshold, uint64_t* words) {
    uint32_t ties = survivors.num_equal;
    if (survivors.band_words != nullptr) {
      for (index_t w = 0; ties > 0; ++w) {
        for (uint64_t word = survivors.band_words[w]; word != 0 && ties > 0; word &= word - 1, --ties) {
          words[w] |= word & -word;
        }
      }
      return;
    }
    for (uint32_t i = 0; i < survivors.num_band; ++i) {
      const uint16_t position = survivors.band_list[i];
      words[position / 64] |= uint64_t(survivors.band_keys[i] > threshold) << (position % 64);
    }
    for (uint32_t i = 0; ties > 0; ++i) {
      if (survivors.band_keys[i] != threshold) continue;
      const uint16_t position = survivors.band_list[i];
      words[position / 64] |= uint64_t(1) << (position % 64);
      --ties;
    }
  }

  void emit_tile(const Tile& tile, const Survivors<Key>& survivors, Key threshold, Workspace<Key>& workspace,
                 index_t* out) const {
    uint16_t* const selected = workspace.selected;
    const index_t total = index_t(survivors.num_sure) + survivors.num_greater + survivors.num_equal;
    if (survivors.sure_words != nullptr) {
      add_band(survivors, threshold, survivors.sure_words);
      expand(isa_, survivors.sure_words, (tile.numel + 63) / 64, tile.first, total, selected, out);
    } else {
      const uint16_t *sure = survivors.sure_list, *band = survivors.band_list;
      std::merge(sure, sure + survivors.num_sure, band, band + compact_band(survivors, threshold), selected);
      widen(isa_, selected, total, tile.first, out);
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
  std::vector<std::unique_ptr<Workspace<Key>>> workspaces_;
  std::vector<Survivors<Key>> survivors_;
  index_t num_sure_ = 0;
  index_t num_band_ = 0;
};

}  // namespace cpu_topk_magnitude

TopKResult topk_magnitude_cpu(const TensorDesc* tensors, index_t num_tensors, index_t k, index_t* indices,
                              index_t* counts, int num_threads, int isa) {
  const bool any_double = std::any_of(tensors, tensors + num_tensors, [](const TensorDesc& tensor) {
    return tensor.dtype == ScalarType::kFloat64;
  });
  const auto run = [&](auto key) {
    return cpu_topk_magnitude::TopKMagnitude<decltype(key)>(tensors, num_tensors, k, num_threads,
                                                            resolve_isa(isa))
        .run(indices, counts);
  };
  return any_double ? run(uint64_t{}) : run(uint32_t{});
}

}  // namespace saft
