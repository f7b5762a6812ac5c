// What the row-wise kernels (rms_norm, rope, moe) share: loops over vectors of a row, scratch
// memory, dispatch on the storage type.
#pragma once

#include <cstdlib>

#include "../tensor.h"
#include "isa.h"
#include "vec_math.h"

namespace ceg::CEG_ISA {

// Calls f with a value of the storage type that the tensors hold.
template <class F>
inline void with_storage(DType dtype, F f) {
  switch (dtype) {
    case DType::f64:
      return f(double{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
    default:
      return f(float{});
  }
}

// step(i, lanes) for each vector of a row of n elements; only the last can be partial. `lanes` is
// a constant in the main loop, so that load_n and store_n fold to the unmasked form.
template <class C, class F>
inline void for_each_vec(int64_t n, F step) {
  int64_t i = 0;
  for (; i + kLanes<C> <= n; i += kLanes<C>) step(i, int64_t{kLanes<C>});
  if (i < n) step(i, n - i);
}

// Vectors that a cache line of S becomes: two of 16-bit items.
template <class C, class S>
inline constexpr int kTogether = sizeof(C) / sizeof(S);

// Elements [first, last) by cache lines of S: step(i, vectors, lanes) with `vectors` a
// std::integral_constant of how many follow each other there. Whoever streams to several places in
// turn writes whole lines by it: their halves may reach memory one by one.
template <class C, class S, class F>
inline void for_each_line(int64_t first, int64_t last, F step) {
  constexpr int64_t lanes = kLanes<C>;
  constexpr int vectors = kTogether<C, S>;
  int64_t i = first;
  for (; i + vectors * lanes <= last; i += vectors * lanes) {
    step(i, std::integral_constant<int, vectors>{}, lanes);
  }
  for (; i < last; i += lanes)
    step(i, std::integral_constant<int, 1>{}, last - i < lanes ? last - i : lanes);
}

// Sum of term(i, lanes) over a row, in an order that depends on n alone. Four accumulators hide the
// latency of the addition; they are emptied every kBlock vectors, so that the error of a long row
// grows with n / kBlock and not with n.
template <class C, class F>
inline C sum_over(int64_t n, F term) {
  constexpr int64_t lanes = kLanes<C>, kBlock = 64;
  Vec<C> total = {};
  int64_t i = 0;
  while (i < n) {
    Vec<C> acc[4] = {};
    const int64_t end = n - i > kBlock * lanes ? i + kBlock * lanes : n;
    for (; i + 4 * lanes <= end; i += 4 * lanes) {
      for (int u = 0; u < 4; ++u) acc[u] += term(i + u * lanes, lanes);
    }
    for (; i < end; i += lanes) acc[0] += term(i, end - i);
    total += (acc[0] + acc[1]) + (acc[2] + acc[3]);
  }
  return reduce_add(total);
}

// p + i, where a cache line begins there: a vector of 16-bit items is half of one.
template <class S>
[[gnu::always_inline]] inline void prefetch_line(const S* p, int64_t i) {
  if (i * static_cast<int64_t>(sizeof(S)) % 64 == 0) __builtin_prefetch(p + i, 0, 2);
}

// How many rows lie between the one that is worked on and the one to fetch: memory answers too late
// for 1.5 KiB (a row of 768 in bf16), and from 16 KiB on it is slower again.
inline int64_t rows_ahead(int64_t row_bytes) {
  constexpr int64_t kBytes = 8192;
  return row_bytes > 0 ? (kBytes + row_bytes - 1) / row_bytes : 0;
}

// store_n, around the caches where the caller found that to pay.
template <class S, class V>
inline void put(S* p, V v, int64_t lanes, bool streaming) {
  if (streaming && lanes >= kLanes<Scalar<V>>) {
    stream(p, v);
  } else {
    store_n(p, v, lanes);
  }
}

// Whether rows of an output may be streamed: they exceed the caches and each starts aligned.
inline bool streams(const Tensor& t, int64_t align) {
  const int64_t item = item_size(t.dtype);
  if (t.numel() * item <= cache_bytes() || reinterpret_cast<uintptr_t>(t.data) % align) {
    return false;
  }
  for (int i = 0; i + 1 < t.ndim; ++i) {
    if (t.stride[i] * item % align) return false;
  }
  return true;
}

// Uninitialised aligned memory. Not std::vector: see vec.h on templates of the library.
template <class C>
class Scratch {
 public:
  explicit Scratch(int64_t n) {
    const size_t bytes = (static_cast<size_t>(n) * sizeof(C) + 63) / 64 * 64;
    data_ = static_cast<C*>(std::aligned_alloc(64, bytes ? bytes : 64));
    if (!data_) std::abort();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  C* data() { return data_; }

 private:
  C* data_;
};

}  // namespace ceg::CEG_ISA
