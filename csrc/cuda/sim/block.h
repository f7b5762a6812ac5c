// Runs a grid: block after block, one fiber per CUDA thread, switching only where a thread waits.
// Threads of a block therefore see each other's writes at once: what this cannot find is a missing
// fence. A missing barrier it finds where the order of threads matters: run several orders.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace ceg::sim {

// forward and reverse: a warp goes on until all of its threads wait. shuffled: threads take turns.
enum class Order { forward, reverse, shuffled };

// The simulated GPU.
struct Device {
  int multiprocessors = 3;         // few, so that persistent blocks get several turns
  size_t shared_limit = 99 << 10;  // bytes a block: what sm_86 and sm_120 have, the least of all
  Order order = Order::forward;
  int capability = 80;  // 90 is sm_90
};
Device& device();

// Names of the kernels that ran since the last call, in order, and of what else `launching` names.
std::vector<std::string> launched();
void launching(const char* name);

// Throws std::runtime_error where threads wait for what cannot come any more, and whatever a thread
// throws. `name`, of the kernel, is for these errors.
// `shared_most`: what the launch was allowed for static and dynamic shared memory together.
void run_grid(const char* name, dim3 grid, dim3 block, size_t shared_bytes, size_t shared_most,
              const std::function<void()>& thread);

// Of the running block: the same address for the same key; filled with bytes 0xff, which are NaN in
// every floating type and -1 in integers, and surrounded by what AddressSanitizer guards.
void* shared_memory(const void* key, size_t bytes);
void* dynamic_shared_memory();
size_t dynamic_shared_bytes();

// The calling thread waits until ready() is true. `what` is for the report of a deadlock.
void suspend_until(const char* what, bool (*ready)(const void*), const void* argument);

template <class Ready>
void wait_until(const char* what, const Ready& ready) {
  if (ready()) return;
  suspend_until(what, [](const void* r) { return (*static_cast<const Ready*>(r))(); }, &ready);
}

// For the condition of a wait: true once each time that no thread could go on. Work that may be
// done at any time until somebody waits for it is done then, as late as possible.
bool last_moment();

// Waits for `threads` threads (0: all of the block) at barrier `id`, as PTX's barrier.sync does.
void barrier_sync(const char* what, int id = 0, unsigned threads = 0);
// Counts as one of them and does not wait: barrier.arrive.
void barrier_arrive(const char* what, int id, unsigned threads);
constexpr int kBarriers = 16;  // PTX ISA, barrier{.cta}: a CTA has 16

// What each lane of `mask` hands in, in order of lanes; others' entries are garbage. Valid until
// the lane's next exchange. Throws where lanes meet in different collectives.
const void* warp_exchange_bytes(const char* what, unsigned mask, const void* mine, size_t bytes);

// The basis of every warp collective: T is what a lane hands in, the result is an array of 32.
template <class T>
const T* warp_exchange(const char* what, unsigned mask, const T& mine) {
  static_assert(std::is_trivially_copyable_v<T>, "lanes exchange registers");
  return static_cast<const T*>(warp_exchange_bytes(what, mask, &mine, sizeof(T)));
}

int lane();  // of the calling thread

// A T of the calling thread, default-constructed on first use, destroyed with the block: what
// hardware keeps for a thread outside of its registers, such as its pending asynchronous copies.
std::shared_ptr<void>& thread_state(const void* key);

template <class T>
T& thread_state() {
  static const char key = 0;
  std::shared_ptr<void>& state = thread_state(&key);
  if (!state) state = std::make_shared<T>();
  return *static_cast<T*>(state.get());
}

// Likewise one of the running block: what its asynchronous units have under way.
std::shared_ptr<void>& block_state(const void* key);

template <class T>
T& block_state() {
  static const char key = 0;
  std::shared_ptr<void>& state = block_state(&key);
  if (!state) state = std::make_shared<T>();
  return *static_cast<T*>(state.get());
}

// Throws a std::runtime_error that names the kernel, the block and the thread.
[[noreturn]] void fail(const std::string& what);

// For accesses that trap on a GPU when they are not aligned.
inline void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) {
    fail("misaligned access of " + std::to_string(bytes) + " bytes");
  }
}

}  // namespace ceg::sim
