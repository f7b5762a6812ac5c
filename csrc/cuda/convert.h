// Storage types and fp32, in which all maths is done. Rounding is to nearest even.
#pragma once

#include "../tensor.h"
#include "gpu.h"

namespace ceg {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, f16>) {
    return __float2half_rn(x);
  } else {
    static_assert(std::is_same_v<T, float>, "fp64 is for the CPU");
    return x;
  }
}

// Calls f with a value of the storage type that a tensor holds; the launcher has checked it.
template <class F>
void with_storage(DType dtype, F f) {
  switch (dtype) {
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
    default:
      return f(float{});
  }
}

// Calls f with a value of each storage type, and its name.
template <class F>
void for_each_storage(F f) {
  for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    with_storage(dtype, [&](auto storage) { f(storage, name(dtype)); });
  }
}

}  // namespace ceg
