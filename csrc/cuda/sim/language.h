// What nvcc knows and g++ does not, for kernels that run in the simulator: qualifiers, vector
// types, barriers and the intrinsics that kernels use.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "block.h"
#include "half.h"
#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// __shared__ is missing on purpose: see shared_memory() in gpu.h.

#define CEG_SIM_VECTOR(scalar, name, align)                            \
  struct alignas(2 * sizeof(scalar)) name##2 { scalar x, y; };         \
  struct alignas(align) name##4 { scalar x, y, z, w; };                \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; } \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
CEG_SIM_VECTOR(float, float, 16)
CEG_SIM_VECTOR(int, int, 16)
CEG_SIM_VECTOR(unsigned, uint, 16)
#undef CEG_SIM_VECTOR

inline void __syncthreads() { ceg::sim::barrier_sync("__syncthreads"); }
inline void __threadfence() {}
inline void __threadfence_block() {}

// Loads and stores differ in how they treat caches, which the simulator has none of.
template <class T>
T __ldg(const T* p) {
  ceg::sim::check_aligned(p, alignof(T));
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return __ldg(p);
}
template <class T>
T __ldcg(const T* p) {
  return __ldg(p);
}
template <class T>
T __ldca(const T* p) {
  return __ldg(p);
}
template <class T>
void __stcs(T* p, T value) {
  ceg::sim::check_aligned(p, alignof(T));
  *p = value;
}
template <class T>
void __stwb(T* p, T value) {
  __stcs(p, value);
}
template <class T>
void __stcg(T* p, T value) {
  __stcs(p, value);
}

// Threads switch only where they wait, so a plain update is atomic. Not for floats: sums in the
// order of arrival would differ from run to run.
template <class T>
  requires std::is_integral_v<T>
T atomicAdd(T* p, T value) {
  const T before = *p;
  *p = before + value;
  return before;
}
template <class T>
  requires std::is_integral_v<T>
T atomicMax(T* p, T value) {
  const T before = *p;
  if (value > before) *p = value;
  return before;
}

template <class To, class From>
To ceg_sim_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline float __uint_as_float(unsigned bits) { return ceg_sim_bits<float>(bits); }
inline float __int_as_float(int bits) { return ceg_sim_bits<float>(bits); }
inline unsigned __float_as_uint(float value) { return ceg_sim_bits<unsigned>(value); }
inline int __float_as_int(float value) { return ceg_sim_bits<int>(value); }
inline int __float2int_rn(float value) { return static_cast<int>(std::nearbyintf(value)); }

inline float rsqrtf(float x) { return static_cast<float>(1 / std::sqrt(static_cast<double>(x))); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(static_cast<unsigned>(bits)) : 32; }

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
