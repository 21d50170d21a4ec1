// cuda_host: runs CUDA kernels on the CPU, for the tests. A fiber per thread, switched at barriers, warp collectives
// and sleeps; a few blocks at a time, in turns. It stands in for <cuda_runtime.h>.
//
// What it checks that a GPU would not: shared memory holds garbage at the start of a block, the order of
// threads and blocks is chosen by a seed, a collective that some lanes of the warp never reach or reach by
// another call is an error, as is a wait for what nobody will do, AddressSanitizer sees every access, and
// ThreadSanitizer every race, of threads and of blocks: what orders them is barriers, warp collectives, kernels,
// and atomics between fences. What it cannot show: speed.
#pragma once

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

#define SAFT_CUDA_HOST 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// AddressSanitizer guards static arrays. Without it they are thread-local, so that they lie together in the
// module's TLS block, which can be filled with garbage; blocks that run at the same time have a thread each.
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

struct uint4 {
  uint32_t x, y, z, w;
} __attribute__((aligned(16)));

struct cuda_host_index {
  unsigned x;
};
inline cuda_host_index threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = size_t(256) << 10;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_host: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

// ---- fibers ----

#if defined(__x86_64__)
using Context = void*;  // the stack pointer; callee-saved registers are on the stack
extern "C" void cuda_host_switch(void** save, void* load);
#if defined(CUDA_HOST_IMPLEMENTATION)
__asm__(R"(
.text
.globl cuda_host_switch
.type cuda_host_switch, @function
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_host_switch, .-cuda_host_switch
)");
#endif
inline void switch_context(Context& save, Context& load) { cuda_host_switch(&save, load); }
inline void make_context(Context& context, char* stack, void (*entry)()) {
  void** top =
      reinterpret_cast<void**>(stack + kStackBytes) - 2;  // `entry` starts with the alignment of a call
  *top = reinterpret_cast<void*>(entry);
  context = top - 6;
}
#else
using Context = ucontext_t;
inline void switch_context(Context& save, Context& load) { swapcontext(&save, &load); }
inline void make_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

enum class Wait { kNone, kWarp, kBlock, kDone };

struct Fiber {
  Context context{};
  char* stack = nullptr;
  Wait wait = Wait::kDone;
  void* fake_stack = nullptr;
  void* tsan = nullptr;
  bool has_fence = false;          // since the last barrier: its atomics tell what it knows
  std::vector<const void*> heard;  // atomics that it has read since its last fence
};

// Lanes of a warp meet here: the last to arrive releases the others.
struct Warp {
  uint64_t arriving[kLanes], values[kLanes];
  int num_arrived = 0;
  const char* operation = nullptr;
};

// One that runs.
struct Block {
  std::deque<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned> order;  // of its threads
  unsigned index = 0, num_alive = 0, num_at_barrier = 0;
};

struct Scheduler {
  std::deque<Block> blocks;       // as many as run at a time, in turns
  std::vector<unsigned> waiting;  // blocks that have not started, the next one last
  unsigned num_running = 1, turn = 0, turns_asleep = 0;
  std::mutex mutex;
  std::condition_variable turn_changed;
  Block* block = nullptr;  // whose turn it is
  Context main;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
  void* main_fake_stack = nullptr;
  void* main_tsan = nullptr;
  const std::function<void()>* body = nullptr;
  unsigned current = 0;  // thread of the block
  unsigned num_threads = 0;
  bool slept = false;
  uint64_t seed = 0;  // 0: ascending order of threads and blocks; 1: descending; else random
  unsigned num_resident = 1;

  Fiber& fiber() { return block->fibers[current]; }
  uint64_t random() {
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
  }
  void shuffle(std::vector<unsigned>& order) {
    if (seed == 1) std::reverse(order.begin(), order.end());
    if (seed < 2) return;
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
  }
};

inline Scheduler scheduler;

// ---- what orders memory, for ThreadSanitizer ----

#if defined(__SANITIZE_THREAD__)
inline void release(const void* at) { __tsan_release(const_cast<void*>(at)); }
inline void acquire(const void* at) { __tsan_acquire(const_cast<void*>(at)); }
#else
inline void release(const void*) {}
inline void acquire(const void*) {}
#endif

