// exp and tanh on vectors.
#pragma once

#include <cmath>

#include "vec.h"

namespace ceg::CEG_ISA {

template <class V>
inline V round_to_int(V x) {
  // Adding 1.5 * 2^(mantissa bits) leaves the integer in the low bits, rounded to nearest even.
  using T = Scalar<V>;
  constexpr T magic = sizeof(T) == 4 ? T(0x1.8p23) : T(0x1.8p52);
  return (x + magic) - magic;
}

// 2^n for integral n in [-126, 127] (float) or [-1022, 1023] (double).
inline Vec<float> power_of_two(Vec<float> n) {
  const auto bits = __builtin_convertvector(n, Vec<int32_t>) + 127;
  return reinterpret_cast<Vec<float>>(bits << 23);
}
inline Vec<double> power_of_two(Vec<double> n) {
  // The magic sum again: AVX2 has no conversion from double to int64.
  const auto bits = reinterpret_cast<Vec<int64_t>>(n + (0x1.8p52 + 1023));
  return reinterpret_cast<Vec<double>>(bits << 52);
}

// Relative error before rounding 2e-9 (float) and 6e-20 (double), and of x * log2(e)'s rounding
// up to |x| * 6e-8 (float), which is most where the result is far from 1. exp(0) is 1, NaN gives
// NaN. Below e^-87 a float is 0 where denormals are off, as they are in the kernels. It ends at
// e^88.37 without AVX-512, as a double does at e^709: instead of inf, which has no remainder.
inline Vec<float> exp(Vec<float> x) {
#if defined(__AVX512F__)
  // 2^t as 2^floor(t) * 2^r with r in [0, 1): vreduceps gives r (0 for an infinite t) and vscalefps
  // takes the floor of t itself, so that neither inf nor a large t needs a test.
  const Vec<float> t = x * 1.44269504f;
  const auto r = reinterpret_cast<Vec<float>>(
      _mm512_maskz_reduce_ps(0xffff, reinterpret_cast<__m512>(t), _MM_FROUND_TO_NEG_INF | 8));
  Vec<float> y = fma(r, broadcast(0.000216090601f), broadcast(0.00124689599f));
  y = fma(y, r, broadcast(0.00967533141f));
  y = fma(y, r, broadcast(0.0554853417f));
  y = fma(y, r, broadcast(0.240229294f));
  y = fma(y, r, broadcast(0.693147063f));
  y = fma(y, r, broadcast(1.0f));
  return reinterpret_cast<Vec<float>>(
      _mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(y), reinterpret_cast<__m512>(t)));
#else
  const Vec<float> below = min(broadcast(88.37f), x);
  const Vec<float> n = round_to_int(below * 1.44269504f);
  const Vec<float> r = fma(n, broadcast(-0.693147181f), below);
  Vec<float> y = fma(r, broadcast(0.00140612409f), broadcast(0.00837901141f));
  y = fma(y, r, broadcast(0.0416647755f));
  y = fma(y, r, broadcast(0.166663662f));
  y = fma(y, r, broadcast(0.50000006f));
  y = fma(y, r, broadcast(1.0f));
  y = fma(y, r, broadcast(1.0f));
  return x < -87.0f ? Vec<float>{} : y * power_of_two(n);
#endif
}

inline Vec<double> exp(Vec<double> x) {
  const Vec<double> clamped = min(broadcast(709.0), max(broadcast(-708.0), x));
  const Vec<double> n = round_to_int(clamped * 1.4426950408889634);
  const Vec<double> r = fma(n, broadcast(-0.6931471805599453), clamped) * 1.4426950408889634;
  constexpr double c[] = {1.0,
                          0.6931471805599453,
                          0.24022650695910072,
                          0.055504108664821736,
                          0.009618129107628562,
                          0.0013333558146381738,
                          0.00015403530393171835,
                          1.5252733864845099e-05,
                          1.321548700340765e-06,
                          1.0178047531180678e-07,
                          7.054814836763028e-09,
                          4.4572393137403015e-10,
                          2.585523844459004e-11};
  Vec<double> y = broadcast(c[12]);
  for (int i = 11; i >= 0; --i) y = fma(y, r, broadcast(c[i]));
  return x < -708.0 ? Vec<double>{} : y * power_of_two(n);
}

// (e^2|x| - 1) / (e^2|x| + 1) loses digits near 0, where the Taylor series takes over: relative
// error below 4e-7 (float).
inline Vec<float> tanh(Vec<float> x) {
  const Vec<float> a = x < 0.0f ? -x : x;
  const Vec<float> e = exp(min(broadcast(30.0f), a * 2.0f));
  const Vec<float> large = 1.0f - 2.0f / (e + 1.0f);
  const Vec<float> s = x * x;
  Vec<float> t = fma(s, broadcast(-0.008863235f), broadcast(0.021869488f));
  t = fma(t, s, broadcast(-0.053968254f));
  t = fma(t, s, broadcast(0.13333333f));
  t = fma(t, s, broadcast(-0.33333333f));
  const Vec<float> small = fma(x * s, t, x);
  return a < 0.35f ? small : (x < 0.0f ? -large : (x != x ? x : large));
}

// Used by gradcheck only: the C library's is fast enough.
inline Vec<double> tanh(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::tanh(x[i]);
  return x;
}

// Denormals as zero for the life of the object, on this thread: a multiplication by a denormal
// takes ~150 cycles on Intel. Anything they could change is below 1e-38. Elsewhere nothing is done.
class [[maybe_unused]] DenormalsOff {
 public:
#if defined(__x86_64__)
  DenormalsOff() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~DenormalsOff() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

}  // namespace ceg::CEG_ISA
