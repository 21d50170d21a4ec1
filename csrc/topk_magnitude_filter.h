// topk_magnitude / filter and expand: the two inner loops of the CPU backend, one body per instruction set.
//
// filter   64 elements -> one word of `candidate` bits (key > candidate_above) and one of `sure` bits
//          (key > sure_above). Branch-free, so its speed does not depend on the data.
//          Traffic: reads sizeof(scalar_t) B/elem; the words stay in L1.
// expand   words -> ascending int64 positions.
#pragma once

#include <type_traits>

#include "cpu_isa.h"
#include "topk_magnitude.h"

#if SAFT_X86_DISPATCH
#include <immintrin.h>
#endif

namespace saft {

template <class scalar_t>
using signed_key_t = std::conditional_t<sizeof(scalar_t) == 2, int16_t,
                                        std::conditional_t<sizeof(scalar_t) == 4, int32_t, int64_t>>;

// Thresholds are "strictly above", so that a native key of kMask + 1 ("none") becomes kMask and fits the
// signed compares SIMD has; -1 means "all".
template <class scalar_t>
struct FilterThresholds {
  signed_key_t<scalar_t> candidate_above;
  signed_key_t<scalar_t> sure_above;
};

struct FilterCounts {
  index_t num_candidate = 0;
  index_t num_sure = 0;
  bool any_nonfinite = false;
};

// Writes base + position of every set bit, ascending; may write up to 8 entries past the returned count.
using ExpandFn = index_t (*)(const uint64_t* words, index_t num_words, index_t base, index_t* out);

// ---- baseline ----

template <class scalar_t>
FilterCounts filter_baseline(const scalar_t* x, index_t num_words, FilterThresholds<scalar_t> above,
                             uint64_t* candidate, uint64_t* sure) {
  using skey_t = signed_key_t<scalar_t>;
  skey_t largest = 0;
  FilterCounts counts;
  for (index_t w = 0; w < num_words; ++w, x += 64) {
    uint64_t candidate_word = 0, sure_word = 0;
    for (int j = 0; j < 64; ++j) {
      const skey_t key = skey_t(native_key(x[j]));
      const uint64_t is_candidate = key > above.candidate_above;
      const uint64_t is_sure = key > above.sure_above;
      candidate_word |= is_candidate << j;
      sure_word |= is_sure << j;
      counts.num_candidate += index_t(is_candidate);
      counts.num_sure += index_t(is_sure);
      largest = key > largest ? key : largest;
    }
    candidate[w] = candidate_word;
    sure[w] = sure_word;
  }
  counts.any_nonfinite = largest >= skey_t(KeyTraits<scalar_t>::kInf);
  return counts;
}

inline int count_trailing_zeros(uint64_t word) {
#if defined(__GNUC__)
  return __builtin_ctzll(word);
#else
  int n = 0;
  while (!(word & 1)) word >>= 1, ++n;
  return n;
#endif
}

inline index_t expand_baseline(const uint64_t* words, index_t num_words, index_t base, index_t* out) {
  index_t* const begin = out;
  for (index_t w = 0; w < num_words; ++w) {
    for (uint64_t word = words[w]; word != 0; word &= word - 1) {
      *out++ = base + w * 64 + count_trailing_zeros(word);
    }
  }
  return out - begin;
}

#if SAFT_X86_DISPATCH

// ---- AVX2 ----

SAFT_TARGET_AVX2 inline FilterCounts filter_avx2(const float* x, index_t num_words,
                                                 FilterThresholds<float> above, uint64_t* candidate,
                                                 uint64_t* sure) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  const __m256i candidate_above = _mm256_set1_epi32(above.candidate_above);
  const __m256i sure_above = _mm256_set1_epi32(above.sure_above);
  __m256i largest = _mm256_setzero_si256();
  FilterCounts counts;
  for (index_t w = 0; w < num_words; ++w) {
    uint64_t candidate_word = 0, sure_word = 0;
    for (int j = 0; j < 64; j += 8, x += 8) {
      const __m256i key = _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), mask);
      largest = _mm256_max_epi32(largest, key);
      const uint32_t c =
          uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(key, candidate_above))));
      const uint32_t s =
          uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(key, sure_above))));
      candidate_word |= uint64_t(c) << j;
      sure_word |= uint64_t(s) << j;
    }
    candidate[w] = candidate_word;
    sure[w] = sure_word;
    counts.num_candidate += __builtin_popcountll(candidate_word);
    counts.num_sure += __builtin_popcountll(sure_word);
  }
  const __m256i nonfinite =
      _mm256_cmpgt_epi32(largest, _mm256_set1_epi32(int32_t(KeyTraits<float>::kInf) - 1));
  counts.any_nonfinite = _mm256_movemask_epi8(nonfinite) != 0;
  return counts;
}

