// SIMD vectors for one ISA level: load, convert, tail, store, stream, fma, reduce.
//
// Every kernel source is compiled once per level with -DCEG_ISA=<level> and the level's -m flags.
// All code below sits in namespace ceg::CEG_ISA, so that the linker cannot fold a function of one
// level into another. For the same reason kernels must not call out-of-line std:: templates.
//
// Vectors are GCC vector extensions: + - * / and comparisons are the language's, a scalar operand
// is broadcast, and `a * b + c` becomes an fma (-ffp-contract=fast). Intrinsics stay in this file
// and appear only where the compiler does not find the instruction; the maskz_ forms with a full
// mask avoid GCC's false "used uninitialized" (bug 105593) and cost nothing.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef CEG_ISA
#error "compile kernel sources with -DCEG_ISA=<level>"
#endif

namespace ceg::CEG_ISA {

#if defined(__AVX512F__)
inline constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVecBytes = 32;
#else
inline constexpr int kVecBytes = 16;
#endif

// Storage types. Arithmetic is never done in them.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T, int bytes = kVecBytes>
struct VecOf {
  typedef T type __attribute__((vector_size(bytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
inline constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(T));
// Half-width integers that hold the 16-bit storage of one Vec<float>.
using Half = typename VecOf<uint16_t, kVecBytes / 2>::type;
template <class V>
using Scalar = std::decay_t<decltype(std::declval<V&>()[0])>;

// fp64 inputs are computed in double, everything else in float.
template <class S>
using ComputeOf = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // not Vec{} + x, which would turn -0 into +0
}

// ---- 16-bit formats ---------------------------------------------------------------------------

#if defined(__AVX512BW__)
// Which 16-bit item goes where: 0 0 1 1 2 2 ..., and 1 3 5 ... (the upper 16 do not matter).
inline constexpr Vec<uint16_t> kEachTwice = {0,  0,  1,  1,  2,  2,  3,  3,  4,  4,  5,
                                             5,  6,  6,  7,  7,  8,  8,  9,  9,  10, 10,
                                             11, 11, 12, 12, 13, 13, 14, 14, 15, 15};
inline constexpr Vec<uint16_t> kUpperHalves = {1,  3,  5,  7,  9,  11, 13, 15,
                                               17, 19, 21, 23, 25, 27, 29, 31};
#endif

inline Vec<float> widen(Half bits, bf16) {
#if defined(__AVX512BW__)
  // Each item to the upper half of its lane in one shuffle; converting and shifting takes two
  // instructions.
  const __m512i items = _mm512_castsi256_si512(reinterpret_cast<__m256i>(bits));
  const auto lane = reinterpret_cast<__m512i>(kEachTwice);
  return reinterpret_cast<Vec<float>>(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, lane, items));
#else
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(bits, Vec<uint32_t>) << 16);
#endif
}

// Round to nearest even; NaN stays NaN. Denormals are zero where the kernels run (DenormalsOff), as
// they are for vcvtneps2bf16, so that results do not depend on the level.
inline Half narrow(Vec<float> v, bf16) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<Half>(_mm512_maskz_cvtneps_pbh(0xffff, reinterpret_cast<__m512>(v)));
#elif defined(__AVX512BW__)
  // The upper halves of the lanes in one shuffle, where vpmovdw takes two and a shift.
  const auto u = reinterpret_cast<__m512i>(v);
  const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
  const __mmask16 nan =
      _mm512_cmp_ps_mask(reinterpret_cast<__m512>(v), reinterpret_cast<__m512>(v), _CMP_UNORD_Q);
  __m512i r = _mm512_maskz_add_epi32(0xffff, u, _mm512_set1_epi32(0x7fff));
  r = _mm512_mask_add_epi32(r, odd, u, _mm512_set1_epi32(0x8000));
  r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
  const auto packed = reinterpret_cast<Vec<uint16_t>>(
      _mm512_maskz_permutexvar_epi16(0xffffffff, reinterpret_cast<__m512i>(kUpperHalves), r));
  return __builtin_shufflevector(packed, packed, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,
                                 15);
#else
  const auto u = reinterpret_cast<Vec<uint32_t>>(v);
  const Vec<uint32_t> rounded = u + 0x7fffu + ((u >> 16) & 1u);
  const Vec<uint32_t> bits = v != v ? (u | 0x400000u) : rounded;
  return __builtin_convertvector(bits >> 16, Half);
#endif
}

