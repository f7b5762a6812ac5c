// Four consecutive warps, the first a multiple of four: what wgmma and setmaxnreg work with.
#pragma once

#include "gpu.h"

namespace ceg {

constexpr int kWarpgroup = 4 * kWarp;  // threads

#ifdef CEG_CUDA_SIM

inline void named_barrier_sync(int id, int threads) {
  sim::barrier_sync("bar.sync", id, static_cast<unsigned>(threads));
}
inline void named_barrier_arrive(int id, int threads) {
  sim::barrier_arrive("bar.arrive", id, static_cast<unsigned>(threads));
}

template <int kRegisters>
void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
void give_registers() {
  take_registers<kRegisters>();
}

#else

// PTX ISA, "barrier{.cta}": `threads` of the block meet at barrier `id` of 16; 0 is __syncthreads'.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Counts as there and goes on.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// PTX ISA, "setmaxnreg": from now on each thread of this warpgroup has so many registers, more than
// before; it waits until others gave theirs up. The kernel must have a limit from
// __launch_bounds__, or ptxas drops the instruction.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
// Fewer than before.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#endif

}  // namespace ceg
