// The CUDA language for kernels: nvcc's own, or, where g++ compiles a kernel for the tests
// (CEG_CUDA_SIM), the functional simulator's.
#pragma once

#ifdef CEG_CUDA_SIM
#include "sim/language.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <type_traits>

// Whether this pass of the compiler may use what only sm_90a has (wgmma, setmaxnreg).
#if defined(CEG_CUDA_SIM) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CEG_SM90A 1
#else
#define CEG_SM90A 0
#endif

namespace ceg {

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// For __launch_bounds__: blocks a multiprocessor that leave each thread so many of its 65536
// registers. Left to itself, nvcc 13.0 aims at fewer and at times spills a few bytes to get there.
constexpr int resident(int threads, int registers) {
  return 65536 / registers / threads > 0 ? 65536 / registers / threads : 1;
}

// A block's shared memory, as a reference to a struct: the same for each call with the same T. It
// starts uninitialised; the simulator fills it with NaNs for each block.
template <class T>
__device__ __forceinline__ T& shared_memory() {
  static_assert(std::is_trivially_default_constructible_v<T>, "nobody runs its constructor");
#ifdef CEG_CUDA_SIM
  static const char key = 0;
  return *static_cast<T*>(sim::shared_memory(&key, sizeof(T)));
#else
  __shared__ T storage;
  return storage;
#endif
}

// The bytes that the launch asked for (Launch::shared_bytes).
__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
#ifdef CEG_CUDA_SIM
  return static_cast<unsigned char*>(sim::dynamic_shared_memory());
#else
  // Tiles that TMA swizzles start at multiples of 1024 bytes.
  extern __shared__ __align__(1024) unsigned char ceg_dynamic_shared[];
  return ceg_dynamic_shared;
#endif
}

}  // namespace ceg