inline Vec<float> widen(Half bits, f16) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(
      _mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(bits)));
#elif defined(__F16C__) && defined(__AVX2__)
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(bits)));
#else
  // By integers throughout: arithmetic on fp32 denormals would lose fp16's where they are off.
  const Vec<uint32_t> u = __builtin_convertvector(bits, Vec<uint32_t>);
  const Vec<uint32_t> magnitude = (u & 0x7fffu) << 13;
  const Vec<float> tiny = __builtin_convertvector(u & 0x3ffu, Vec<float>) * 0x1p-24f;
  Vec<uint32_t> value = magnitude + 0x38000000u;
  value = (u & 0x7c00u) == 0 ? reinterpret_cast<Vec<uint32_t>>(tiny) : value;
  value = (u & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : value;
  return reinterpret_cast<Vec<float>>(value | ((u & 0x8000u) << 16));
#endif
}

inline Half narrow(Vec<float> v, f16) {
#if defined(__AVX512F__)
  return reinterpret_cast<Half>(
      _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && defined(__AVX2__)
  return reinterpret_cast<Half>(
      _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  const auto u = reinterpret_cast<Vec<uint32_t>>(v);
  const Vec<uint32_t> sign = (u >> 16) & 0x8000u;
  const Vec<uint32_t> a = u & 0x7fffffffu;
  // Normal: rebias, round to nearest even; a carry out of the mantissa gives inf by itself.
  const Vec<uint32_t> normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // Denormal: adding 0.5 makes the FPU round at the last half-precision denormal bit.
  const auto shifted = reinterpret_cast<Vec<float>>(a) + 0.5f;
  const Vec<uint32_t> tiny = reinterpret_cast<Vec<uint32_t>>(shifted) - 0x3f000000u;
  const Vec<uint32_t> special =
      a > 0x7f800000u ? (0x7e00u | (a >> 13 & 0x3ffu)) : (Vec<uint32_t>{} + 0x7c00u);
  Vec<uint32_t> r = a < 0x38800000u ? tiny : normal;
  r = a >= 0x47800000u ? special : r;
  return __builtin_convertvector(r | sign, Half);
#endif
}

// A float's bits in two halves, and back: nothing is rounded.
inline Half upper_half(Vec<float> v) {
#if defined(__AVX512BW__)
  const auto packed = reinterpret_cast<Vec<uint16_t>>(_mm512_maskz_permutexvar_epi16(
      0xffffffff, reinterpret_cast<__m512i>(kUpperHalves), reinterpret_cast<__m512i>(v)));
  return __builtin_shufflevector(packed, packed, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,
                                 15);
#else
  return __builtin_convertvector(reinterpret_cast<Vec<uint32_t>>(v) >> 16, Half);
#endif
}
inline Half lower_half(Vec<float> v) {
  return __builtin_convertvector(reinterpret_cast<Vec<uint32_t>>(v), Half);
}
inline Vec<float> join(Half upper, Half lower) {
  const auto high = reinterpret_cast<Vec<uint32_t>>(widen(upper, bf16{}));
  return reinterpret_cast<Vec<float>>(high | __builtin_convertvector(lower, Vec<uint32_t>));
}

// ---- load, store ------------------------------------------------------------------------------

template <class C, class S>
inline Vec<C> load(const S* p) {
  if constexpr (std::is_same_v<C, S>) {
    Vec<C> v;
    std::memcpy(&v, p, sizeof v);
    return v;
  } else {
    static_assert(std::is_same_v<C, float> && sizeof(S) == 2, "only bf16 and f16 are widened");
    Half bits;
    std::memcpy(&bits, p, sizeof bits);
    return widen(bits, S{});
  }
}

template <class S, class V>
inline void store(S* p, V v) {
  if constexpr (std::is_same_v<Scalar<V>, S>) {
    std::memcpy(p, &v, sizeof v);
  } else {
    static_assert(std::is_same_v<Scalar<V>, float> && sizeof(S) == 2, "only float is narrowed");
    const Half bits = narrow(v, S{});
    std::memcpy(p, &bits, sizeof bits);
  }
}

// The first n lanes (n >= kLanes means all); the others read as zero and memory past them is not
// touched.
template <class C, class S>
inline Vec<C> load_n(const S* p, int64_t n) {
  if (n >= kLanes<C>) return load<C>(p);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if (n <= 0) return Vec<C>{};
  const uint32_t mask = (1u << n) - 1u;
  if constexpr (std::is_same_v<S, float>) {
    return reinterpret_cast<Vec<C>>(_mm512_maskz_loadu_ps(mask, p));
  } else if constexpr (std::is_same_v<S, double>) {
    return reinterpret_cast<Vec<C>>(_mm512_maskz_loadu_pd(mask, p));
  } else {
    return widen(reinterpret_cast<Half>(_mm256_maskz_loadu_epi16(mask, p)), S{});
  }
#else
  S lanes[kLanes<C>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load<C>(lanes);
#endif
}

// The same for 16-bit items taken as they are.
template <class S>
inline Half load_half_n(const S* p, int64_t n) {
  constexpr int items = kVecBytes / 4;
  static_assert(sizeof(S) == 2, "for bf16 and f16");
  Half v = {};
  if (n >= items) {
    std::memcpy(&v, p, sizeof v);
  } else if (n > 0) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    v = reinterpret_cast<Half>(_mm256_maskz_loadu_epi16((1u << n) - 1u, p));
#else
    std::memcpy(&v, p, static_cast<size_t>(n) * sizeof(S));
#endif
  }
  return v;
}

// And two to a lane.
template <class S>
inline Vec<uint32_t> load_bits_n(const S* p, int64_t n) {
  constexpr int items = kVecBytes / 2;
  static_assert(sizeof(S) == 2, "for bf16 and f16");
  Vec<uint32_t> v = {};
  if (n >= items) {
    std::memcpy(&v, p, sizeof v);
  } else if (n > 0) {
#if defined(__AVX512BW__)
    v = reinterpret_cast<Vec<uint32_t>>(_mm512_maskz_loadu_epi16((1u << n) - 1u, p));
#else
    std::memcpy(&v, p, static_cast<size_t>(n) * sizeof(S));
#endif
  }
  return v;
}

template <class S, class V>
inline void store_n(S* p, V v, int64_t n) {
  if (n >= kLanes<Scalar<V>>) return store(p, v);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if (n <= 0) return;
  const uint32_t mask = (1u << n) - 1u;
  if constexpr (std::is_same_v<S, float>) {
    _mm512_mask_storeu_ps(p, mask, reinterpret_cast<__m512>(v));
  } else if constexpr (std::is_same_v<S, double>) {
    _mm512_mask_storeu_pd(p, mask, reinterpret_cast<__m512d>(v));
  } else {
    _mm256_mask_storeu_epi16(p, mask, reinterpret_cast<__m256i>(narrow(v, S{})));
  }
#else
  S lanes[kLanes<Scalar<V>>];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
#endif
}

// 16-bit items as they are.
inline void store_half_n(uint16_t* p, Half v, int64_t n) {
  constexpr int items = kVecBytes / 4;
  if (n >= items) {
    std::memcpy(p, &v, sizeof v);
  } else if (n > 0) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    _mm256_mask_storeu_epi16(p, (1u << n) - 1u, reinterpret_cast<__m256i>(v));
#else
    std::memcpy(p, &v, static_cast<size_t>(n) * sizeof(uint16_t));
#endif
  }
}

// Bypasses the caches: for outputs larger than them. p must be aligned to the bytes written
// (kStreamAlign<S>); call stream_fence() before other threads may read.
template <class S>
inline constexpr int kStreamAlign = kLanes<ComputeOf<S>> * static_cast<int>(sizeof(S));

template <class S, class V>
inline void stream(S* p, V v) {
#if defined(__AVX2__)
  if constexpr (sizeof(S) == 2) {
    const Half bits = narrow(v, S{});
#if defined(__AVX512F__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(bits));
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(bits));
#endif
  } else {
    static_assert(std::is_same_v<Scalar<V>, S>, "only float is narrowed");
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#else
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#endif
  }
#else
  store(p, v);
#endif
}

inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// ---- arithmetic -------------------------------------------------------------------------------

template <class V>
inline V fma(V a, V b, V c) {
  return a * b + c;
}

// b where either is NaN, like the x86 instructions GCC makes of them: max(limit, x) hands a NaN of
// x on.
template <class V>
inline V max(V a, V b) {
  return a > b ? a : b;
}

template <class V>
inline V min(V a, V b) {
  return a < b ? a : b;
}

template <class V, int... lane>
inline V interleave(V a, V b, int first, std::integer_sequence<int, lane...>) {
  constexpr int n = sizeof...(lane);
  return first == 0 ? __builtin_shufflevector(a, b, (lane / 2 + lane % 2 * n)...)
                    : __builtin_shufflevector(a, b, (n / 2 + lane / 2 + lane % 2 * n)...);
}

// a0 b0 a1 b1 ... of the lower halves, or of the upper.
template <class V>
inline V interleave_low(V a, V b) {
  return interleave(a, b, 0, std::make_integer_sequence<int, kLanes<Scalar<V>>>{});
}
template <class V>
inline V interleave_high(V a, V b) {
  return interleave(a, b, 1, std::make_integer_sequence<int, kLanes<Scalar<V>>>{});
}

template <class V, int... lane>
inline auto half(V v, int first, std::integer_sequence<int, lane...>) {
  constexpr int n = sizeof...(lane);
  return first == 0 ? __builtin_shufflevector(v, v, lane...)
                    : __builtin_shufflevector(v, v, (lane + n)...);
}

