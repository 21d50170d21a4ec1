// sddmm / cpu.
//
// Algorithm  channels that are used (outputs of dY, inputs of X with a selected entry) are packed, a block of tokens
//            at a time, so that the tokens of a channel lie side by side; then every entry is a dot product of
//            two packed channels. Entries of one output are taken four at a time.
// Traffic    reads each used channel once: 4 B per token (fp32), a line if no channel beside it is used. Per
//            entry and token 4 B of packed x from L2, and 1 B of packed dy from L1.
// Precision  kLanes running sums per entry and block of tokens, folded by halves, blocks in ascending order.
// Threads    split by channels, then by entries; each value is computed by one thread.
// Contract   compiled with -ffp-contract=off: the same bits on every instruction set and over thread counts.

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/chunks.h"
#include "cpu/isa.h"
#include "sddmm/sddmm.h"

namespace saft {
namespace {

// Tuned on 2 cores of an AMD EPYC (Zen 3), 2026-11-24, layers of 800 tokens. 128 tokens: packing took 0.8
// to 1.0 times as long, the dot products 1.1 to 1.3 times. All tokens at once: 1.2 to 1.3 times, and 0.9
// times. Transposing blocks of 8 x 8 by shuffles made packing no faster: it waits for memory.
constexpr index_t kTokenBlock = 256;
constexpr index_t kChannelChunk = 64;    // channels packed per work item
constexpr index_t kEntryChunk = 512;     // entries per work item
constexpr int kEntriesAtOnce = 4;        // their sums fill half of AVX2's registers
constexpr index_t kSparseChannels = 64;  // channels per entry from which those that are used are sorted

template <class opmath_t>
constexpr int kLanes = 64 / int(sizeof(opmath_t));

// ---- which channels are used, by which entry ----

struct Entry {
  int32_t dy, x;  // channels, then their slots
};

// The used channels of one factor, ascending: neighbours share the lines they are read from.
struct UsedChannels {
  std::vector<int32_t> channels;  // by slot

  // Makes slots of the channels that entries name.
  UsedChannels(index_t num_channels, std::vector<Entry>& entries, int32_t Entry::* channel) {
    if (num_channels > kSparseChannels * index_t(entries.size())) {  // no table of all channels
      channels.reserve(entries.size());
      for (const Entry& entry : entries) channels.push_back(entry.*channel);
      std::sort(channels.begin(), channels.end());
      channels.erase(std::unique(channels.begin(), channels.end()), channels.end());
      for (Entry& entry : entries) {
        const auto found = std::lower_bound(channels.begin(), channels.end(), entry.*channel);
        entry.*channel = int32_t(found - channels.begin());
      }
      return;
    }
    std::vector<int32_t> slot(size_t(num_channels), -1);
    for (const Entry& entry : entries) slot[size_t(entry.*channel)] = 0;
    for (index_t c = 0; c < num_channels; ++c) {
      if (slot[size_t(c)] < 0) continue;
      slot[size_t(c)] = int32_t(channels.size());
      channels.push_back(int32_t(c));
    }
    for (Entry& entry : entries) entry.*channel = slot[size_t(entry.*channel)];
  }