SAFT_TARGET_AVX2 inline FilterCounts filter_avx2_16bit(const uint16_t* x, index_t num_words, int16_t inf,
                                                       int16_t candidate_above_, int16_t sure_above_,
                                                       uint64_t* candidate, uint64_t* sure) {
  const __m256i mask = _mm256_set1_epi16(0x7fff);
  const __m256i candidate_above = _mm256_set1_epi16(candidate_above_);
  const __m256i sure_above = _mm256_set1_epi16(sure_above_);
  __m256i largest = _mm256_setzero_si256();
  FilterCounts counts;
  for (index_t w = 0; w < num_words; ++w) {
    uint64_t candidate_word = 0, sure_word = 0;
    for (int j = 0; j < 64; j += 32, x += 32) {
      const __m256i* p = reinterpret_cast<const __m256i*>(x);
      const __m256i k0 = _mm256_and_si256(_mm256_loadu_si256(p), mask);
      const __m256i k1 = _mm256_and_si256(_mm256_loadu_si256(p + 1), mask);
      largest = _mm256_max_epi16(largest, _mm256_max_epi16(k0, k1));
      // packs works inside 128-bit lanes; 0xd8 puts the four quarters back in order
      const __m256i c = _mm256_permute4x64_epi64(_mm256_packs_epi16(_mm256_cmpgt_epi16(k0, candidate_above),
                                                                    _mm256_cmpgt_epi16(k1, candidate_above)),
                                                 0xd8);
      const __m256i s = _mm256_permute4x64_epi64(
          _mm256_packs_epi16(_mm256_cmpgt_epi16(k0, sure_above), _mm256_cmpgt_epi16(k1, sure_above)), 0xd8);
      candidate_word |= uint64_t(uint32_t(_mm256_movemask_epi8(c))) << j;
      sure_word |= uint64_t(uint32_t(_mm256_movemask_epi8(s))) << j;
    }
    candidate[w] = candidate_word;
    sure[w] = sure_word;
    counts.num_candidate += __builtin_popcountll(candidate_word);
    counts.num_sure += __builtin_popcountll(sure_word);
  }
  const __m256i nonfinite = _mm256_cmpgt_epi16(largest, _mm256_set1_epi16(int16_t(inf - 1)));
  counts.any_nonfinite = _mm256_movemask_epi8(nonfinite) != 0;
  return counts;
}

SAFT_TARGET_AVX2 inline FilterCounts filter_avx2(const double* x, index_t num_words,
                                                 FilterThresholds<double> above, uint64_t* candidate,
                                                 uint64_t* sure) {
  const __m256i mask = _mm256_set1_epi64x(int64_t(KeyTraits<double>::kMask));
  const __m256i candidate_above = _mm256_set1_epi64x(above.candidate_above);
  const __m256i sure_above = _mm256_set1_epi64x(above.sure_above);
  const __m256i below_inf = _mm256_set1_epi64x(int64_t(KeyTraits<double>::kInf) - 1);
  __m256i nonfinite = _mm256_setzero_si256();
  FilterCounts counts;
  for (index_t w = 0; w < num_words; ++w) {
    uint64_t candidate_word = 0, sure_word = 0;
    for (int j = 0; j < 64; j += 4, x += 4) {
      const __m256i key = _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), mask);
      nonfinite = _mm256_or_si256(nonfinite, _mm256_cmpgt_epi64(key, below_inf));
      const uint32_t c =
          uint32_t(_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpgt_epi64(key, candidate_above))));
      const uint32_t s =
          uint32_t(_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpgt_epi64(key, sure_above))));
      candidate_word |= uint64_t(c) << j;
      sure_word |= uint64_t(s) << j;
    }
    candidate[w] = candidate_word;
    sure[w] = sure_word;
    counts.num_candidate += __builtin_popcountll(candidate_word);
    counts.num_sure += __builtin_popcountll(sure_word);
  }
  counts.any_nonfinite = _mm256_movemask_epi8(nonfinite) != 0;
  return counts;
}

