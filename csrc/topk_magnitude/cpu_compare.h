// topk_magnitude / cpu / compare: the inner loops, a body per instruction set.
//
// Algorithm
//   compare  64 elements -> a word of bits per threshold, set where the native key is above it. Branch-free, so its
//            speed does not depend on the data. Lines are prefetched 6 KB ahead: the hardware alone keeps too few
//            of them on their way
//   expand   words -> ascending positions in the tile -> int64 positions in the tensor
//            AVX-512 expands faster, by a compress of bytes, and at once into the tensor's. It has no compare of its own:
//            one load per cache line keeps the prefetchers less busy than AVX2's two, and read cold data 3 to 6 %
//            slower (Zen 4, 2026-11-27)
// Traffic    compare reads sizeof(scalar_t) B/elem; words and positions in the tile stay in the cache. Expand
//            writes 8 B per selected element.
// Contract   the same bits on every instruction set: integers alone.
#pragma once

#include <type_traits>

#include "cpu/isa.h"
#include "topk_magnitude/topk_magnitude.h"

#if SAFT_X86_DISPATCH
#include <immintrin.h>
#endif

namespace saft {

// Thresholds are "strictly above" and signed, as SIMD compares are: a native key of kMask + 1 ("none")
// becomes kMask, and -1 means "all".
template <class scalar_t>
using signed_key_t = std::conditional_t<sizeof(scalar_t) == 2, int16_t,
                                        std::conditional_t<sizeof(scalar_t) == 4, int32_t, int64_t>>;

template <class scalar_t>
constexpr signed_key_t<scalar_t> kBelowInf = signed_key_t<scalar_t>(KeyTraits<scalar_t>::kInf - 1);

// Of what `compare` reads of 64 elements, kAheadBytes later. Distances of 1 to 8 KB took 0.87 to 0.70 times as long as
// none on an Intel Xeon, with little between 2 and 8; on Zen 5, where one core reads 35 GB/s, 6 and 8 KB took 0.85 to 1
// times as long as 2 KB, and 16 KB no less (2 cores each, 2026-11-27). Past the caches (NTA): up to 1.7 times.
constexpr size_t kAheadBytes = 6144;

template <class scalar_t>
inline __attribute__((always_inline)) void prefetch_word(const scalar_t* x) {
  const uintptr_t ahead = reinterpret_cast<uintptr_t>(x) + kAheadBytes;  // no pointer: it may be past the end
  for (size_t line = 0; line < sizeof(scalar_t); ++line) {
    __builtin_prefetch(reinterpret_cast<const void*>(ahead + 64 * line));
  }
}

// Of the elements compared with two thresholds.
struct Seen {
  index_t num_between = 0;  // above the lower one alone
  index_t num_higher = 0;
  bool nonfinite = false;  // any of them
};

// ---- baseline ----

template <bool kBoth, class scalar_t>
void compare_baseline(const scalar_t* x, index_t num_words, signed_key_t<scalar_t> above, uint64_t* words,
                      signed_key_t<scalar_t> higher, uint64_t* higher_words, Seen& seen) {
  using skey_t = signed_key_t<scalar_t>;
  skey_t largest = 0;
  for (index_t w = 0; w < num_words; ++w, x += 64) {
    prefetch_word(x);
    uint64_t word = 0, higher_word = 0;
    for (int j = 0; j < 64; ++j) {
      const skey_t key = skey_t(native_key(x[j]));
      word |= uint64_t(key > above) << j;
      if constexpr (kBoth) {
        higher_word |= uint64_t(key > higher) << j;
        largest = key > largest ? key : largest;
      }
    }
    words[w] = word & ~higher_word;
    if constexpr (kBoth) {
      higher_words[w] = higher_word;
      seen.num_between += __builtin_popcountll(word & ~higher_word);
      seen.num_higher += __builtin_popcountll(higher_word);
    }
  }
  seen.nonfinite |= largest > kBelowInf<scalar_t>;
}

#if SAFT_X86_DISPATCH

// ---- AVX2 ----

// Bits of 32 elements from their comparisons, four of fp32 or two of 16 bits, or of 4 from one of fp64. packs works
// inside 128-bit lanes; the permutations put the groups back in order.
SAFT_TARGET_AVX2 inline uint32_t bits_of(__m256i c0, __m256i c1, __m256i c2, __m256i c3) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(c0, c1), _mm256_packs_epi32(c2, c3));
  return uint32_t(_mm256_movemask_epi8(_mm256_permutevar8x32_epi32(packed, order)));
}
SAFT_TARGET_AVX2 inline uint32_t bits_of(__m256i c0, __m256i c1) {
  return uint32_t(_mm256_movemask_epi8(_mm256_permute4x64_epi64(_mm256_packs_epi16(c0, c1), 0xd8)));
}
SAFT_TARGET_AVX2 inline uint64_t bits_of(__m256i c) {
  return uint32_t(_mm256_movemask_pd(_mm256_castsi256_pd(c)));
}

