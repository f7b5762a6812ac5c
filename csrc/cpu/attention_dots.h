// The products of a few queries with keys and values as they lie in memory. Packing a block costs
// as much as the products of some 40 rows, so that decoding would do little else.
#pragma once

#include "attention_mask.h"
#include "attention_pack.h"

namespace ceg::CEG_ISA {

// Half of a's partial sums in the even lanes, half of b's in the odd ones.
template <class V>
inline V fold(V a, V b) {
  return interleave_low(a, b) + interleave_high(a, b);
}

// Lane l holds the partial sums of v[l % n]: after folding all lanes, the sum. n is a power of two.
template <int n, class V>
inline V fold_all(V* v) {
#pragma GCC unroll 4
  for (int step = n / 2; step > 0; step /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < step; ++i) v[i] = fold(v[i], v[i + step]);
  }
  return v[0];
}

// s[r * s_row + j] = q[r, :] . keys[first + j, :] for one vector of keys; past the last key they
// are those of the last.
template <class S, int rows, class C>
void dot_rows(const C* q, int64_t q_row, const Rows& keys, int64_t first, C* s, int64_t s_row) {
  constexpr int lanes = kLanes<C>;
  // With 6 rows the sums fill 24 of 32 registers; one row needs more than 4 to hide their latency.
  constexpr int wanted = rows <= 2 ? 2 * kTileVecs : kTileVecs;
  constexpr int batch = lanes < wanted ? lanes : wanted;
  constexpr int batches = lanes / batch;
  Vec<C> parts[rows][batches];
  for (int b = 0; b < batches; ++b) {
    const S* k[batch];
    for (int i = 0; i < batch; ++i) {
      const int64_t j = first + b + i * batches;
      k[i] = row_of<C, S>(keys, j < keys.count ? j : keys.count - 1);
      prefetch_row(keys, j + lanes, sizeof(S));
    }
    Vec<C> acc[rows][batch] = {};
    const auto step = [&](int64_t d, int64_t n) {
      Vec<C> kv[batch];
#pragma GCC unroll 8
      for (int i = 0; i < batch; ++i) kv[i] = load_n<C>(k[i] + d, n);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const Vec<C> qv = load<C>(q + r * q_row + d);
#pragma GCC unroll 8
        for (int i = 0; i < batch; ++i) acc[r][i] += qv * kv[i];
      }
    };
    int64_t d = 0;
    for (; d + lanes <= keys.width; d += lanes) step(d, lanes);
    if (d < keys.width) step(d, keys.width - d);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) parts[r][b] = fold_all<batch>(acc[r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) store(s + r * s_row, fold_all<batches>(parts[r]));
}

// The same for columns [start, stop) of `rows` <= kTileRows rows of scores.
template <class S, class C, int... index>
void dot_tile(const C* q, int64_t q_row, int rows, const Rows& keys, int64_t start, int64_t stop,
              C* s, int64_t s_row, std::integer_sequence<int, index...>) {
  using Dots = void (*)(const C*, int64_t, const Rows&, int64_t, C*, int64_t);
  static constexpr Dots dots[] = {&dot_rows<S, index + 1, C>...};
  for (int64_t j = start; j < stop; j += kLanes<C>) {
    dots[rows - 1](q, q_row, keys, j, s + j, s_row);
  }
}

template <class E>
void dot_scores(DType dtype, const typename E::Item* q, int64_t q_row, int rows, const Rows& keys,
                int64_t start, int64_t stop, typename E::Compute* s, int64_t s_row) {
  static_assert(E::kDepth == 1, "the queries are packed in the compute type");
  pack_with<E>(dtype, [&](auto item) {
    dot_tile<decltype(item)>(q, q_row, rows, keys, start, stop, s, s_row,
                             std::make_integer_sequence<int, kTileRows>{});
  });
}

// out[r, :] = scale[r] * out[r, :] + p[r, keys] . values[keys, :], where p and the keys count from
// the first value.
template <class C>
struct WeightedSum {
  const C* p;
  int64_t p_row;
  Rows values;
  C* out;
  int64_t out_row;
  const C* scale;
};

// Columns [d, d + vecs * lanes) of `rows` rows. With `check`, false and nothing written where a
// value is inf or NaN.
template <class S, int rows, int vecs, bool check, class C>
bool sum_columns(const WeightedSum<C>& w, int64_t d, Range keys) {
  constexpr int lanes = kLanes<C>;
  constexpr int64_t kAhead = 16;
  // From zero: the error then grows with the keys of a block and the number of blocks apart.
  Vec<C> acc[rows][vecs] = {}, zero[vecs] = {};
  const int64_t left = w.values.width - d;
  const auto step = [&](int64_t j, int64_t n) {
    const S* value = row_of<C, S>(w.values, j) + d;
    const S* ahead = value + (j + kAhead < keys.last ? kAhead * w.values.stride : 0);
#pragma GCC unroll 8
    for (int v = 0; v < vecs; ++v) {
      __builtin_prefetch(ahead + v * lanes);
      const Vec<C> x = load_n<C>(value + v * lanes, n - v * lanes);
      if (check) zero[v] += x * C(0);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) acc[r][v] += w.p[r * w.p_row + j] * x;
    }
  };
  if (left >= vecs * lanes) {
    for (int64_t j = keys.first; j < keys.last; ++j) step(j, vecs * lanes);
  } else {
    for (int64_t j = keys.first; j < keys.last; ++j) step(j, left);
  }
  if (check) {
    for (int v = 1; v < vecs; ++v) zero[0] += zero[v];
    if (!(reduce_add(zero[0]) == 0)) return false;
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vecs; ++v) {
      C* out = w.out + r * w.out_row + d + v * lanes;
      store(out, load<C>(out) * w.scale[r] + acc[r][v]);
    }
  }
  return true;
}

template <class S, class C, int... index>
void sum_tile(WeightedSum<C> w, int rows, int64_t columns, Range all, const Range* own,
              std::integer_sequence<int, index...>) {
  using Sum = bool (*)(const WeightedSum<C>&, int64_t, Range);
  static constexpr Sum checked[] = {
      &sum_columns<S, index / kTileVecs + 1, index % kTileVecs + 1, true, C>...};
  static constexpr Sum plain[] = {&sum_columns<S, 1, index % kTileVecs + 1, false, C>...};
  constexpr int lanes = kLanes<C>;
  for (int64_t d = 0; d < columns; d += kTileVecs * lanes) {
    const int64_t left = (columns - d) / lanes;
    const int vecs = left < kTileVecs ? static_cast<int>(left) : kTileVecs;
    if (checked[(rows - 1) * kTileVecs + vecs - 1](w, d, all)) continue;
    // A masked zero times inf would spread it, so that each row takes its own keys alone.
    WeightedSum<C> one = w;
    for (int r = 0; r < rows; ++r) {
      one.p = w.p + r * w.p_row;
      one.out = w.out + r * w.out_row;
      one.scale = w.scale + r;
      plain[vecs - 1](one, d, own[r]);
    }
  }
}

// Rows r < rows take keys own[r], all of which lie in `all`; p is 0 for the others.
template <class E>
void add_values(DType dtype, const WeightedSum<typename E::Compute>& w, int rows, int64_t columns,
                Range all, const Range* own) {
  pack_with<E>(dtype, [&](auto item) {
    sum_tile<decltype(item)>(w, rows, columns, all, own,
                             std::make_integer_sequence<int, kTileRows * kTileVecs>{});
  });
}

}  // namespace ceg::CEG_ISA