  index_t count() const { return index_t(channels.size()); }
};

// False when it met an index out of range. Each is read once: what is used of it is what was checked.
template <class index_type>
bool find_entries(const SddmmParams& p, const index_type* indices, std::vector<Entry>& entries) {
  index_t output = 0, first_of_output = 0;
  for (index_t j = 0; j < p.k; ++j) {
    const index_t flat = indices[j];
    if (uint64_t(flat) >= uint64_t(p.num_outputs) * uint64_t(p.num_inputs)) return false;
    if (flat < first_of_output || flat >= first_of_output + p.num_inputs) {
      output = flat / p.num_inputs;
      first_of_output = output * p.num_inputs;
    }
    entries[size_t(j)] = {int32_t(output), int32_t(flat - first_of_output)};
  }
  return true;
}

// ---- pack ----

// `n` tokens from `first` on, of the channels with slots [begin, end): kTokenBlock values per channel, zeros
// up to the next multiple of kLanes.
template <class opmath_t, class scalar_t>
void pack(const SddmmFactor& factor, const int32_t* channels, index_t begin, index_t end, index_t first,
          index_t n, opmath_t* packed) {
  constexpr index_t kRun = kLanes<opmath_t>;
  const scalar_t* data = static_cast<const scalar_t*>(factor.data);
  for (index_t t = 0; t < n; t += kRun) {
    const index_t run = std::min(kRun, n - t);
    const scalar_t* from = data + (first + t) * factor.token_stride;
    for (index_t s = begin; s < end; ++s) {
      const scalar_t* v = from + channels[s] * factor.channel_stride;
      opmath_t* out = packed + s * kTokenBlock + t;
      for (index_t l = 0; l < run; ++l) out[l] = load_as<opmath_t>(v[l * factor.token_stride]);
      for (index_t l = run; l < kRun; ++l) out[l] = 0;
    }
  }
}

// ---- dot products ----

// sums[e] += dot(dy, x[e]) over n tokens, a multiple of kLanes. Inlined into a function per instruction set,
// which differ in the bytes of a vector; the lanes, and so the bits, are the same for all. Without the
// pragmas the sums are kept in memory.
#if defined(__GNUC__)
template <int kVectorBytes, int kEntries, class opmath_t>
inline __attribute__((always_inline)) void dot_body(const opmath_t* dy, const opmath_t* const* x, index_t n,
                                                    opmath_t* sums) {
  typedef opmath_t vector_t __attribute__((vector_size(kVectorBytes)));
  constexpr int kWidth = kVectorBytes / int(sizeof(opmath_t)), kVectors = 64 / kVectorBytes;
  vector_t acc[kEntries][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kEntries * kVectors; ++i) acc[i / kVectors][i % kVectors] = vector_t{};
  for (index_t t = 0; t < n; t += kLanes<opmath_t>) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      vector_t a;
      std::memcpy(&a, dy + t + v * kWidth, kVectorBytes);
#pragma GCC unroll 4
      for (int e = 0; e < kEntries; ++e) {
        vector_t b;
        std::memcpy(&b, x[e] + t + v * kWidth, kVectorBytes);
        acc[e][v] += a * b;
      }
    }
  }
#pragma GCC unroll 4
  for (int e = 0; e < kEntries; ++e) {
    if constexpr (kVectors >= 4) {
      acc[e][0] += acc[e][2];
      acc[e][1] += acc[e][3];
    }
    if constexpr (kVectors >= 2) acc[e][0] += acc[e][1];
    opmath_t lanes[kWidth];
    std::memcpy(lanes, &acc[e][0], kVectorBytes);
#pragma GCC unroll 4
    for (int width = kWidth / 2; width > 0; width /= 2) {
#pragma GCC unroll 8
      for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
    }
    sums[e] += lanes[0];
  }
}
#else
template <int, int kEntries, class opmath_t>
inline void dot_body(const opmath_t* dy, const opmath_t* const* x, index_t n, opmath_t* sums) {
  for (int e = 0; e < kEntries; ++e) {
    opmath_t lanes[kLanes<opmath_t>] = {};
    for (index_t t = 0; t < n; t += kLanes<opmath_t>) {
      for (int l = 0; l < kLanes<opmath_t>; ++l) lanes[l] += dy[t + l] * x[e][t + l];
    }
    for (int width = kLanes<opmath_t> / 2; width > 0; width /= 2) {
      for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
    }
    sums[e] += lanes[0];
  }
}
#endif

#if SAFT_X86_DISPATCH
template <int kEntries, class opmath_t>
SAFT_TARGET_AVX2 void dot_avx2(const opmath_t* dy, const opmath_t* const* x, index_t n, opmath_t* sums) {
  dot_body<32, kEntries>(dy, x, n, sums);
}
template <int kEntries, class opmath_t>
SAFT_TARGET_AVX512 void dot_avx512(const opmath_t* dy, const opmath_t* const* x, index_t n, opmath_t* sums) {
  dot_body<64, kEntries>(dy, x, n, sums);
}
#endif

template <int kEntries, class opmath_t>
void dot(Isa isa, const opmath_t* dy, const opmath_t* const* x, index_t n, opmath_t* sums) {
#if SAFT_X86_DISPATCH
  if (isa == kIsaAvx512) return dot_avx512<kEntries>(dy, x, n, sums);
  if (isa == kIsaAvx2) return dot_avx2<kEntries>(dy, x, n, sums);
#endif
  (void)isa;
  dot_body<16, kEntries>(dy, x, n, sums);
}

