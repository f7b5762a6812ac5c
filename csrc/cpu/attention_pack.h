// Copies rows of q, k, v, dout into the operand layouts of attention_gemm.h, converting from the
// storage type on the way. Everything past the given rows and columns is filled with zeros, because
// a stale NaN there would survive a multiplication by zero.
#pragma once

#include "attention_scratch.h"

namespace ceg::CEG_ISA {

template <class Work>
inline auto with_storage(DType dtype, Work work) {
  switch (dtype) {
    case DType::bf16:
      return work(bf16{});
    case DType::f16:
      return work(f16{});
    default:
      return work(float{});
  }
}

template <class C, class S>
inline const S* row_of(const Rows& rows, int64_t r) {
  return static_cast<const S*>(rows.data) + r * rows.stride;
}

// Rows lie heads * head_dim apart, which the hardware's prefetchers do not follow. Inlined by
// force: GCC takes a function that only prefetches for one without effects, and drops its calls.
inline constexpr int64_t kRowsAhead = 8;

template <int write = 0, int locality = 3>
[[gnu::always_inline]] inline void prefetch_row(const Rows& rows, int64_t r, int64_t item_bytes) {
  if (r >= rows.count) return;
  const char* p = static_cast<const char*>(rows.data) + r * rows.stride * item_bytes;
  for (int64_t byte = 0; byte < rows.width * item_bytes; byte += 64) {
    __builtin_prefetch(p + byte, write, locality);
  }
}

// Brings the rows of the next block into L2 during the work on this one, a few at each step: a core
// waits where more than its 16 or so line buffers are asked for at once.
template <int kinds>
class Ahead {
 public:
  // `kinds` times `rows[0].count` rows, in `steps` steps.
  Ahead(DType dtype, const Rows (&rows)[kinds], int64_t steps)
      : item_bytes_(item_size(dtype)), steps_(steps) {
    for (int i = 0; i < kinds; ++i) rows_[i] = rows[i];
  }

  [[gnu::always_inline]] void step() {
    const int64_t stop = ++step_ * rows_[0].count / steps_;
    for (; done_ < stop; ++done_) {
      for (int i = 0; i < kinds; ++i) prefetch_row<0, 2>(rows_[i], done_, item_bytes_);
    }
  }

