// Scores and dP of a tile of queries against a key block become P and dS, the operands of the
// gradients' products, zero outside the visible columns.
#pragma once

#include "attention_mask.h"
#include "attention_pack.h"

namespace ceg::CEG_ISA {

inline constexpr int64_t kBlock = kAttentionBlockKeys;
// Queries of one block: a multiple of every engine's kRows and kAlign.
inline constexpr int64_t kQueries = 96;

template <class E>
struct PairTile {
  using C = typename E::Compute;
  using Item = typename E::Item;
  C *s, *dp;                 // [kRows][kBlock]; with depth 1 they become P and dS in place
  Item *p_block, *ds_block;  // of 16-bit operands: where the pairs of rows go; null: nowhere
  Item* ds_rows;             // [kRows][kBlock], the A operand of dQ; null: not wanted
  C* lost;                   // [rows], to which is added what rounding took from ds_rows
  int64_t at;                // first row in the blocks
  int rows;
  Range columns;  // that any row sees, in whole vectors
};

template <class C>
struct PairRow {
  C lse, delta, slope;
  int64_t distance;  // from the block's first key to the query
  Range own;         // visible columns
};

template <class C>
struct PAndDs {
  Vec<C> p = {}, ds = {};
};

template <bool plain, class E, class C = typename E::Compute>
inline PAndDs<C> differentiate_at(const Logits<E>& logits, const PairRow<C>& row, int64_t c,
                                  const C* s, const C* dp) {
  Vec<C> x = load<C>(s + c);
  Vec<C> ds = load<C>(dp + c) - row.delta;
  if (!plain && logits.capped) {
    const Vec<C> t = tanh(x * logits.cap_in);
    x = logits.cap * t;
    ds *= C(1) - t * t;
  } else {
    x *= logits.scale;
  }
  if (!plain && logits.biased) x += Logits<E>::bias(row.slope, row.distance - c);
  const Vec<C> p = exp(x - row.lse);
  return {keep(p, c, row.own, C(0)), keep(p * ds, c, row.own, C(0))};
}

template <bool plain, class E, class RowOf>
void differentiate_rows(const Logits<E>& logits, const PairTile<E>& t, RowOf row_of) {
  using C = typename E::Compute;
  constexpr int lanes = kLanes<C>;
  for (int r = 0; r < t.rows; ++r) {
    const PairRow<C> row = row_of(r);
    C* const s = t.s + r * kBlock;
    C* const dp = t.dp + r * kBlock;
    const auto clear = [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; c += lanes) {
        store(s + c, Vec<C>{});
        store(dp + c, Vec<C>{});
      }
    };
    clear(0, t.columns.first);
    for (int64_t c = t.columns.first; c < t.columns.last; c += lanes) {
      const PAndDs<C> pair = differentiate_at<plain>(logits, row, c, s, dp);
      store(s + c, pair.p);
      store(dp + c, pair.ds);
    }
    clear(t.columns.last, kBlock);
  }
}

// Two rows at a time, because the blocks hold pairs of them. Where the blocks are transposed, the
// pairs take the place of the even row's scores and dP for the time being.
template <bool plain, class E, class RowOf>
void differentiate_pairs(const Logits<E>& logits, const PairTile<E>& t, RowOf row_of) {
  using C = typename E::Compute;
  using Item = typename E::Item;
  constexpr int lanes = kLanes<C>;
  const auto place = [&](Item* block, C* tile, int r) {
    return E::kStridedA ? block + (t.at + r) * kBlock : reinterpret_cast<Item*>(tile + r * kBlock);
  };
  const auto round = [&](int r, int64_t c, Vec<C> ds, Vec<C>& lost) {
    const Half kept = narrow(ds, Item{});
    std::memcpy(t.ds_rows + r * kBlock + c, &kept, sizeof kept);
    lost += ds - widen(kept, Item{});
  };
  for (int r = 0; r < t.rows; r += 2) {
    const bool two = r + 1 < t.rows;
    const PairRow<C> even = row_of(r), odd = row_of(two ? r + 1 : r);
    C* const s = t.s + r * kBlock;
    C* const dp = t.dp + r * kBlock;
    Item* const p_pairs = place(t.p_block, t.s, r);
    Item* const ds_pairs = place(t.ds_block, t.dp, r);
    const auto put = [&](int64_t c, const PAndDs<C>& a, const PAndDs<C>& b) {
      const auto p = E::pair(a.p, b.p), ds = E::pair(a.ds, b.ds);
      std::memcpy(p_pairs + 2 * c, &p, sizeof p);
      std::memcpy(ds_pairs + 2 * c, &ds, sizeof ds);
    };
    Vec<C> lost[2] = {};
    const auto clear = [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; c += lanes) {
        if (t.p_block) put(c, PAndDs<C>(), PAndDs<C>());
        if (t.ds_rows) {
          round(r, c, Vec<C>{}, lost[0]);
          round(r + 1, c, Vec<C>{}, lost[1]);
        }
      }
    };
    clear(0, t.columns.first);
    for (int64_t c = t.columns.first; c < t.columns.last; c += lanes) {
      const PAndDs<C> a = differentiate_at<plain>(logits, even, c, s, dp);
      PAndDs<C> b;
      if (two) b = differentiate_at<plain>(logits, odd, c, s + kBlock, dp + kBlock);
      if (t.p_block) put(c, a, b);
      if (t.ds_rows) {
        round(r, c, a.ds, lost[0]);
        round(r + 1, c, b.ds, lost[1]);
      }
    }
    clear(t.columns.last, kBlock);
    if (t.ds_rows) {
      t.lost[r] += reduce_add(lost[0]);
      if (two) t.lost[r + 1] += reduce_add(lost[1]);
    }
  }
}

// The pairs of a tile's rows into columns [at, at + kRows) of a block [kBlock][kQueries].
template <class E>
void transpose_pairs(const typename E::Compute* tile, int rows, int64_t at,
                     typename E::Item* block) {
  constexpr int lanes = kLanes<typename E::Compute>;
  static_assert(E::kRows == 2 * lanes, "the pairs of a tile's rows must fill the lanes");
  for (int64_t c = 0; c < kBlock; c += lanes) {
    typename E::Operand pairs[lanes] = {};
    for (int r = 0; r < rows; r += 2) {
      std::memcpy(&pairs[r / 2], tile + r * kBlock + c, sizeof pairs[0]);
    }
    transpose(pairs);
    for (int i = 0; i < lanes; ++i) {
      std::memcpy(block + (c + i) * kQueries + at, &pairs[i], sizeof pairs[0]);
    }
  }
}

// `row_of(r)` describes row r of the tile.
template <class E, class RowOf>
void differentiate(const Logits<E>& logits, const PairTile<E>& t, RowOf row_of) {
  const bool plain = !logits.capped && !logits.biased;
  if constexpr (E::kDepth == 1) {
    return plain ? differentiate_rows<true>(logits, t, row_of)
                 : differentiate_rows<false>(logits, t, row_of);
  } else {
    plain ? differentiate_pairs<true>(logits, t, row_of)
          : differentiate_pairs<false>(logits, t, row_of);
    if constexpr (!E::kStridedA) {
      if (t.p_block == nullptr) return;
      transpose_pairs<E>(t.s, t.rows, t.at, t.p_block);
      transpose_pairs<E>(t.dp, t.rows, t.at, t.ds_block);
    }
  }
}

}  // namespace ceg::CEG_ISA
