// topk_magnitude / cpu / sample: bounds on the k-th key, from a stratified sample.
//
// Traffic    16 neighbours (a line of fp32) per stratum, at most 2^20 elements in all, per look.
// Algorithm  two order statistics of the sample bracket the k-th key of the data (Floyd & Rivest 1975); where
//            few distinct keys, or one that most elements share, make a wide band, the sample is looked at
//            again.
// Contract   a guess: nothing else depends on it but time. The same for any number of threads.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/parallel.h"
#include "topk_magnitude/cpu_tiles.h"

namespace saft {
namespace cpu_topk_magnitude {

constexpr index_t kLineNumel = 16;  // sampled together: one 64-byte line of fp32
// Tuned on 2 cores of an AMD EPYC (Zen 3), 2026-11-24.
constexpr index_t kMinSample = index_t(1) << 16, kMaxSample = index_t(1) << 20;  // elements
// Half-width of the bracket in binomial standard deviations. Gradients are correlated along both dimensions of a matrix:
// structured gradients gave rank errors up to 2.4 sigma with this sample.
constexpr double kSigmas = 6.0;
constexpr int kSampleBits = 16;
constexpr double kBandCost = 1.5;    // what one more element in the band costs, in sampled elements
constexpr index_t kLineChunk = 256;  // sampled lines per work item
// A band of a larger share of the sample is looked at again.
constexpr double kNarrowBand = 0.95 / kBandBudget;
constexpr int kMaxLooks = 4;  // 16 bits each: a 63-bit key

template <class Key>
class Sample {
 public:
  Sample(const TensorDesc* tensors, index_t num_tensors, index_t numel, index_t k, int num_threads)
      : tensors_(tensors), num_tensors_(num_tensors), numel_(numel), k_(k), num_threads_(num_threads) {}

  // The best sample size: reading more of it costs as much as the narrower band, kSigmas to either side, saves.
  index_t sample_numel() const {
    const double share = double(k_) / double(numel_);
    const double root = std::cbrt(kBandCost * kSigmas * double(numel_) * std::sqrt(share));
    return std::clamp(index_t(root * root), kMinSample, kMaxSample);
  }

  Bracket<Key> bracket() const {
    constexpr Key kNaN = CommonKey<Key>::kNaN;
    if (k_ == 0) return {kNaN, kNaN, 1.0};  // only counts non-finite elements: no list, no budget
    if (numel_ <= kSmallNumel) return {0, kNaN, 0.0};
    std::vector<index_t> first_line(size_t(num_tensors_) + 1, 0);
    for (index_t t = 0; t < num_tensors_; ++t) {
      first_line[t + 1] = first_line[t] + ceil_div(tensors_[t].numel, kLineNumel);
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
    std::vector<std::vector<uint32_t>> histograms(static_cast<size_t>(num_threads_));
    std::vector<index_t> sampled(static_cast<size_t>(num_threads_), 0);
    parallel_for(ceil_div(num_sampled, kLineChunk), 1, num_threads_, [&](index_t chunk, int thread) {
      auto& histogram = histograms[thread];
      if (histogram.empty()) histogram.assign(size_t(1) << kSampleBits, 0);
      const index_t begin = chunk * kLineChunk, end = std::min(num_sampled, begin + kLineChunk);
      index_t line[kLineChunk], tensor[kLineChunk];
      index_t t = 0;
      for (index_t j = begin; j < end; ++j) {
        const double jitter = double(splitmix64(uint64_t(j)) >> 11) * 0x1p-53;
        const index_t l = std::min(num_lines - 1, index_t((double(j) + jitter) * stride));
        if (t == 0 || l >= first_line[t + 1]) {
          t = std::upper_bound(first_line.begin(), first_line.end(), l) - first_line.begin() - 1;
        }
        line[j - begin] = l - first_line[t];
        tensor[j - begin] = t;
        if (tensors_[t].ndim == 0) __builtin_prefetch(line_data(tensors_[t], l - first_line[t]));
      }
      for (index_t j = 0; j < end - begin; ++j) {
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

  // Not a function that prefetches: GCC takes one that does nothing else for pure and drops its calls.
  static const char* line_data(const TensorDesc& tensor, index_t line) {
    return static_cast<const char*>(tensor.data) + line * kLineNumel * itemsize_of(tensor.dtype);
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

  const TensorDesc* tensors_;
  index_t num_tensors_;
  index_t numel_;
  index_t k_;
  int num_threads_;
};

}  // namespace cpu_topk_magnitude
}  // namespace saft