// The harness's own memory is no business of ThreadSanitizer's.
struct Unseen {
#if defined(__SANITIZE_THREAD__)
  Unseen() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
  ~Unseen() { AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0); }
#endif
  int unused = 0;
};

inline Fiber& current_fiber() {
  Unseen unseen;
  return scheduler.fiber();
}

// Before and after an atomic operation, which by itself orders nothing.
inline void before_atomic(const void* at) {
  Unseen unseen;
  if (scheduler.fiber().has_fence) release(at);
}
inline void after_atomic(const void* at) {
  Unseen unseen;
#if defined(__SANITIZE_THREAD__)
  scheduler.fiber().heard.push_back(at);
#endif
  (void)at;
}
inline void fence() {
  Unseen unseen;
  Fiber& fiber = scheduler.fiber();
  for (const void* at : fiber.heard) acquire(at);
  fiber.heard.clear();
  fiber.has_fence = true;
}

// ---- threads ----

inline void yield_to_main() {
  Fiber& fiber = current_fiber();
#if defined(__SANITIZE_ADDRESS__)
  const bool done = fiber.wait == Wait::kDone;
  __sanitizer_start_switch_fiber(done ? nullptr : &fiber.fake_stack, scheduler.main_stack,
                                 scheduler.main_stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(scheduler.main_tsan, __tsan_switch_to_fiber_no_sync);
#endif
  switch_context(fiber.context, scheduler.main);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler.main_stack, &scheduler.main_stack_bytes);
#endif
}

inline void resume(unsigned thread) {
  scheduler.current = thread;
  threadIdx.x = thread;
  Fiber& fiber = scheduler.fiber();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler.main_fake_stack, fiber.stack, kStackBytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  switch_context(scheduler.main, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler.main_fake_stack, nullptr, nullptr);
#endif
}

inline void release_barrier_if_full() {
  Block& block = *scheduler.block;
  if (block.num_at_barrier == 0 || block.num_at_barrier != block.num_alive) return;
  block.num_at_barrier = 0;
  for (Fiber& fiber : block.fibers) {
    if (fiber.wait == Wait::kBlock) fiber.wait = Wait::kNone;
  }
}

inline void fiber_entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.main_stack, &scheduler.main_stack_bytes);
#endif
  Block* const block = scheduler.block;
  acquire(&scheduler.body);  // what kernels before this one did
  acquire(&block->fibers);   // and blocks that had this one's shared memory
  (*scheduler.body)();
  release(&scheduler.waiting);
  release(&block->fibers);
  {
    Unseen unseen;
    scheduler.fiber().wait = Wait::kDone;
    --block->num_alive;
    release_barrier_if_full();
  }
  yield_to_main();
  fail("a finished thread was resumed");
}

// ---- blocks ----

// Shared memory holds whatever the last block left there, or worse.
inline void spoil_shared_memory() {
#if !defined(__SANITIZE_ADDRESS__)
  static thread_local char in_shared_memory;
  char* volatile touched = &in_shared_memory;  // it exists from here on
  (void)touched;
  dl_iterate_phdr(
      [](dl_phdr_info* module, size_t, void* here) {
        bool mine = false;
        size_t tls_bytes = 0;
        for (int i = 0; i < module->dlpi_phnum; ++i) {
          const ElfW(Phdr) & part = module->dlpi_phdr[i];
          const uintptr_t start = module->dlpi_addr + part.p_vaddr,
                          address = reinterpret_cast<uintptr_t>(here);
          mine |= part.p_type == PT_LOAD && address >= start && address < start + part.p_memsz;
          if (part.p_type == PT_TLS) tls_bytes = part.p_memsz;
        }
        if (mine && module->dlpi_tls_data != nullptr) std::memset(module->dlpi_tls_data, 0xb5, tls_bytes);
        return mine ? 1 : 0;
      },
      &scheduler);
#endif
}