// Adds one block of tokens to the sums of entries [begin, end).
template <class opmath_t>
void add_dots(Isa isa, const Entry* entries, index_t begin, index_t end, const opmath_t* dy,
              const opmath_t* x, index_t n, opmath_t* sums) {
  for (index_t j = begin; j < end;) {
    const int32_t output = entries[j].dy;
    const opmath_t* const a = dy + output * kTokenBlock;
    const opmath_t* b[kEntriesAtOnce];
    int at_once = 0;
    while (at_once < kEntriesAtOnce && j + at_once < end && entries[j + at_once].dy == output) {
      b[at_once] = x + entries[j + at_once].x * kTokenBlock;
      ++at_once;
    }
    switch (at_once) {
      case 4:
        dot<4>(isa, a, b, n, sums + j);
        break;
      case 3:
        dot<3>(isa, a, b, n, sums + j);
        break;
      case 2:
        dot<2>(isa, a, b, n, sums + j);
        break;
      default:
        dot<1>(isa, a, b, n, sums + j);
    }
    j += at_once;
  }
}

// ---- entry ----

template <class opmath_t, class scalar_t>
bool run(const SddmmParams& p, int num_threads, Isa isa) {
  std::vector<Entry> entries(size_t(p.k));
  bool in_range = false;
  dispatch_index(p.indices, p.index_bytes,
                 [&](const auto* indices) { in_range = find_entries(p, indices, entries); });
  if (!in_range) return false;
  const UsedChannels used_dy(p.num_outputs, entries, &Entry::dy), used_x(p.num_inputs, entries, &Entry::x);
  const index_t num_dy = used_dy.count(), num_x = used_x.count();
  // not a vector: nothing here needs to be zero
  const std::unique_ptr<opmath_t[]> packed(new opmath_t[size_t((num_dy + num_x) * kTokenBlock)]);
  opmath_t* const dy = packed.get();
  opmath_t* const x = dy + num_dy * kTokenBlock;
  std::vector<opmath_t> sums(size_t(p.k), opmath_t(0));
  const index_t dy_chunks = ceil_div(num_dy, kChannelChunk), x_chunks = ceil_div(num_x, kChannelChunk);
  for (index_t first = 0; first < p.num_tokens; first += kTokenBlock) {
    const index_t n = std::min(kTokenBlock, p.num_tokens - first);
    const index_t padded = ceil_div(n, kLanes<opmath_t>) * kLanes<opmath_t>;
    parallel_for(dy_chunks + x_chunks, 1, num_threads, [&](index_t chunk, int) {
      const bool is_dy = chunk < dy_chunks;
      const std::vector<int32_t>& channels = is_dy ? used_dy.channels : used_x.channels;
      const index_t begin = (is_dy ? chunk : chunk - dy_chunks) * kChannelChunk;
      const index_t end = std::min(begin + kChannelChunk, index_t(channels.size()));
      pack<opmath_t, scalar_t>(is_dy ? p.dy : p.x, channels.data(), begin, end, first, n, is_dy ? dy : x);
    });
    parallel_for(ceil_div(p.k, kEntryChunk), 1, num_threads, [&](index_t chunk, int) {
      const index_t begin = chunk * kEntryChunk, end = std::min(p.k, begin + kEntryChunk);
      add_dots(isa, entries.data(), begin, end, dy, x, padded, sums.data());
    });
  }
  opmath_t* values = static_cast<opmath_t*>(p.values);
  for (index_t j = 0; j < p.k; ++j)
    values[j] = p.accumulate != 0 ? values[j] + sums[size_t(j)] : sums[size_t(j)];
  return true;
}

}  // namespace

bool sddmm_cpu(const SddmmParams& params, int num_threads, int requested_isa) {
  const Isa isa = resolve_isa(requested_isa);
  switch (params.dtype) {
    case ScalarType::kFloat32:
      return run<float, float>(params, num_threads, isa);
    case ScalarType::kBFloat16:
      return run<float, bfloat16>(params, num_threads, isa);
    case ScalarType::kFloat16:
      return run<float, float16>(params, num_threads, isa);
    case ScalarType::kFloat64:
      return run<double, double>(params, num_threads, isa);
  }
  return false;
}

}  // namespace saft
