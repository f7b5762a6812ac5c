// Copies from global to shared memory that run beside the computation (PTX ISA, "Data Movement and
// Conversion Instructions: cp.async", ".commit_group", ".wait_group", ".wait_all").
#pragma once

#include "shared_address.h"

#ifdef CEG_CUDA_SIM
#include <cstring>
#include <deque>
#include <vector>
#endif

namespace ceg {

#ifdef CEG_CUDA_SIM

namespace sim {

struct PendingCopy {
  void* to;
  size_t size;
  unsigned char bytes[16];
};

struct PendingCopies {
  std::vector<PendingCopy> open;  // of no group yet
  std::deque<std::vector<PendingCopy>> groups;
};

// A copy may land at any time until it is waited for. With threads in reverse order it lands at
// once, which shows who still reads what it overwrites; else as late as possible, which shows who
// reads too early.
template <size_t kBytes>
void cp_async(SharedAddress address, const void* from, bool there) {
  void* const to = reinterpret_cast<void*>(address);
  check_aligned(to, kBytes);
  if (there) check_aligned(from, kBytes);
  PendingCopy copy = {to, kBytes, {}};
  if (there) std::memcpy(copy.bytes, from, kBytes);
  if (device().order == Order::reverse) {
    std::memcpy(to, copy.bytes, kBytes);
  } else {
    thread_state<PendingCopies>().open.push_back(copy);
  }
}

}  // namespace sim

inline void cp_async_16(SharedAddress to, const void* from, bool there) {
  sim::cp_async<16>(to, from, there);
}
inline void cp_async_4(SharedAddress to, const void* from, bool there) {
  sim::cp_async<4>(to, from, there);
}

inline void cp_async_commit() {
  auto& pending = sim::thread_state<sim::PendingCopies>();
  pending.groups.push_back(std::move(pending.open));
  pending.open.clear();
}

template <int kGroups>
void cp_async_wait() {
  auto& groups = sim::thread_state<sim::PendingCopies>().groups;
  for (; groups.size() > kGroups; groups.pop_front()) {
    for (const sim::PendingCopy& copy : groups.front()) {
      std::memcpy(copy.to, copy.bytes, copy.size);
    }
  }
}

inline void cp_async_wait_all() {
  cp_async_commit();
  cp_async_wait<0>();
}

#else

// 16 bytes, past L1; zeros where there is nothing to copy, `from` is not read then.
__device__ __forceinline__ void cp_async_16(SharedAddress to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
}

// 4 bytes, which only the path through L1 takes.
__device__ __forceinline__ void cp_async_4(SharedAddress to, const void* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(there ? 4 : 0)
               : "memory");
}

// What this thread has issued since the last commit becomes a group.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until all but the last kGroups groups of this thread have landed.
template <int kGroups>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Until all copies of this thread have landed, of a group or not.
__device__ __forceinline__ void cp_async_wait_all() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

#endif

}  // namespace ceg