inline void start_block(Block& block, unsigned index) {
  Scheduler& s = scheduler;
  block.index = index;
  block.num_alive = s.num_threads;
  block.num_at_barrier = 0;
  block.warps.assign((s.num_threads + kLanes - 1) / kLanes, {});
  spoil_shared_memory();
  while (block.fibers.size() < s.num_threads) {
    Fiber fiber;
    fiber.stack = static_cast<char*>(
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (fiber.stack == MAP_FAILED) fail("no memory for stacks");
    block.fibers.push_back(fiber);
  }
  block.order.resize(s.num_threads);
  for (unsigned t = 0; t < s.num_threads; ++t) {
    Fiber& fiber = block.fibers[t];
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
#if defined(__SANITIZE_THREAD__)
    if (fiber.tsan == nullptr) fiber.tsan = __tsan_create_fiber(0);
#endif
    make_context(fiber.context, fiber.stack, fiber_entry);
    fiber.wait = Wait::kNone;
    fiber.has_fence = false;
    fiber.heard.clear();
    block.order[t] = t;
  }
  s.shuffle(block.order);
}

// Each thread of a block, until it waits.
inline void run_threads(Block& block) {
  Scheduler& s = scheduler;
  s.block = &block;
  blockIdx.x = block.index;
  s.slept = false;
  bool ran = false;
  for (unsigned t : block.order) {
    if (block.fibers[t].wait != Wait::kNone) continue;
    resume(t);
    ran = true;
  }
  if (!ran) fail("deadlock: threads wait for a barrier or a warp operation that others never reach");
  s.turns_asleep = s.slept ? s.turns_asleep + 1 : 0;
  if (s.turns_asleep > 100000) fail("deadlock: blocks wait for what no other one does");
}

// Blocks one after the other, in the turns of this one of `scheduler.blocks`.
inline void run_blocks(unsigned slot) {
  Unseen unseen;
  Scheduler& s = scheduler;
  Block& block = s.blocks[slot];
  for (bool is_done = false; !is_done;) {
    std::unique_lock<std::mutex> lock(s.mutex);
    s.turn_changed.wait(lock, [&] { return s.turn == slot; });
#if defined(__SANITIZE_THREAD__)
    s.main_tsan = __tsan_get_current_fiber();
#endif
    if (block.num_alive == 0 && !s.waiting.empty()) {
      start_block(block, s.waiting.back());
      s.waiting.pop_back();
    }
    const bool lags = s.seed > 1 && s.num_running > 1 && s.random() % 4 == 0;
    if (block.num_alive > 0 && !lags) run_threads(block);
    is_done = s.waiting.empty() &&
              std::all_of(s.blocks.begin(), s.blocks.end(), [](const Block& b) { return b.num_alive == 0; });
    s.turn = (slot + 1) % s.num_running;
    s.turn_changed.notify_all();
  }
}

inline void launch(const char* name, unsigned grid, unsigned block, const std::function<void()>& body) {
  if (grid == 0 || block == 0 || block > 1024 || block % kLanes != 0) {
    std::fprintf(stderr, "cuda_host: bad launch of %s: grid %u, block %u\n", name, grid, block);
    std::abort();
  }
  gridDim.x = grid;
  blockDim.x = block;
  Scheduler& s = scheduler;
  s.num_threads = block;
  s.body = &body;
  s.waiting.resize(grid);
  for (unsigned b = 0; b < grid; ++b) s.waiting[b] = grid - 1 - b;
  s.shuffle(s.waiting);
  s.turn = 0;
  release(&s.body);
#if defined(__SANITIZE_ADDRESS__)
  s.num_running = 1;  // the arrays that it guards are there once
#else
  s.num_running = std::min(s.num_resident, grid);
#endif
  while (s.blocks.size() < s.num_running) s.blocks.emplace_back();
  std::vector<std::thread> others;
  for (unsigned slot = 1; slot < s.num_running; ++slot) others.emplace_back(run_blocks, slot);
  run_blocks(0);
  for (std::thread& other : others) other.join();
  acquire(&s.waiting);
}

// Every lane of the warp calls this; each gets what all of them brought.
inline const uint64_t* exchange(unsigned mask, uint64_t value, const char* operation) {
  if (mask != 0xffffffffu) fail("only full masks are supported");
  Unseen unseen;
  Block& block = *scheduler.block;
  const unsigned lane = scheduler.current % kLanes;
  Warp& warp = block.warps[scheduler.current / kLanes];
  if (warp.num_arrived == 0) warp.operation = operation;
  if (std::strcmp(warp.operation, operation) != 0)
    fail("the lanes of a warp are in different warp operations");
  warp.arriving[lane] = value;
  release(&warp);
  if (++warp.num_arrived == kLanes) {
    warp.num_arrived = 0;
    std::memcpy(warp.values, warp.arriving, sizeof(warp.values));
    const unsigned first = scheduler.current - lane;
    for (unsigned l = 0; l < kLanes; ++l) block.fibers[first + l].wait = Wait::kNone;
  } else {
    scheduler.fiber().wait = Wait::kWarp;
    yield_to_main();
  }
  acquire(&warp);
  return warp.values;
}

template <class T>
uint64_t to_word(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}
template <class T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

template <class T>
T load_relaxed(const T* address) {
  const T value = __atomic_load_n(address, __ATOMIC_RELAXED);
  after_atomic(address);
  return value;
}

}  // namespace cuda_host

