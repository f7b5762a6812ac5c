// Copies from global to shared memory that run beside the computation (PTX ISA, "Data Movement and
// Conversion Instructions: cp.async", ".commit_group", ".wait_group",
// ".wait_all").
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
  unsigned char bytes[16];
};

struct PendingCopies {
  std::vector<PendingCopy> open;  // of no group yet
  std::deque<std::vector<PendingCopy>> groups;
};

}  // namespace sim

// A copy may land at any time until it is waited for. With threads in reverse order it lands at
// once, which shows who still reads what it overwrites; else as late as possible, which shows who
// reads too early.
inline void cp_async_16(SharedAddress address, const void* from, bool there) {
  void* const to = reinterpret_cast<void*>(address);
  sim::check_aligned(to, 16);
  if (there) sim::check_aligned(from, 16);
  sim::PendingCopy copy = {to, {}};
  if (there) std::memcpy(copy.bytes, from, 16);
  if (sim::device().order == sim::Order::reverse) {
    std::memcpy(to, copy.bytes, 16);
  } else {
    sim::thread_state<sim::PendingCopies>().open.push_back(copy);
  }
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
    for (const sim::PendingCopy& copy : groups.front()) std::memcpy(copy.to, copy.bytes, 16);
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