// For each byte value: the positions of its set bits, in order.
struct BytePositions {
  alignas(64) uint8_t position[256][8];
  BytePositions() : position{} {
    for (int byte = 0; byte < 256; ++byte) {
      int n = 0;
      for (int bit = 0; bit < 8; ++bit) {
        if (byte >> bit & 1) position[byte][n++] = uint8_t(bit);
      }
    }
  }
};
inline const BytePositions kBytePositions;

SAFT_TARGET_AVX2 inline index_t expand_avx2(const uint64_t* words, index_t num_words, index_t base,
                                            index_t* out) {
  index_t* const begin = out;
  for (index_t w = 0; w < num_words; ++w, base += 64) {
    uint64_t word = words[w];
    if (word == 0) continue;
    for (index_t b = base; word != 0; word >>= 8, b += 8) {
      const uint32_t byte = uint32_t(word & 0xff);
      const __m128i positions =
          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kBytePositions.position[byte]));
      const __m256i offset = _mm256_set1_epi64x(b);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                          _mm256_add_epi64(_mm256_cvtepu8_epi64(positions), offset));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 4),
                          _mm256_add_epi64(_mm256_cvtepu8_epi64(_mm_srli_si128(positions, 4)), offset));
      out += __builtin_popcount(byte);
    }
  }
  return out - begin;
}

// ---- AVX-512 ----

SAFT_TARGET_AVX512 inline FilterCounts filter_avx512(const float* x, index_t num_words,
                                                     FilterThresholds<float> above, uint64_t* candidate,
                                                     uint64_t* sure) {
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  const __m512i candidate_above = _mm512_set1_epi32(above.candidate_above);
  const __m512i sure_above = _mm512_set1_epi32(above.sure_above);
  __m512i largest = _mm512_setzero_si512();
  FilterCounts counts;
  for (index_t w = 0; w < num_words; ++w) {
    uint64_t candidate_word = 0, sure_word = 0;
    for (int j = 0; j < 64; j += 16, x += 16) {
      const __m512i key = _mm512_and_si512(_mm512_loadu_si512(x), mask);
      largest = _mm512_max_epi32(largest, key);
      candidate_word |= uint64_t(_mm512_cmpgt_epi32_mask(key, candidate_above)) << j;
      sure_word |= uint64_t(_mm512_cmpgt_epi32_mask(key, sure_above)) << j;
    }
    candidate[w] = candidate_word;
    sure[w] = sure_word;
    counts.num_candidate += __builtin_popcountll(candidate_word);
    counts.num_sure += __builtin_popcountll(sure_word);
  }
  counts.any_nonfinite =
      _mm512_cmpgt_epi32_mask(largest, _mm512_set1_epi32(int32_t(KeyTraits<float>::kInf) - 1)) != 0;
  return counts;
}

SAFT_TARGET_AVX512 inline FilterCounts filter_avx512_16bit(const uint16_t* x, index_t num_words, int16_t inf,
                                                           int16_t candidate_above_, int16_t sure_above_,
                                                           uint64_t* candidate, uint64_t* sure) {
  const __m512i mask = _mm512_set1_epi16(0x7fff);
  const __m512i candidate_above = _mm512_set1_epi16(candidate_above_);
  const __m512i sure_above = _mm512_set1_epi16(sure_above_);
  __m512i largest = _mm512_setzero_si512();
  FilterCounts counts;
  for (index_t w = 0; w < num_words; ++w, x += 64) {
    const __m512i k0 = _mm512_and_si512(_mm512_loadu_si512(x), mask);
    const __m512i k1 = _mm512_and_si512(_mm512_loadu_si512(x + 32), mask);
    largest = _mm512_max_epi16(largest, _mm512_max_epi16(k0, k1));
    const uint64_t candidate_word = uint64_t(_mm512_cmpgt_epi16_mask(k0, candidate_above)) |
                                    uint64_t(_mm512_cmpgt_epi16_mask(k1, candidate_above)) << 32;
    const uint64_t sure_word = uint64_t(_mm512_cmpgt_epi16_mask(k0, sure_above)) |
                               uint64_t(_mm512_cmpgt_epi16_mask(k1, sure_above)) << 32;
    candidate[w] = candidate_word;
    sure[w] = sure_word;
    counts.num_candidate += __builtin_popcountll(candidate_word);
    counts.num_sure += __builtin_popcountll(sure_word);
  }
  counts.any_nonfinite = _mm512_cmpgt_epi16_mask(largest, _mm512_set1_epi16(int16_t(inf - 1))) != 0;
  return counts;
}