// ---- device functions ----

inline void __syncthreads() {
  cuda_host::Unseen unseen;
  cuda_host::Block& block = *cuda_host::scheduler.block;
  cuda_host::release(&block);
  cuda_host::scheduler.fiber().wait = cuda_host::Wait::kBlock;
  ++block.num_at_barrier;
  cuda_host::release_barrier_if_full();
  cuda_host::yield_to_main();
  cuda_host::acquire(&block);
  cuda_host::scheduler.fiber().has_fence = false;  // what the barrier brought came after it
}
inline void __syncwarp() { cuda_host::exchange(0xffffffffu, 0, "syncwarp"); }
inline void __threadfence() { cuda_host::fence(); }
inline void __nanosleep(unsigned) {
  cuda_host::Unseen unseen;
  cuda_host::scheduler.slept = true;
  cuda_host::yield_to_main();
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return cuda_host::from_word<T>(cuda_host::exchange(mask, cuda_host::to_word(value), "shfl")[source & 31]);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  const unsigned lane = threadIdx.x % 32;
  const uint64_t* values = cuda_host::exchange(mask, cuda_host::to_word(value), "shfl_xor");
  return cuda_host::from_word<T>(values[(lane ^ unsigned(lane_mask)) & 31]);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  const unsigned lane = threadIdx.x % 32;
  const uint64_t* values = cuda_host::exchange(mask, cuda_host::to_word(value), "shfl_up");
  return lane < delta ? value : cuda_host::from_word<T>(values[lane - delta]);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  const uint64_t* values = cuda_host::exchange(mask, predicate, "ballot");
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= unsigned(values[lane] != 0) << lane;
  return bits;
}
inline bool __any_sync(unsigned mask, bool predicate) {
  const uint64_t* values = cuda_host::exchange(mask, predicate, "any");
  return std::any_of(values, values + 32, [](uint64_t v) { return v != 0; });
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  const uint64_t* values = cuda_host::exchange(mask, value, "reduce_add");
  unsigned sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += unsigned(values[lane]);
  return sum;
}

template <class T>
T atomicAdd(T* address, T value) {
  cuda_host::before_atomic(address);
  const T before = __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
  cuda_host::after_atomic(address);
  return before;
}
inline unsigned atomicOr(unsigned* address, unsigned value) {
  cuda_host::before_atomic(address);
  const unsigned before = __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
  cuda_host::after_atomic(address);
  return before;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1u) << (31 - bit);
  return reversed;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll((unsigned long long)x); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return unsigned(((uint64_t(high) << 32 | low) << (shift & 31)) >> 32);
}
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return uint64_t((unsigned __int128)a * b >> 64); }
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}

// ---- runtime ----

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMinor ? 0
           : attribute == cudaDevAttrMultiProcessorCount  ? 2
                                                          : 9;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}
