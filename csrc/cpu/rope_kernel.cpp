#include "rope.h"
#include "rows.h"

namespace ceg::CEG_ISA {
namespace {

// (a0, b0, a1, b1, ...) -> (b0, a0, b1, a1, ...)
inline Vec<float> swap_pairs(Vec<float> v) {
  const auto pairs = reinterpret_cast<Vec<uint64_t>>(v);
  return reinterpret_cast<Vec<float>>(pairs << 32 | pairs >> 32);
}
inline Vec<double> swap_pairs(Vec<double> v) {
  Vec<double> swapped;
  for (int i = 0; i < kLanes<double>; ++i) swapped[i] = v[i ^ 1];
  return swapped;
}

// The angles of one position, as the loop over heads wants them.
template <class C>
struct Angles {
  const C* cos;  // interleaved: each value twice
  const C* sin;  // interleaved: (-sin, sin) pairs
  C sign;        // of sin, where it is not interleaved
};

// Both fetch what lies `ahead` items after x.
template <class S, class C>
inline void rotate_halves(const S* x, S* out, Angles<C> a, int64_t half, int64_t ahead,
                          bool streaming) {
  for_each_line<C, S>(0, half, [&](int64_t i, auto vectors, int64_t n) {
    constexpr int kVectors = decltype(vectors)::value;
    prefetch_line(x + ahead, i);
    prefetch_line(x + ahead + half, i);
    Vec<C> low[kVectors], high[kVectors];
    for (int u = 0; u < kVectors; ++u) {
      const int64_t j = i + u * kLanes<C>;
      const Vec<C> c = load_n<C>(a.cos + j, n), s = load_n<C>(a.sin + j, n) * a.sign;
      const Vec<C> first = load_n<C>(x + j, n), second = load_n<C>(x + half + j, n);
      low[u] = first * c - second * s;
      high[u] = second * c + first * s;
    }
    for (int u = 0; u < kVectors; ++u) put(out + i + u * kLanes<C>, low[u], n, streaming);
    for (int u = 0; u < kVectors; ++u) put(out + half + i + u * kLanes<C>, high[u], n, streaming);
  });
}

template <class S, class C>
inline void rotate_pairs(const S* x, S* out, Angles<C> a, int64_t rotary, int64_t ahead,
                         bool streaming) {
  static_assert(kLanes<C> % 2 == 0, "a vector holds whole pairs");
  for_each_vec<C>(rotary, [&](int64_t i, int64_t n) {
    prefetch_line(x + ahead, i);
    const Vec<C> v = load_n<C>(x + i, n);
    put(out + i, v * load<C>(a.cos + i) + swap_pairs(v) * load<C>(a.sin + i), n, streaming);
  });
}

template <class S>
class Rotation {
  using C = ComputeOf<S>;

 public:
  explicit Rotation(const RopeArgs& a) : args_(a), half_(a.cos.shape[1]) {}

  // All heads of x at (b, t); the rest of each head is copied.
  void heads(const Tensor& x, const Tensor& out, int64_t b, int64_t t, Angles<C> angles,
             bool streaming) const {
    const S* from = x.ptr<S>() + b * x.stride[0] + t * x.stride[1];
    S* to = out.ptr<S>() + b * out.stride[0] + t * out.stride[1];
    const int64_t head_dim = x.shape[3];
    const int64_t tokens = rows_ahead(x.shape[2] * head_dim * static_cast<int64_t>(sizeof(S)));
    const int64_t ahead = t + tokens < x.shape[1] ? tokens * x.stride[1] : 0;
    for (int64_t head = 0; head < x.shape[2]; ++head) {
      if (args_.interleaved) {
        rotate_pairs(from, to, angles, 2 * half_, ahead, streaming);
      } else {
        rotate_halves(from, to, angles, half_, ahead, streaming);
      }
      if (to != from) {
        for (int64_t i = 2 * half_; i < head_dim; ++i) to[i] = from[i];
      }
      from += x.stride[2];
      to += out.stride[2];
    }
  }

  // `pairs` holds 2 * rotary + 2 vectors' worth of elements, for the interleaved form.
  Angles<C> angles(int64_t position, C* pairs) const {
    const C* cos = args_.cos.ptr<C>() + position * args_.cos.stride[0];
    const C* sin = args_.sin.ptr<C>() + position * args_.sin.stride[0];
    const C sign = args_.inverse ? C{-1} : C{1};
    if (!args_.interleaved) return {cos, sin, sign};
    C* sines = pairs + 2 * half_ + kLanes<C>;
    for (int64_t i = 0; i < half_; ++i) {
      pairs[2 * i] = pairs[2 * i + 1] = cos[i];
      sines[2 * i] = -sign * sin[i];
      sines[2 * i + 1] = sign * sin[i];
    }
    return {pairs, sines, sign};
  }

  // Streamed halves must start aligned too. In place the line is in the cache already.
  bool streaming(const Tensor& x, const Tensor& out) const {
    return x.data != out.data && half_ * sizeof(S) % kStreamAlign<S> == 0 &&
           streams(out, kStreamAlign<S>);
  }

 private:
  const RopeArgs& args_;
  int64_t half_;
};

int64_t position_of(const Tensor& positions, int64_t b, int64_t t) {
  const int64_t at = b * positions.stride[0] + t * positions.stride[1];
  return positions.dtype == DType::i64 ? positions.ptr<int64_t>()[at]
                                       : positions.ptr<int32_t>()[at];
}

template <class S>
void rotate(const RopeArgs& a) {
  using C = ComputeOf<S>;
  const int64_t batch = a.q.shape[0], length = a.q.shape[1];
  const Rotation<S> rotation(a);
  const bool stream_q = rotation.streaming(a.q, a.q_out);
  const bool stream_k = a.k && rotation.streaming(*a.k, *a.k_out);

#pragma omp parallel num_threads(a.threads)
  {
    const DenormalsOff guard;
    Scratch<C> pairs(a.interleaved ? 4 * a.cos.shape[1] + 2 * kLanes<C> : 0);
#pragma omp for schedule(static)
    for (int64_t token = 0; token < batch * length; ++token) {
      const int64_t b = token / length, t = token % length;
      const int64_t position = a.positions ? position_of(*a.positions, b, t) : t;
      const Angles<C> angles = rotation.angles(position, pairs.data());
      rotation.heads(a.q, a.q_out, b, t, angles, stream_q);
      if (a.k) rotation.heads(*a.k, *a.k_out, b, t, angles, stream_k);
    }
    stream_fence();
  }
}

}  // namespace

void rope_kernel(const RopeArgs& a) {
  with_storage(a.q.dtype, [&](auto s) { rotate<decltype(s)>(a); });
}

}  // namespace ceg::CEG_ISA