SAFT_TARGET_AVX512 inline FilterCounts filter_avx512(const double* x, index_t num_words,
                                                     FilterThresholds<double> above, uint64_t* candidate,
                                                     uint64_t* sure) {
  const __m512i mask = _mm512_set1_epi64(int64_t(KeyTraits<double>::kMask));
  const __m512i candidate_above = _mm512_set1_epi64(above.candidate_above);
  const __m512i sure_above = _mm512_set1_epi64(above.sure_above);
  __m512i largest = _mm512_setzero_si512();
  FilterCounts counts;
  for (index_t w = 0; w < num_words; ++w) {
    uint64_t candidate_word = 0, sure_word = 0;
    for (int j = 0; j < 64; j += 8, x += 8) {
      const __m512i key = _mm512_and_si512(_mm512_loadu_si512(x), mask);
      largest = _mm512_max_epi64(largest, key);
      candidate_word |= uint64_t(_mm512_cmpgt_epi64_mask(key, candidate_above)) << j;
      sure_word |= uint64_t(_mm512_cmpgt_epi64_mask(key, sure_above)) << j;
    }
    candidate[w] = candidate_word;
    sure[w] = sure_word;
    counts.num_candidate += __builtin_popcountll(candidate_word);
    counts.num_sure += __builtin_popcountll(sure_word);
  }
  counts.any_nonfinite =
      _mm512_cmpgt_epi64_mask(largest, _mm512_set1_epi64(int64_t(KeyTraits<double>::kInf) - 1)) != 0;
  return counts;
}

SAFT_TARGET_AVX512 inline index_t expand_avx512(const uint64_t* words, index_t num_words, index_t base,
                                                index_t* out) {
  index_t* const begin = out;
  const __m512i lane = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  for (index_t w = 0; w < num_words; ++w, base += 64) {
    uint64_t word = words[w];
    for (index_t b = base; word != 0; word >>= 8, b += 8) {
      const __mmask8 byte = __mmask8(word & 0xff);
      const __m512i positions = _mm512_add_epi64(lane, _mm512_set1_epi64(b));
      // compress to a register, then store: the memory form is microcoded on Zen 4
      _mm512_storeu_si512(out, _mm512_maskz_compress_epi64(byte, positions));
      out += __builtin_popcount(byte);
    }
  }
  return out - begin;
}

#endif  // SAFT_X86_DISPATCH

// ---- dispatch ----

template <class scalar_t>
FilterCounts filter(Isa isa, const scalar_t* x, index_t num_words, FilterThresholds<scalar_t> above,
                    uint64_t* candidate, uint64_t* sure) {
#if SAFT_X86_DISPATCH
  if constexpr (sizeof(scalar_t) == 2) {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(x);
    constexpr int16_t inf = int16_t(KeyTraits<scalar_t>::kInf);
    if (isa == kIsaAvx512) {
      return filter_avx512_16bit(bits, num_words, inf, above.candidate_above, above.sure_above, candidate,
                                 sure);
    }
    if (isa == kIsaAvx2) {
      return filter_avx2_16bit(bits, num_words, inf, above.candidate_above, above.sure_above, candidate,
                               sure);
    }
  } else {
    if (isa == kIsaAvx512) return filter_avx512(x, num_words, above, candidate, sure);
    if (isa == kIsaAvx2) return filter_avx2(x, num_words, above, candidate, sure);
  }
#endif
  (void)isa;
  return filter_baseline(x, num_words, above, candidate, sure);
}

inline ExpandFn expand_fn(Isa isa) {
#if SAFT_X86_DISPATCH
  if (isa == kIsaAvx512) return expand_avx512;
  if (isa == kIsaAvx2) return expand_avx2;
#endif
  (void)isa;
  return expand_baseline;
}

}  // namespace saft