 private:
  Rows rows_[kinds];
  int64_t item_bytes_, steps_, step_ = 0, done_ = 0;
};

// Of bf16: all bits of an item that is inf or NaN.
inline Half not_finite(Half items) { return (items & 0x7f80) == 0x7f80; }
inline bool none(Half bits) {
  return reduce(bits, [](auto a, auto b) { return a | b; }) == 0;
}

// A operand, [count][ld]: row-major items, times `scale` where the engine keeps full precision.
// False where one of them is inf or NaN.
template <class E, class S>
inline bool pack_rows_as(const Rows& rows, typename E::Item* out, int64_t ld,
                         typename E::Compute scale = 1) {
  using C = typename E::Compute;
  constexpr int lanes = kLanes<C>;
  Vec<C> zeros = {};
  Half bad = {};
  for (int64_t r = 0; r < rows.count; ++r) {
    prefetch_row(rows, r + kRowsAhead, sizeof(S));
    const S* p = row_of<typename E::Compute, S>(rows, r);
    for (int64_t d = 0; d < ld; d += lanes) {
      if constexpr (E::kDepth == 2) {
        const Half bits = load_half_n(p + d, rows.width - d);
        bad |= not_finite(bits);
        std::memcpy(out + r * ld + d, &bits, sizeof bits);
      } else {
        const Vec<C> items = load_n<C>(p + d, rows.width - d) * scale;
        zeros += items * C(0);
        store(out + r * ld + d, items);
      }
    }
  }
  return none(bad) && reduce_add(zeros) == 0;
}

// B operand, [count up to kAlign / depth][ld][depth]: k runs over the rows. The rest as above.
template <class E, class S>
inline bool pack_steps_as(const Rows& rows, typename E::Item* out, int64_t ld,
                          typename E::Compute scale) {
  using C = typename E::Compute;
  constexpr int lanes = kLanes<C>;
  if constexpr (E::kDepth == 1) {
    return pack_rows_as<E, S>(rows, out, ld, scale);
  } else {
    Half bad = {};
    const int64_t stop = round_up(rows.count, E::kAlign);
    for (int64_t r = 0; r < stop; r += 2) {
      prefetch_row(rows, r + kRowsAhead, sizeof(S));
      prefetch_row(rows, r + kRowsAhead + 1, sizeof(S));
      const S* even = row_of<C, S>(rows, r);
      const S* odd = row_of<C, S>(rows, r + 1);
      const int64_t even_width = r < rows.count ? rows.width : 0;
      const int64_t odd_width = r + 1 < rows.count ? rows.width : 0;
      for (int64_t d = 0; d < ld; d += lanes) {
        const Half a = load_half_n(even + d, even_width - d);
        const Half b = load_half_n(odd + d, odd_width - d);
        bad |= not_finite(a) | not_finite(b);
        const Vec<uint32_t> pair = __builtin_convertvector(a, Vec<uint32_t>) |
                                   __builtin_convertvector(b, Vec<uint32_t>) << 16;
        std::memcpy(out + r * ld + 2 * d, &pair, sizeof pair);
      }
    }
    return none(bad);
  }
}

// B operand in panels [columns / kPanel][steps][kPanel][depth]: k runs along each row, the rows
// become columns.
template <class E, class S>
inline void pack_columns_as(const Rows& rows, typename E::Item* out) {
  using C = typename E::Compute;
  constexpr int lanes = kLanes<C>;
  constexpr int step_items = kPanel<E> * E::kDepth;
  const int64_t steps = round_up(rows.width, E::kAlign) / E::kDepth;
  for (int64_t r0 = 0; r0 < rows.count; r0 += lanes) {
    for (int i = 0; i < lanes; ++i) prefetch_row(rows, r0 + lanes + i, sizeof(S));
    typename E::Item* panel =
        out + r0 / kPanel<E> * steps * step_items + r0 % kPanel<E> * E::kDepth;
    for (int64_t s0 = 0; s0 < steps; s0 += lanes) {
      typename E::Operand tile[lanes];
      for (int i = 0; i < lanes; ++i) {
        const int64_t r = r0 + i;
        const int64_t left = r < rows.count ? rows.width - s0 * E::kDepth : 0;
        const S* p = row_of<C, S>(rows, r < rows.count ? r : r0) + s0 * E::kDepth;
        if constexpr (E::kDepth == 1) {
          tile[i] = load_n<C>(p, left);
        } else {
          tile[i] = load_bits_n(p, left);
        }
      }
      transpose(tile);
      const int64_t last = steps - s0 < lanes ? steps - s0 : lanes;
      for (int64_t s = 0; s < last; ++s) {
        std::memcpy(panel + (s0 + s) * step_items, &tile[s], sizeof tile[s]);
      }
    }
  }
}

template <class E, class Pack>
inline auto pack_with(DType dtype, Pack pack) {
  if constexpr (std::is_same_v<typename E::Compute, double>) {
    return pack(double{});
  } else if constexpr (E::kDepth == 2) {
    return pack(bf16{});
  } else {
    return with_storage(dtype, pack);
  }
}

template <class E>
bool pack_rows(DType dtype, const Rows& rows, typename E::Item* out, int64_t ld,
               typename E::Compute scale = 1) {
  return pack_with<E>(dtype,
                      [&](auto s) { return pack_rows_as<E, decltype(s)>(rows, out, ld, scale); });
}
template <class E>
bool pack_steps(DType dtype, const Rows& rows, typename E::Item* out, int64_t ld,
                typename E::Compute scale = 1) {
  return pack_with<E>(dtype,
                      [&](auto s) { return pack_steps_as<E, decltype(s)>(rows, out, ld, scale); });
}
template <class E>
void pack_columns(DType dtype, const Rows& rows, typename E::Item* out) {
  pack_with<E>(dtype, [&](auto s) { pack_columns_as<E, decltype(s)>(rows, out); });
}

// Both operands of 16-bit rows at once, [count][ld] and [count up to kAlign / 2][ld][2], because
// the rows come from far. False where an item is inf or NaN.
template <class E>
bool pack_rows_and_steps(const Rows& rows, typename E::Item* by_row, typename E::Item* by_step,
                         int64_t ld) {
  using C = typename E::Compute;
  using Item = typename E::Item;
  Half bad = {};
  const int64_t stop = round_up(rows.count, E::kAlign);
  for (int64_t r = 0; r < stop; r += 2) {
    prefetch_row(rows, r + kRowsAhead, sizeof(Item));
    prefetch_row(rows, r + kRowsAhead + 1, sizeof(Item));
    const Item* even = row_of<C, Item>(rows, r);
    const Item* odd = row_of<C, Item>(rows, r + 1);
    const int64_t even_width = r < rows.count ? rows.width : 0;
    const int64_t odd_width = r + 1 < rows.count ? rows.width : 0;
    for (int64_t d = 0; d < ld; d += kLanes<C>) {
      const Half a = load_half_n(even + d, even_width - d);
      const Half b = load_half_n(odd + d, odd_width - d);
      bad |= not_finite(a) | not_finite(b);
      std::memcpy(by_row + r * ld + d, &a, sizeof a);
      std::memcpy(by_row + (r + 1) * ld + d, &b, sizeof b);
      const Vec<uint32_t> pair = __builtin_convertvector(a, Vec<uint32_t>) |
                                 __builtin_convertvector(b, Vec<uint32_t>) << 16;
      std::memcpy(by_step + r * ld + 2 * d, &pair, sizeof pair);
    }
  }
  return none(bad);
}

// Result rows, each times scale(r), rounded once.
template <class C, class Scale>
void unpack_rows(DType dtype, const C* from, int64_t ld, Scale scale, const Rows& rows) {
  const auto write = [&](auto s) {
    using S = decltype(s);
    for (int64_t r = 0; r < rows.count; ++r) {
      prefetch_row<1>(rows, r + kRowsAhead, sizeof(S));
      S* out = static_cast<S*>(rows.data) + r * rows.stride;
      const C factor = scale(r);
      for (int64_t d = 0; d < rows.width; d += kLanes<C>) {
        store_n(out + d, load<C>(from + r * ld + d) * factor, rows.width - d);
      }
    }
  };
  if constexpr (std::is_same_v<C, double>) {
    write(double{});
  } else {
    with_storage(dtype, write);
  }
}

}  // namespace ceg::CEG_ISA
