#include <cstring>

#include "moe.h"
#include "rows.h"

namespace ceg::CEG_ISA {
namespace {

// Bytes are copied as they are: a signalling NaN or a denormal must come out
// unchanged.
inline void copy_row(char* to, const char* from, int64_t bytes, bool streaming) {
  constexpr int64_t kStep = sizeof(Vec<float>);
  int64_t i = 0;
  for (; i + kStep <= bytes; i += kStep) {
    const Vec<float> v = load<float>(reinterpret_cast<const float*>(from + i));
    put(reinterpret_cast<float*>(to + i), v, kLanes<float>, streaming);
  }
  std::memcpy(to + i, from + i, bytes - i);
}

// The row of each choice, -1 if it has none. False if two rows have the same
// source, which no plan of moe_index has.
bool invert(const int32_t* sources, int64_t rows, int32_t* slots, int64_t choices) {
  for (int64_t c = 0; c < choices; ++c) slots[c] = -1;
  for (int64_t r = 0; r < rows; ++r) {
    if (sources[r] < 0) continue;
    if (slots[sources[r]] >= 0) return false;
    slots[sources[r]] = static_cast<int32_t>(r);
  }
  return true;
}

void dispatch(const MoeDispatchArgs& a) {
  const int64_t rows = a.out.shape[0], tokens = a.x.shape[0], item = item_size(a.out.dtype);
  const int64_t row_bytes = a.out.shape[1] * item;
  const int32_t* sources = a.sources.ptr<int32_t>();
  const bool streaming = streams(a.out, kStreamAlign<float>);
  const auto x_row = [&](int64_t n) { return a.x.ptr<char>() + n * a.x.stride[0] * item; };
  const auto out_row = [&](int64_t r) { return a.out.ptr<char>() + r * a.out.stride[0] * item; };
  // By token, a row of x is read from memory once for all its choices: a
  // dispatch of 4096 x 2048 with K = 8 moves 15 GB/s so, 8 GB/s by row.
  Scratch<int32_t> slots(streaming ? tokens * a.top_k : 0);
  const bool by_token = streaming && invert(sources, rows, slots.data(), tokens * a.top_k);

#pragma omp parallel num_threads(a.threads)
  {
    if (by_token) {
#pragma omp for schedule(static) nowait
      for (int64_t n = 0; n < tokens; ++n) {
        for (int64_t k = 0; k < a.top_k; ++k) {
          const int64_t slot = slots.data()[n * a.top_k + k];
          if (slot >= 0) copy_row(out_row(slot), x_row(n), row_bytes, streaming);
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      if (sources[r] < 0) {
        std::memset(out_row(r), 0, row_bytes);
      } else if (!by_token) {
        copy_row(out_row(r), x_row(sources[r] / a.top_k), row_bytes, streaming);
      }
    }
    stream_fence();
  }
}

// The rows of a token's kept choices, and their weights.
template <class S, class C>
struct Choices {
  const S** rows;
  C* weights;
  int64_t count;
};

// `next` are of another token: its rows lie anywhere, so only we know what to fetch meanwhile.
template <class S, class C>
void combine_row(S* out, Choices<S, C> choices, Choices<S, C> next, int64_t dim, bool streaming) {
  for_each_vec<C>(dim, [&](int64_t i, int64_t n) {
    for (int64_t k = 0; k < next.count; ++k) prefetch_line(next.rows[k], i);
    Vec<C> sum = {};
    for (int64_t k = 0; k < choices.count; ++k) {
      sum += load_n<C>(choices.rows[k] + i, n) * choices.weights[k];
    }
    put(out + i, sum, n, streaming);
  });
}

template <class S>
void combine(const MoeCombineArgs& a) {
  using C = ComputeOf<S>;
  const int64_t tokens = a.slots.shape[0], top_k = a.slots.shape[1], dim = a.y.shape[1];
  const bool streaming = streams(a.out, kStreamAlign<S>);

#pragma omp parallel num_threads(a.threads)
  {
    const DenormalsOff guard;
    Scratch<const S*> rows(2 * top_k);
    Scratch<C> weights(2 * top_k);
    const auto choices = [&](int64_t n) {
      const int64_t place = n % 2 * top_k;
      Choices<S, C> kept = {rows.data() + place, weights.data() + place, 0};
      const int32_t* slots = a.slots.ptr<int32_t>() + n * a.slots.stride[0];
      for (int64_t k = 0; n < tokens && k < top_k; ++k) {
        if (slots[k] < 0) continue;
        kept.rows[kept.count] = a.y.ptr<S>() + slots[k] * a.y.stride[0];
        kept.weights[kept.count++] =
            a.weights ? a.weights->ptr<C>()[n * a.weights->stride[0] + k] : C{1};
      }
      return kept;
    };
#pragma omp for schedule(static)
    for (int64_t n = 0; n < tokens; ++n) {
      combine_row(a.out.ptr<S>() + n * a.out.stride[0], choices(n), choices(n + 1), dim, streaming);
    }
    stream_fence();
  }
}

template <class S>
void combine_backward(const MoeCombineBwdArgs& a) {
  using C = ComputeOf<S>;
  const int64_t tokens = a.slots.shape[0], top_k = a.slots.shape[1];
  const int64_t rows = a.y.shape[0], dim = a.y.shape[1];
  const int32_t* sources = a.sources.ptr<int32_t>();
  const bool streaming = streams(a.dy, kStreamAlign<S>);
  const auto slot_of = [&](int64_t n, int64_t k) {
    return a.slots.ptr<int32_t>()[n * a.slots.stride[0] + k];
  };

#pragma omp parallel num_threads(a.threads)
  {
    const DenormalsOff guard;
    // By token: dout stays in L1 for all its choices, and y is read once for
    // both gradients.
#pragma omp for schedule(static)
    for (int64_t n = 0; n < tokens; ++n) {
      const S* dout = a.dout.ptr<S>() + n * a.dout.stride[0];
      for (int64_t k = 0; k < top_k; ++k) {
        C* dweight = a.dweights.ptr<C>() + n * a.dweights.stride[0] + k;
        const int64_t slot = slot_of(n, k);
        if (slot < 0) {
          *dweight = 0;
          continue;
        }
        const C weight = a.weights.ptr<C>()[n * a.weights.stride[0] + k];
        // The row of the next choice is fetched meanwhile, or one that is there already.
        const int64_t next = k + 1 < top_k    ? slot_of(n, k + 1)
                             : n + 1 < tokens ? slot_of(n + 1, 0)
                                              : slot;
        const S* next_y = a.y.ptr<S>() + (next < 0 ? slot : next) * a.y.stride[0];
        const S* y = a.y.ptr<S>() + slot * a.y.stride[0];
        S* dy = a.dy.ptr<S>() + slot * a.dy.stride[0];
        *dweight = sum_over<C>(dim, [&](int64_t i, int64_t lanes) {
          prefetch_line(next_y, i);
          const Vec<C> upstream = load_n<C>(dout + i, lanes);
          put(dy + i, upstream * weight, lanes, streaming);
          return upstream * load_n<C>(y + i, lanes);
        });
      }
    }
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      if (sources[r] < 0) std::memset(a.dy.ptr<S>() + r * a.dy.stride[0], 0, dim * sizeof(S));
    }
    stream_fence();
  }
}

}  // namespace

void moe_dispatch_kernel(const MoeDispatchArgs& a) { dispatch(a); }

void moe_combine_kernel(const MoeCombineArgs& a) {
  with_storage(a.y.dtype, [&](auto s) { combine<decltype(s)>(a); });
}

void moe_combine_bwd_kernel(const MoeCombineBwdArgs& a) {
  with_storage(a.y.dtype, [&](auto s) { combine_backward<decltype(s)>(a); });
}

}  // namespace ceg::CEG_ISA
