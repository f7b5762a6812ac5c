// Which keys a query sees, and the logit of a pair: everything between q.k and the softmax.
#pragma once

#include "attention.h"
#include "attention_gemm.h"
#include "vec_math.h"

namespace ceg::CEG_ISA {

struct Range {
  int64_t first, last;  // [first, last)
  bool empty() const { return first >= last; }
  int64_t size() const { return last - first; }
};

inline Range intersect(Range a, Range b) {
  const int64_t first = a.first > b.first ? a.first : b.first;
  const int64_t last = a.last < b.last ? a.last : b.last;
  return {first, last > first ? last : first};
}

inline Range hull(Range a, Range b) {
  if (a.empty()) return b;
  if (b.empty()) return a;
  return {a.first < b.first ? a.first : b.first, a.last > b.last ? a.last : b.last};
}

// Key j is visible to query i iff i + shift - left <= j <= i + shift + right, where shift = Tk - Tq
// aligns the last query with the last key.
struct Band {
  int64_t left, right, queries, keys;

  Band(const AttentionProblem& p, int64_t b)
      : left(p.window_left), right(p.window_right), queries(p.q_len(b)), keys(p.k_len(b)) {}

  int64_t shift() const { return keys - queries; }
  Range keys_of(int64_t i) const {
    return intersect({i + shift() - left, i + shift() + right + 1}, {0, keys});
  }
  Range queries_of(int64_t j) const {
    return intersect({j - shift() - right, j - shift() + left + 1}, {0, queries});
  }
  // Of [first, last), which must not be empty.
  Range keys_of(int64_t first, int64_t last) const {
    return intersect({first + shift() - left, last + shift() + right}, {0, keys});
  }
  Range queries_of(int64_t first, int64_t last) const {
    return intersect({first - shift() - right, last - shift() + left}, {0, queries});
  }
};

template <class C>
inline Vec<C> lane_index() {
  Vec<C> v;
  for (int i = 0; i < kLanes<C>; ++i) v[i] = static_cast<C>(i);
  return v;
}

// Lanes of the vector that starts at `column` and lie outside [first, last) become `fill`.
template <class C>
inline Vec<C> keep(Vec<C> v, int64_t column, Range r, C fill) {
  if (column >= r.first && column + kLanes<C> <= r.last) return v;
  const auto clamp = [](int64_t x) { return static_cast<C>(x < -1 ? -1 : x > 1024 ? 1024 : x); };
  const Vec<C> lane = lane_index<C>();
  const auto inside = (lane >= clamp(r.first - column)) & (lane < clamp(r.last - column));
  return inside ? v : broadcast(fill);
}

// softcap(scale * q.k) + alibi. With full precision the scale is folded into the packed q, which
// leaves nothing to round between the largest logit and itself: exp(0) = 1 on a row's only key.
template <class E>
struct Logits {
  using C = typename E::Compute;
  static constexpr bool kFolded = E::kDepth == 1;

  C folded, scale;  // of an operand when it is packed, of its products
  C cap, cap_in;    // cap * tanh(cap_in * q.k)
  bool capped, biased;

  explicit Logits(const AttentionProblem& p)
      : folded(kFolded ? static_cast<C>(p.scale) : C(1)),
        scale(kFolded ? C(1) : static_cast<C>(p.scale)),
        cap(static_cast<C>(p.softcap)),
        cap_in(p.softcap > 0 ? scale / cap : C(0)),
        capped(p.softcap > 0),
        biased(p.alibi.data != nullptr) {}

  // Only the scale is left to apply, and the maximum commutes with it.
  bool plain() const { return !capped && !biased && scale >= 0; }

  C slope(const AttentionProblem& p, int64_t b, int64_t h) const {
    if (!biased) return 0;
    return static_cast<const C*>(p.alibi.data)[b * p.alibi.batch + h * p.alibi.head];
  }
  // -slope * |distance| for the keys at distance, distance - 1, ... before the query
  static Vec<C> bias(C slope, int64_t distance) {
    const Vec<C> d = static_cast<C>(distance) - lane_index<C>();
    return (d < C(0) ? d : -d) * slope;
  }
};

}  // namespace ceg::CEG_ISA