template <bool kBoth>
SAFT_TARGET_AVX2 void compare_avx2(const float* x, index_t num_words, int32_t above_, uint64_t* words,
                                   int32_t higher_, uint64_t* higher_words, Seen& seen) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  const __m256i above = _mm256_set1_epi32(above_), higher = _mm256_set1_epi32(higher_);
  __m256i largest = _mm256_setzero_si256();
  index_t num_between = 0, num_higher = 0;
  for (index_t w = 0; w < num_words; ++w) {
    prefetch_word(x);
    uint64_t word = 0, higher_word = 0;
    for (int j = 0; j < 64; j += 32, x += 32) {
      const __m256i* p = reinterpret_cast<const __m256i*>(x);
      const __m256i k0 = _mm256_and_si256(_mm256_loadu_si256(p), mask);
      const __m256i k1 = _mm256_and_si256(_mm256_loadu_si256(p + 1), mask);
      const __m256i k2 = _mm256_and_si256(_mm256_loadu_si256(p + 2), mask);
      const __m256i k3 = _mm256_and_si256(_mm256_loadu_si256(p + 3), mask);
      word |= uint64_t(bits_of(_mm256_cmpgt_epi32(k0, above), _mm256_cmpgt_epi32(k1, above),
                               _mm256_cmpgt_epi32(k2, above), _mm256_cmpgt_epi32(k3, above)))
              << j;
      if constexpr (kBoth) {
        higher_word |= uint64_t(bits_of(_mm256_cmpgt_epi32(k0, higher), _mm256_cmpgt_epi32(k1, higher),
                                        _mm256_cmpgt_epi32(k2, higher), _mm256_cmpgt_epi32(k3, higher)))
                       << j;
        const __m256i pair = _mm256_max_epi32(_mm256_max_epi32(k0, k1), _mm256_max_epi32(k2, k3));
        largest = _mm256_max_epi32(largest, pair);
      }
    }
    words[w] = word & ~higher_word;
    if constexpr (kBoth) {
      higher_words[w] = higher_word;
      num_between += __builtin_popcountll(word & ~higher_word);
      num_higher += __builtin_popcountll(higher_word);
    }
  }
  const __m256i nonfinite = _mm256_cmpgt_epi32(largest, _mm256_set1_epi32(kBelowInf<float>));
  seen.num_between += num_between;
  seen.num_higher += num_higher;
  seen.nonfinite |= _mm256_movemask_epi8(nonfinite) != 0;
}

template <bool kBoth>
SAFT_TARGET_AVX2 void compare_avx2_16bit(const uint16_t* x, index_t num_words, int16_t below_inf,
                                         int16_t above_, uint64_t* words, int16_t higher_,
                                         uint64_t* higher_words, Seen& seen) {
  const __m256i mask = _mm256_set1_epi16(0x7fff);
  const __m256i above = _mm256_set1_epi16(above_), higher = _mm256_set1_epi16(higher_);
  __m256i largest = _mm256_setzero_si256();
  index_t num_between = 0, num_higher = 0;
  for (index_t w = 0; w < num_words; ++w) {
    prefetch_word(x);
    uint64_t word = 0, higher_word = 0;
    for (int j = 0; j < 64; j += 32, x += 32) {
      const __m256i* p = reinterpret_cast<const __m256i*>(x);
      const __m256i k0 = _mm256_and_si256(_mm256_loadu_si256(p), mask);
      const __m256i k1 = _mm256_and_si256(_mm256_loadu_si256(p + 1), mask);
      word |= uint64_t(bits_of(_mm256_cmpgt_epi16(k0, above), _mm256_cmpgt_epi16(k1, above))) << j;
      if constexpr (kBoth) {
        higher_word |= uint64_t(bits_of(_mm256_cmpgt_epi16(k0, higher), _mm256_cmpgt_epi16(k1, higher))) << j;
        largest = _mm256_max_epi16(largest, _mm256_max_epi16(k0, k1));
      }
    }
    words[w] = word & ~higher_word;
    if constexpr (kBoth) {
      higher_words[w] = higher_word;
      num_between += __builtin_popcountll(word & ~higher_word);
      num_higher += __builtin_popcountll(higher_word);
    }
  }
  const __m256i nonfinite = _mm256_cmpgt_epi16(largest, _mm256_set1_epi16(below_inf));
  seen.num_between += num_between;
  seen.num_higher += num_higher;
  seen.nonfinite |= _mm256_movemask_epi8(nonfinite) != 0;
}

