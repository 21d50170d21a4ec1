// topk_magnitude / cpu / filter: one tile's survivors of a bracket.
//
// Algorithm  blocks of 1,024 elements are compared into bits, then the set bits are visited, while they are in L1.
// Traffic    reads each element once; writes 2 B per survivor and a key per band element, or 1 bit per element for
//            the sure ones and for the band 2 B and a key per element (1 bit when the bracket is one key).
// Contract   counts exact; positions ascending; non-finite elements are counted whatever the bracket.

#pragma once

#include <algorithm>
#include <cstdint>

#include "topk_magnitude/cpu_compare.h"
#include "topk_magnitude/cpu_tiles.h"

namespace saft {
namespace cpu_topk_magnitude {

// The bracket in a tensor's own keys.
template <class Key, class scalar_t>
struct Thresholds {
  using key_t = typename KeyTraits<scalar_t>::key_t;
  signed_key_t<scalar_t> survivor, sure;
  explicit Thresholds(const Bracket<Key>& bracket)
      : survivor(signed_key_t<scalar_t>(key_t(first_native_key<Key, scalar_t>(bracket.lo) - 1))),
        sure(signed_key_t<scalar_t>(key_t(first_native_key<Key, scalar_t>(bracket.hi + 1) - 1))) {}
};

// Compares up to kBlockWords words from x[first]; bits past the end of the tile are cleared.
template <bool kBoth, class scalar_t>
void compare_block(Isa isa, const scalar_t* x, index_t first, index_t n, signed_key_t<scalar_t> above,
                   uint64_t* words, signed_key_t<scalar_t> higher, uint64_t* higher_words, Seen& seen) {
  const index_t count = std::min(n - first, kBlockWords * 64);
  compare<kBoth>(isa, x + first, count / 64, above, words, higher, higher_words, seen);
  if (const index_t rest = count % 64) {
    scalar_t tail[64];
    std::fill_n(std::copy_n(x + first + count - rest, rest, tail), 64 - rest, scalar_t{});
    uint64_t word, higher_word;
    Seen in_tail;
    compare_baseline<kBoth>(tail, 1, above, &word, higher, &higher_word, in_tail);
    const uint64_t inside = ~(~uint64_t(0) << rest);
    words[count / 64] = word & inside;
    if constexpr (kBoth) {
      higher_words[count / 64] = higher_word & inside;
      seen.num_between += __builtin_popcountll(word & inside);
      seen.num_higher += __builtin_popcountll(higher_word & inside);
      seen.nonfinite |= in_tail.nonfinite;
    }
  }
}

// Calls visit(bit) for the set bits of up to kBlockWords sparse words, ascending. Empty words are left out
// first, all at once: skipping them one by one would mispredict.
template <class Visit>
void visit_bits(Isa isa, const uint64_t* words, index_t num_words, const Visit& visit) {
  for (uint32_t occupied = occupied_words(isa, words, num_words); occupied != 0; occupied &= occupied - 1) {
    const index_t w = __builtin_ctz(occupied);
    uint64_t word = words[w];
    do {
      visit(w * 64 + __builtin_ctzll(word));
      word &= word - 1;
    } while (word != 0);
  }
}

template <class Key, class scalar_t>
void filter_to_lists(Isa isa, const scalar_t* x, index_t n, const Thresholds<Key, scalar_t>& above,
                     Workspace<Key>& workspace, Survivors<Key>& out) {
  using key_t = typename KeyTraits<scalar_t>::key_t;
  uint16_t* sure = workspace.positions.reserve(size_t(n) + 1);
  uint16_t* band = workspace.band_positions.reserve(size_t(n) + 1);
  Key* band_keys = workspace.band_keys.reserve(size_t(n) + 1);
  uint32_t num_sure = 0, num_band = 0;
  index_t num_nonfinite = 0;
  Seen unused;
  // inf and NaN are visited, to be counted, also where the bracket starts above them
  const signed_key_t<scalar_t> visited = std::min(above.survivor, kBelowInf<scalar_t>);
  for (index_t first = 0; first < n; first += kBlockWords * 64) {
    uint64_t words[kBlockWords];
    compare_block<false>(isa, x, first, n, visited, words, 0, nullptr, unused);
    visit_bits(isa, words, std::min(kBlockWords, (n - first + 63) / 64), [&](index_t bit) {
      // written to both lists, kept in one or none: no branch on the data
      const index_t position = first + bit;
      const key_t key = native_key(x[position]);
      const bool is_survivor = signed_key_t<scalar_t>(key) > above.survivor;
      const bool is_sure = signed_key_t<scalar_t>(key) > above.sure;
      sure[num_sure] = uint16_t(position);
      num_sure += is_sure;
      band[num_band] = uint16_t(position);
      band_keys[num_band] = widen_key<Key, scalar_t>(key);
      num_band += is_survivor && !is_sure;
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

template <class Key, class scalar_t>
void filter_to_words(Isa isa, const scalar_t* x, index_t n, const Thresholds<Key, scalar_t>& above,
                     bool keep_keys, Workspace<Key>& workspace, Survivors<Key>& out) {
  const index_t num_words = (n + 63) / 64;
  uint64_t* sure = workspace.words.reserve(size_t(num_words));
  workspace.words.keep(size_t(num_words));
  uint64_t* band = keep_keys ? workspace.scratch_words : workspace.words.reserve(size_t(num_words));
  if (!keep_keys) workspace.words.keep(size_t(num_words));
  uint16_t* list = keep_keys ? workspace.band_positions.reserve(size_t(n)) : nullptr;
  Key* keys = keep_keys ? workspace.band_keys.reserve(size_t(n)) : nullptr;
  uint32_t num_listed = 0;
  Seen seen;
  for (index_t first = 0; first < num_words; first += kBlockWords) {
    compare_block<true>(isa, x, first * 64, n, above.survivor, band + first, above.sure, sure + first, seen);
    if (!keep_keys) continue;
    visit_bits(isa, band + first, std::min(kBlockWords, num_words - first), [&](index_t bit) {
      const index_t position = first * 64 + bit;
      list[num_listed] = uint16_t(position);
      keys[num_listed] = widen_key<Key, scalar_t>(native_key(x[position]));
      ++num_listed;
    });
  }
  out.num_sure = uint32_t(seen.num_higher);
  out.num_band = uint32_t(seen.num_between);
  out.sure_words = sure;
  if (keep_keys) {
    workspace.band_positions.keep(num_listed);
    workspace.band_keys.keep(num_listed);
    out.band_list = list;
    out.band_keys = keys;
  } else {
    out.band_words = band;
  }
  if (seen.nonfinite) {
    for (index_t i = 0; i < n; ++i) workspace.num_nonfinite += native_key(x[i]) >= KeyTraits<scalar_t>::kInf;
  }
}

}  // namespace cpu_topk_magnitude
}  // namespace saft
