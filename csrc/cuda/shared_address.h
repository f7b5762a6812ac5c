// Addresses of shared memory as PTX instructions take them (PTX ISA, "State Spaces: shared").
#pragma once

#include "gpu.h"

namespace ceg {

// Counted in bytes from the start of the block's shared memory: half the registers and half the
// arithmetic of a pointer.
#ifdef CEG_CUDA_SIM
using SharedAddress = uintptr_t;
inline SharedAddress shared_address(const void* p) { return reinterpret_cast<SharedAddress>(p); }
template <class T>
T* shared_pointer(SharedAddress address) {
  sim::check_aligned(reinterpret_cast<T*>(address), alignof(T));
  return reinterpret_cast<T*>(address);
}
#else
using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress shared_address(const void* p) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(p));
}
template <class T>
__device__ __forceinline__ T* shared_pointer(SharedAddress address) {
  return static_cast<T*>(__cvta_shared_to_generic(address));
}
#endif

}  // namespace ceg