template <bool kBoth>
SAFT_TARGET_AVX2 void compare_avx2(const double* x, index_t num_words, int64_t above_, uint64_t* words,
                                   int64_t higher_, uint64_t* higher_words, Seen& seen) {
  const __m256i mask = _mm256_set1_epi64x(int64_t(KeyTraits<double>::kMask));
  const __m256i above = _mm256_set1_epi64x(above_), higher = _mm256_set1_epi64x(higher_);
  const __m256i below_inf = _mm256_set1_epi64x(kBelowInf<double>);
  __m256i nonfinite = _mm256_setzero_si256();
  index_t num_between = 0, num_higher = 0;
  for (index_t w = 0; w < num_words; ++w) {
    prefetch_word(x);
    uint64_t word = 0, higher_word = 0;
    for (int j = 0; j < 64; j += 4, x += 4) {
      const __m256i key = _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), mask);
      word |= bits_of(_mm256_cmpgt_epi64(key, above)) << j;
      if constexpr (kBoth) {
        higher_word |= bits_of(_mm256_cmpgt_epi64(key, higher)) << j;
        nonfinite = _mm256_or_si256(nonfinite, _mm256_cmpgt_epi64(key, below_inf));
      }
    }
    words[w] = word & ~higher_word;
    if constexpr (kBoth) {
      higher_words[w] = higher_word;
      num_between += __builtin_popcountll(word & ~higher_word);
      num_higher += __builtin_popcountll(higher_word);
    }
  }
  seen.num_between += num_between;
  seen.num_higher += num_higher;
  seen.nonfinite |= _mm256_movemask_epi8(nonfinite) != 0;
}

#endif  // SAFT_X86_DISPATCH

// words[w] bit j: key of x[64 w + j] > above. kBoth: and not > higher, of which higher_words has the bits; counts both.
template <bool kBoth, class scalar_t>
void compare(Isa isa, const scalar_t* x, index_t num_words, signed_key_t<scalar_t> above, uint64_t* words,
             signed_key_t<scalar_t> higher, uint64_t* higher_words, Seen& seen) {
#if SAFT_X86_DISPATCH
  if constexpr (sizeof(scalar_t) == 2) {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(x);
    constexpr int16_t below_inf = kBelowInf<scalar_t>;
    if (isa >= kIsaAvx2) {
      return compare_avx2_16bit<kBoth>(bits, num_words, below_inf, above, words, higher, higher_words, seen);
    }
  } else {
    if (isa >= kIsaAvx2) return compare_avx2<kBoth>(x, num_words, above, words, higher, higher_words, seen);
  }
#endif
  (void)isa;
  compare_baseline<kBoth>(x, num_words, above, words, higher, higher_words, seen);
}

// ---- occupied words ----

constexpr index_t kBlockWords = 16;  // compared, then scanned, while its 4 KB of fp32 are in L1

inline uint32_t occupied_words_baseline(const uint64_t* words, index_t num_words) {
  uint32_t occupied = 0;
  for (index_t w = 0; w < num_words; ++w) occupied |= uint32_t(words[w] != 0) << w;
  return occupied;
}

#if SAFT_X86_DISPATCH
SAFT_TARGET_AVX2 inline uint32_t occupied_words_avx2(const uint64_t* words) {
  uint32_t empty = 0;
  for (int w = 0; w < kBlockWords; w += 4) {
    const __m256i four = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + w));
    const __m256i zero = _mm256_cmpeq_epi64(four, _mm256_setzero_si256());
    empty |= uint32_t(_mm256_movemask_pd(_mm256_castsi256_pd(zero))) << w;
  }
  return empty ^ 0xffffu;
}
#endif

// Bit w: words[w] has a bit set. At most kBlockWords words.
inline uint32_t occupied_words(Isa isa, const uint64_t* words, index_t num_words) {
#if SAFT_X86_DISPATCH
  if (isa >= kIsaAvx2 && num_words == kBlockWords) return occupied_words_avx2(words);
#endif
  (void)isa;
  return occupied_words_baseline(words, num_words);
}

// ---- words to positions ----

// For each byte value: the positions of its set bits, in order, and how many.
struct BytePositions {
  alignas(64) uint8_t position[256][8];
  uint8_t count[256];
  BytePositions() : position{}, count{} {
    for (int byte = 0; byte < 256; ++byte) {
      for (int bit = 0; bit < 8; ++bit) {
        if (byte >> bit & 1) position[byte][count[byte]++] = uint8_t(bit);
      }
    }
  }
};
inline const BytePositions kBytePositions;

constexpr index_t kPositionsOverrun = 8;

using bytes8 = uint8_t __attribute__((vector_size(8)));
using shorts8 = uint16_t __attribute__((vector_size(16)));

