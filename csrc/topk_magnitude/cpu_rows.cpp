// topk_magnitude_rows / cpu: one read of the data, row by row.
//
// Algorithm  per row: keys to a buffer, counted by their first digit; the digit that holds rank k is sorted out by
//            nth_element; the keys above the threshold and the first of those equal to it are written.
// Traffic    reads sizeof(scalar_t) B/elem once, and writes 8 B per selected element. Keys (a native one per element,
//            twice) stay in the cache for rows that fit it.
// Contract   of every row what topk_magnitude selects of that row alone. No result depends on threads.
// Threads    split by rows.

#include <algorithm>
#include <functional>
#include <vector>

#include "cpu/parallel.h"
#include "topk_magnitude/cpu_tiles.h"
#include "topk_magnitude/topk_magnitude.h"

namespace saft {
namespace cpu_topk_magnitude {
namespace {

// ---- tuning: on 2 cores of an AMD EPYC (Zen 3), 2026-11-26 ----

constexpr int kDigitBits = 11;
constexpr index_t kSortedNumel = 256;     // rows up to here are not counted by digits
constexpr index_t kChunkNumel = 1 << 15;  // rows handed out together
constexpr index_t kBlock = 32;            // keys that are passed over at once when none is selected

template <class scalar_t>
class RowSelector {
  using key_t = typename KeyTraits<scalar_t>::key_t;
  static constexpr key_t kNaN = KeyTraits<scalar_t>::kInf + 1;  // the one key of every NaN
  static constexpr int kKeyBits = int(sizeof(key_t)) * 8 - 1;
  static constexpr int kShift = kKeyBits - kDigitBits;

 public:
  RowSelector(index_t numel, index_t k)
      : numel_(numel), k_(k), keys_(size_t(numel)), sorted_(size_t(numel)), counts_(1 << kDigitBits) {}

  // Writes k flat positions, ascending, of a row that begins at flat position `base`.
  void select(const scalar_t* row, index_t stride, index_t base, index_t* out) {
    const key_t largest = stride == 1 ? read(row, 1) : read(row, stride);
    index_t ties = 0;
    const key_t threshold = numel_ <= kSortedNumel ? by_sorting(ties) : by_digit(largest, ties);
    emit(threshold, ties, base, out);
  }

 private:
  key_t read(const scalar_t* row, index_t stride) {
    key_t largest = 0;
    for (index_t i = 0; i < numel_; ++i) {
      const key_t key = std::min(native_key(row[i * stride]), kNaN);
      keys_[size_t(i)] = key;
      largest = std::max(largest, key);
    }
    return largest;
  }

  // The key of descending rank `rank` (1 = largest) among the first n of sorted_, and how many equal to it are among
  // the first `rank`.
  key_t nth(index_t n, index_t rank, index_t& ties) {
    const auto begin = sorted_.begin();
    std::nth_element(begin, begin + (rank - 1), begin + n, std::greater<key_t>());
    const key_t threshold = begin[rank - 1];
    ties = rank - std::count_if(begin, begin + (rank - 1), [&](key_t key) { return key > threshold; });
    return threshold;
  }

  key_t by_sorting(index_t& ties) {
    std::copy(keys_.begin(), keys_.end(), sorted_.begin());
    return nth(numel_, k_, ties);
  }

  key_t by_digit(key_t largest, index_t& ties) {
    std::fill(counts_.begin(), counts_.end(), 0);
    for (const key_t key : keys_) ++counts_[size_t(key >> kShift)];
    size_t digit = size_t(largest >> kShift);
    index_t rank = k_;
    for (; counts_[digit] < rank; --digit) rank -= counts_[digit];
    index_t n = 0;
    for (const key_t key : keys_) {  // without branches: they would be mispredicted
      sorted_[size_t(n)] = key;
      n += size_t(key >> kShift) == digit;
    }
    return nth(n, rank, ties);
  }

  void emit(key_t threshold, index_t ties, index_t base, index_t* out) const {
    index_t n = 0;
    for (index_t first = 0; n < k_; first += kBlock) {
      const index_t end = std::min(numel_, first + kBlock);
      bool any = false;
      for (index_t i = first; i < end; ++i) any |= keys_[size_t(i)] >= threshold;
      if (!any) continue;
      for (index_t i = first; i < end && n < k_; ++i) {
        const key_t key = keys_[size_t(i)];
        const bool is_tie = (key == threshold) & (ties > 0);
        out[n] = base + i;
        n += (key > threshold) | is_tie;
        ties -= is_tie;
      }
    }
  }

  index_t numel_, k_;
  std::vector<key_t> keys_, sorted_;
  std::vector<index_t> counts_;
};

}  // namespace
}  // namespace cpu_topk_magnitude

void topk_magnitude_rows_cpu(const TopKRows& rows, index_t* indices, int num_threads) {
  if (rows.k == 0) return;
  const index_t chunk = std::max<index_t>(1, cpu_topk_magnitude::kChunkNumel / rows.numel);
  cpu_topk_magnitude::dispatch(rows.dtype, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const scalar_t* data = static_cast<const scalar_t*>(rows.data);
    parallel_for(ceil_div(rows.num_rows, chunk), 1, num_threads, [&](index_t c, int) {
      cpu_topk_magnitude::RowSelector<scalar_t> selector(rows.numel, rows.k);
      for (index_t r = c * chunk; r < std::min(rows.num_rows, (c + 1) * chunk); ++r) {
        selector.select(data + r * rows.row_stride, rows.stride, r * rows.numel, indices + r * rows.k);
      }
    });
  });
}

}  // namespace saft
