// cuda / upload: bytes from the host to the device as kernel arguments.
//
// Why not a copy from pinned memory: arguments belong to the launch, and to the node of a CUDA graph that
// captures it. There is no buffer to keep alive, none to reuse too early, and no difference under capture.
// Meant for tables of at most a few hundred KB that seldom change.
#pragma once

#include <cstring>
#include <vector>

#include "cuda/primitives.h"

namespace saft {

#if !defined(SAFT_CUDA_UPLOAD_WORDS)  // the tests make it small
#define SAFT_CUDA_UPLOAD_WORDS (kMaxArgumentBytes / 8 - 4)
#endif
constexpr int kUploadWords = SAFT_CUDA_UPLOAD_WORDS;
constexpr int kUploadThreads = 256;

struct UploadWords {
  uint64_t word[kUploadWords];
};

static __global__ __launch_bounds__(kUploadThreads) void upload_kernel(
    const __grid_constant__ UploadWords from, uint64_t* to, int num_words, uint64_t* cleared,
    int num_cleared) {
  let_next_kernel_start();
  const int thread = int(blockIdx.x * kUploadThreads + threadIdx.x),
            num_threads = int(gridDim.x) * kUploadThreads;
  for (int i = thread; i < num_words; i += num_threads) to[i] = from.word[i];
  for (int i = thread; i < num_cleared; i += num_threads) cleared[i] = 0;
}

// Enqueues the writes; `words` may change once this returns. `cleared`: memory that is zeroed with them, of few bytes, a
// multiple of 8: a launch less than with a memset.
inline void upload(const std::vector<uint64_t>& words, void* device, cudaStream_t stream,
                   void* cleared = nullptr, size_t cleared_bytes = 0) {
  UploadWords part;
  int num_cleared = int(cleared_bytes / sizeof(uint64_t));
  for (size_t first = 0; first < words.size(); first += kUploadWords) {
    const size_t n = std::min<size_t>(kUploadWords, words.size() - first);
    std::memcpy(part.word, words.data() + first, n * sizeof(uint64_t));
    SAFT_LAUNCH(upload_kernel, unsigned(1 + num_cleared / (4 * kUploadThreads)), kUploadThreads, stream, part,
                static_cast<uint64_t*>(device) + first, int(n), static_cast<uint64_t*>(cleared), num_cleared);
    num_cleared = 0;
  }
}

// A table under construction: words, and where a word will be on the device.
class TableBuilder {
 public:
  explicit TableBuilder(const void* device) : device_(static_cast<const uint64_t*>(device)) {}

  template <class T>
  void append(const T* items, size_t n) {
    static_assert(sizeof(T) % sizeof(uint64_t) == 0, "");
    const size_t at = words_.size();
    words_.resize(at + n * (sizeof(T) / sizeof(uint64_t)));
    if (n > 0) std::memcpy(words_.data() + at, items, n * sizeof(T));
  }
  const uint64_t* end() const { return device_ + words_.size(); }
  const std::vector<uint64_t>& words() const { return words_; }

 private:
  const uint64_t* device_;
  std::vector<uint64_t> words_;
};

}  // namespace saft