// Loops that the compiler vectorises, compiled per instruction set.
//   positions    positions of the set bits, ascending; returns how many. Eight per byte are written whether set
//                or not (a branch per bit would be mispredicted), so up to kPositionsOverrun entries past the end
//                are touched
//   widen        out[i] = base + list[i]
// `byte_count`: how the instruction set counts the bits of a byte fastest. AVX-512 leaves these the end of a tile.
#define SAFT_DEFINE_POSITION_LOOPS(suffix, target, byte_count)                                         \
  target inline index_t positions_##suffix(const uint64_t* words, index_t num_words, uint16_t* list) { \
    uint16_t* const begin = list;                                                                      \
    shorts8 base = {};                                                                                 \
    for (index_t w = 0; w < num_words; ++w) {                                                          \
      const uint64_t word = words[w];                                                                  \
      _Pragma("GCC unroll 8") for (int b = 0; b < 64; b += 8) {                                        \
        const uint8_t byte = uint8_t(word >> b);                                                       \
        bytes8 in_byte;                                                                                \
        memcpy(&in_byte, kBytePositions.position[byte], 8);                                            \
        const shorts8 in_tile = __builtin_convertvector(in_byte, shorts8) + base;                      \
        memcpy(list, &in_tile, 16);                                                                    \
        list += byte_count(byte);                                                                      \
        base += 8;                                                                                     \
      }                                                                                                \
    }                                                                                                  \
    return list - begin;                                                                               \
  }                                                                                                    \
  target inline void widen_##suffix(const uint16_t* list, index_t n, index_t base, index_t* out) {     \
    for (index_t i = 0; i < n; ++i) out[i] = base + list[i];                                           \
  }
#define SAFT_BYTE_COUNT_TABLE(byte) kBytePositions.count[byte]
SAFT_DEFINE_POSITION_LOOPS(baseline, , SAFT_BYTE_COUNT_TABLE)
#if SAFT_X86_DISPATCH
SAFT_DEFINE_POSITION_LOOPS(avx2, SAFT_TARGET_AVX2, __builtin_popcount)
#endif
#undef SAFT_BYTE_COUNT_TABLE
#undef SAFT_DEFINE_POSITION_LOOPS

#if SAFT_X86_DISPATCH
// The first of n positions, in the tensor at once: word by word, until fewer than 64 are left. At least sixteen are written
// per word, set or not, and none past out[n]. Returns how many are done; `words` is at the first word that is not.
// Compressed in a register: a compress into memory is microcode on Zen 4.
SAFT_TARGET_AVX512 inline index_t expand_most_avx512(const uint64_t*& words, index_t base, index_t n,
                                                     index_t* out) {
  alignas(64) uint8_t bit[64];
  for (int i = 0; i < 64; ++i) bit[i] = uint8_t(i);
  const __m512i bits = _mm512_load_si512(bit);
  index_t done = 0;
  for (; n - done >= 64; ++words, base += 64) {
    const __m512i in_word = _mm512_maskz_compress_epi8(*words, bits);
    const __m512i first = _mm512_set1_epi64(base);
    const int count = __builtin_popcountll(*words);
    _mm512_store_si512(bit, in_word);
    int i = 0;
    do {
      for (const int end = i + 16; i < end; i += 8) {
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bit + i));
        _mm512_storeu_si512(out + done + i, _mm512_add_epi64(_mm512_cvtepu8_epi64(eight), first));
      }
    } while (i < count);
    done += count;
  }
  return done;
}

#define SAFT_DISPATCH_POSITION_LOOP(name, ...) \
  (isa >= kIsaAvx2 ? name##_avx2(__VA_ARGS__) : name##_baseline(__VA_ARGS__))
#else
#define SAFT_DISPATCH_POSITION_LOOP(name, ...) ((void)isa, name##_baseline(__VA_ARGS__))
#endif

inline void widen(Isa isa, const uint16_t* list, index_t n, index_t base, index_t* out) {
  SAFT_DISPATCH_POSITION_LOOP(widen, list, n, base, out);
}
// out[i] = base + position of the i-th of the n set bits. `list` has room for n + kPositionsOverrun.
inline void expand(Isa isa, const uint64_t* words, index_t num_words, index_t base, index_t n, uint16_t* list,
                   index_t* out) {
  const uint64_t* rest = words;
  index_t done = 0;
#if SAFT_X86_DISPATCH
  if (isa == kIsaAvx512) done = expand_most_avx512(rest, base, n, out);
#endif
  const index_t skipped = rest - words;
  SAFT_DISPATCH_POSITION_LOOP(positions, rest, num_words - skipped, list);
  widen(isa, list, n - done, base + 64 * skipped, out + done);
}
#undef SAFT_DISPATCH_POSITION_LOOP

}  // namespace saft
