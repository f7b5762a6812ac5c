// The copy engine (PTX ISA, "Data Movement and Conversion Instructions: cp.async.bulk.tensor").
#pragma once

#include "mbarrier.h"
#include "tensor_map.h"

namespace ceg {

#ifdef CEG_CUDA_SIM

inline void tma_prefetch(const TensorMap&) {}
inline void tma_load(SharedAddress to, const TensorMap& map, SharedAddress barrier, int column,
                     int row, int head, int batch) {
  sim::tma_load(to, map, barrier, {column, row, head, batch});
}
inline void async_proxy_fence() {}

#else

// "prefetch{u}.tensormap": a map that lies in a __grid_constant__ parameter.
__device__ __forceinline__ void tma_prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The box that begins there, swizzled, by one thread; its bytes complete on the barrier, those
// outside of the array (zeros) too.
__device__ __forceinline__ void tma_load(SharedAddress to, const TensorMap& map,
                                         SharedAddress barrier, int column, int row, int head,
                                         int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// "membar / fence: fence.proxy.async": what this thread wrote to shared memory comes before what
// the copy engine and wgmma do there next.
__device__ __forceinline__ void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#endif

}  // namespace ceg
