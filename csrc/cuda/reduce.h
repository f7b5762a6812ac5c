// Sums over warps and blocks, in an order that depends on nothing but their sizes.
#pragma once

#include "gpu.h"

namespace ceg {

// The same bits in every lane: a butterfly adds the same two numbers on both sides of a pair.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int bits = kWarp / 2; bits; bits /= 2) value += __shfl_xor_sync(kFullWarp, value, bits);
  return value;
}

// The sum over a block of kThreads threads, in every thread. `scratch` is shared memory that two
// sums may use in turn without a barrier of the caller's in between.
template <int kThreads>
struct BlockSum {
  static_assert(kThreads % kWarp == 0 && kThreads <= kWarp * kWarp, "the last step is one warp's");
  float warps[2][kThreads / kWarp];

  // `turn` counts the sums of the block: even and odd ones use different halves.
  __device__ __forceinline__ float operator()(float value, int turn) {
    if constexpr (kThreads == kWarp) return warp_sum(value);
    float* mine = warps[turn & 1];
    value = warp_sum(value);
    if (threadIdx.x % kWarp == 0) mine[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = threadIdx.x % kWarp < kThreads / kWarp ? mine[threadIdx.x % kWarp] : 0.0f;
    return warp_sum(value);
  }
};

}  // namespace ceg