// Folds the upper half onto the lower until one lane is left.
template <class V, class Combine>
inline Scalar<V> reduce(V v, Combine combine) {
  constexpr int lanes = sizeof(V) / sizeof(Scalar<V>);
  if constexpr (lanes == 2) {
    return combine(v[0], v[1]);
  } else {
    using Lanes = std::make_integer_sequence<int, lanes / 2>;
    return reduce(combine(half(v, 0, Lanes{}), half(v, 1, Lanes{})), combine);
  }
}

template <class V>
inline Scalar<V> reduce_add(V v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}

// A NaN lane may be ignored.
template <class V>
inline Scalar<V> reduce_max(V v) {
  return reduce(v, [](auto a, auto b) { return a > b ? a : b; });
}

// Lane i is the fold of rows[i], in the order of `reduce`. Overwrites rows, one for each lane.
template <class V, class Combine>
inline V reduce_each(V* rows, Combine combine) {
#pragma GCC unroll 4
  for (int n = kLanes<Scalar<V>> / 2; n >= 1; n /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      rows[i] =
          combine(interleave_low(rows[i], rows[i + n]), interleave_high(rows[i], rows[i + n]));
    }
  }
  return rows[0];
}

// Lane i of the result's row r is lane r of row i. log2(lanes) rounds of a perfect shuffle.
template <class V>
inline void transpose(V* rows) {
  constexpr int lanes = kLanes<Scalar<V>>;
  V next[lanes];
  for (int round = 1; round < lanes; round *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = interleave_low(rows[i], rows[i + lanes / 2]);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + lanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) rows[i] = next[i];
  }
}

}  // namespace ceg::CEG_ISA
