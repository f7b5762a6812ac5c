// Access to memory in vectors of 16 bytes, and one element at a time where alignment forbids them.
#pragma once

#include <cstring>

#include "../tensor.h"
#include "convert.h"
#include "gpu.h"

namespace ceg {

template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements of the widest access

// The type of one access to N elements of T.
template <class T, int N>
using Access = std::conditional_t<
    N * sizeof(T) == 16, uint4,
    std::conditional_t<N * sizeof(T) == 8, uint2,
                       std::conditional_t<N * sizeof(T) == 4, unsigned, unsigned short>>>;

// N elements as they lie in memory. Kept in registers in this form where they are used twice.
template <class T, int N>
struct Pack {
  static_assert(N * sizeof(T) <= 16 && (N & (N - 1)) == 0, "one access loads it");
  static_assert(sizeof(Access<T, N>) == N * sizeof(T), "an access is as wide as the elements");
  Access<T, N> raw;

  __device__ __forceinline__ void unpack(float (&to)[N]) const {
    T items[N];
    memcpy(items, &raw, sizeof(raw));
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = to_float(items[i]);
  }
  static __device__ __forceinline__ Pack of(const float (&from)[N]) {
    T items[N];
#pragma unroll
    for (int i = 0; i < N; ++i) items[i] = from_float<T>(from[i]);
    Pack pack;
    memcpy(&pack.raw, items, sizeof(items));
    return pack;
  }
};

// What is read once must not push out of the caches what is read again.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_once(const T* p) {
  return {__ldcs(reinterpret_cast<const Access<T, N>*>(p))};
}

// Through the path for data that nothing writes while the kernel runs.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_constant(const T* p) {
  return {__ldg(reinterpret_cast<const Access<T, N>*>(p))};
}

template <int N, class T>
__device__ __forceinline__ void store(T* p, const float (&values)[N]) {
  static_assert(std::is_trivially_copyable_v<T>, "stored as bytes");
  // Not an assignment: nvcc 13.0 split some of those into stores of four bytes.
  __stwb(reinterpret_cast<Access<T, N>*>(p), Pack<T, N>::of(values).raw);
}

// Whether every row of the last dimension starts at a multiple of 16 bytes and is a whole number of
// vectors long.
inline bool vectorizable(const Tensor& t) {
  const int64_t items = 16 / item_size(t.dtype);
  if (reinterpret_cast<uintptr_t>(t.data) % 16 || t.shape[t.ndim - 1] % items) return false;
  for (int i = 0; i + 1 < t.ndim; ++i) {
    if (t.stride[i] % items && t.shape[i] > 1) return false;
  }
  return true;
}

}  // namespace ceg
