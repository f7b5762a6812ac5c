// dQ of a query: a sum over all key blocks, which its own output holds until the end.
//
// An output of the compute type holds the sum itself. Of a sum that will be rounded to 16 bits the
// output holds the upper half of the bits, and scratch the lower: nothing is rounded on the way,
// and the scratch is half of what the whole sums would take.
#pragma once

#include "attention_pack.h"

namespace ceg::CEG_ISA {

struct DqRows {
  Rows out;
  uint16_t* low;    // null where `out` holds whole sums
  int64_t low_row;  // a multiple of whole vectors, not below out.width
};

inline bool halves_dq(const AttentionProblem& p) { return item_size(p.dtype) == 2; }

inline uint16_t* upper_row(const DqRows& dq, int64_t r) {
  return static_cast<uint16_t*>(dq.out.data) + r * dq.out.stride;
}

template <class C>
void clear_dq(const DqRows& dq) {
  const int64_t item = dq.low ? 2 : static_cast<int64_t>(sizeof(C));
  for (int64_t r = 0; r < dq.out.count; ++r) {
    std::memset(static_cast<char*>(dq.out.data) + r * dq.out.stride * item, 0,
                static_cast<size_t>(dq.out.width * item));
  }
  if (dq.low) std::memset(dq.low, 0, static_cast<size_t>(dq.out.count * dq.low_row) * 2);
}

// Adds rows of products, [count][ld].
template <class C>
void add_to_dq(const DqRows& dq, const C* product, int64_t ld) {
  for (int64_t r = 0; r < dq.out.count; ++r, product += ld) {
    if constexpr (std::is_same_v<C, float>) {
      if (dq.low) {
        uint16_t* high = upper_row(dq, r);
        uint16_t* low = dq.low + r * dq.low_row;
        for (int64_t d = 0; d < dq.out.width; d += kLanes<C>) {
          const int64_t left = dq.out.width - d;
          const Vec<C> sum =
              join(load_half_n(high + d, left), load_half_n(low + d, left)) + load<C>(product + d);
          store_half_n(high + d, upper_half(sum), left);
          store_half_n(low + d, lower_half(sum), left);
        }
        continue;
      }
    }
    C* sums = static_cast<C*>(dq.out.data) + r * dq.out.stride;
    for (int64_t d = 0; d < dq.out.width; d += kLanes<C>) {
      const int64_t left = dq.out.width - d;
      store_n(sums + d, load_n<C>(sums + d, left) + load<C>(product + d), left);
    }
  }
}

// What rounding took from a row of dS, and the row of K that is given it (null: none).
template <class C>
struct Lost {
  C sum;
  const void* key;
};

// The sums become dQ: lost(r) is added, then everything multiplied by `scale` and rounded once.
template <class C, class S, class LostOf>
void finish_dq_as(const DqRows& dq, C scale, LostOf lost) {
  for (int64_t r = 0; r < dq.out.count; ++r) {
    S* out = static_cast<S*>(dq.out.data) + r * dq.out.stride;
    const Lost<C> last = lost(r);
    for (int64_t d = 0; d < dq.out.width; d += kLanes<C>) {
      const int64_t left = dq.out.width - d;
      Vec<C> sum;
      if constexpr (std::is_same_v<S, C>) {
        sum = load_n<C>(out + d, left);
      } else {
        sum = join(load_half_n(upper_row(dq, r) + d, left),
                   load_half_n(dq.low + r * dq.low_row + d, left));
      }
      if (last.key) sum += load_n<C>(static_cast<const S*>(last.key) + d, left) * last.sum;
      store_n(out + d, sum * scale, left);
    }
  }
}

template <class C, class LostOf>
void finish_dq(DType dtype, const DqRows& dq, C scale, LostOf lost) {
  if constexpr (std::is_same_v<C, double>) {
    finish_dq_as<C, double>(dq, scale, lost);
  } else {
    with_storage(dtype, [&](auto s) { finish_dq_as<C, decltype(s)>(dq, scale, lost); });
  }
}

}  // namespace ceg::CEG_ISA
