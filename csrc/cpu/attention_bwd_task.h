// The backward of one kv head, of one of its key blocks, or of some of its queries: see
// attention_bwd_kernel.cpp.
#pragma once

#include <limits>

#include "attention_mask.h"
#include "attention_pack.h"

namespace ceg::CEG_ISA {

inline constexpr int64_t kBlock = kAttentionBlockKeys;
// Queries of one block: a multiple of every engine's kRows and kAlign.
inline constexpr int64_t kQueries = 96;
inline constexpr int64_t kVisitSteps = 4;  // of fetching ahead

template <class E>
struct BackwardScratch {
  using C = typename E::Compute;
  using Item = typename E::Item;
  static_assert(kQueries % E::kRows == 0 && kQueries % E::kAlign == 0, "tiles must not straddle");

  // A key block as B operands: K^T, V^T, K.
  Item *k_columns, *v_columns, *k_steps;
  C *dk, *dv;  // [kBlock][width]
  // Query rows as A operands, and as B operands (the same memory where the layouts agree).
  Item *q_rows, *dout_rows, *q_steps, *dout_steps;
  C *lse, *delta;  // [rows]
  Range* keys;     // [rows] visible
  // Probabilities and dS of a query block against a key block, as the A operand of P^T dout: pairs
  // of rows interleaved to kDepth, or [kBlock][kQueries] for an engine without strided A. Of one
  // tile: in C, and dS as A operand.
  Item *p_block, *ds_block;
  C *s_tile, *dp_tile;
  Item* ds_rows;
  C* dq;  // [dq_rows][q_width]

  void carve(Carver& c, const Sizes<E>& n, int64_t rows, int64_t dq_rows, bool key_pass) {
    k_columns = c.template take<Item>(kBlock * n.q_steps * E::kDepth);
    v_columns = c.template take<Item>(kBlock * n.v_steps * E::kDepth);
    k_steps = c.template take<Item>(kBlock * n.q_width);
    dk = c.template take<C>(key_pass ? kBlock * n.q_width : 0);
    dv = c.template take<C>(key_pass ? kBlock * n.v_width : 0);
    const int64_t readable = rows + E::kRows;  // whole tiles are read from any row on
    q_rows = c.template take<Item>(readable * n.q_width);
    dout_rows = c.template take<Item>(readable * n.v_width);
    const bool steps = E::kDepth > 1 && key_pass;
    q_steps = steps ? c.template take<Item>(rows * n.q_width) : q_rows;
    dout_steps = steps ? c.template take<Item>(rows * n.v_width) : dout_rows;
    lse = c.template take<C>(rows);
    delta = c.template take<C>(rows);
    keys = c.template take<Range>(rows);
    const int64_t block_rows = key_pass ? kQueries : E::kDepth > 1 ? 0 : E::kRows;
    p_block = c.template take<Item>(block_rows * kBlock);
    ds_block = c.template take<Item>(block_rows * kBlock);
    s_tile = c.template take<C>(E::kDepth > 1 ? E::kRows * kBlock : 0);
    dp_tile = c.template take<C>(E::kDepth > 1 ? E::kRows * kBlock : 0);
    ds_rows = c.template take<Item>(E::kDepth > 1 ? E::kRows * kBlock : 0);
    dq = c.template take<C>(dq_rows * n.q_width);
  }
};

template <class E>
class Backward {
  using C = typename E::Compute;
  using Item = typename E::Item;
  static constexpr int kL = kLanes<C>;
  static constexpr int kD = E::kDepth;
  static constexpr C kInf = std::numeric_limits<C>::infinity();
  static constexpr struct Ones {
    C row[E::kRows];
    constexpr Ones() : row() {
      for (C& one : row) one = 1;
    }
  } kOnes{};

 public:
  Backward(const AttentionBwdArgs& args, int64_t batch, int64_t kv_head,
           const BackwardScratch<E>& scratch)
      : args_(args),
        p_(args.problem),
        batch_(batch),
        kv_head_(kv_head),
        band_(args.problem, batch),
        n_(args.problem),
        logits_(args.problem),
        t_(scratch) {}

  // One pass: everything of this kv head. dQ is summed in its output where that is possible.
  void run_head(bool dq_in_place) {
    for (int64_t g = 0; g < p_.group(); ++g) {
      for (int64_t i = 0; i < band_.queries; ++i) {
        std::memset(dq_row(dq_in_place, g, i), 0, static_cast<size_t>(p_.head_dim) * sizeof(C));
      }
    }
    for (int64_t j0 = 0; j0 < band_.keys; j0 += kBlock) {
      const int64_t left = band_.keys - j0;
      key_block(j0, left < kBlock ? left : kBlock, true, dq_in_place);
    }
    if (dq_in_place && logits_.scale == 1) return;
    for (int64_t g = 0; g < p_.group(); ++g) {
      write(dq_row(dq_in_place, g, 0), dq_in_place ? args_.dq.row : n_.q_width, logits_.scale,
            rows(args_.dq, p_.q_begin(batch_), head(g), band_.queries, p_.head_dim));
    }
  }

  // First of two passes: dK and dV of one key block.
  void run_keys(int64_t j0, int64_t count) { key_block(j0, count, false, false); }

  // Second of two passes: dQ of the group's rows of some queries.
  void run_queries(int64_t i0, int64_t count) {
    const int64_t rows = count * p_.group();
    for (int64_t g = 0; g < p_.group(); ++g) load_queries(g, i0, count, g * count, false);
    std::memset(t_.dq, 0, static_cast<size_t>(rows * n_.q_width) * sizeof(C));
    const Range seen = band_.keys_of(i0, i0 + count);
    for (int64_t j0 = seen.first / kBlock * kBlock; j0 < seen.last; j0 += kBlock) {
      const int64_t left = band_.keys - j0;
      load_keys(j0, left < kBlock ? left : kBlock, true);
      const int64_t tiles = p_.group() * ((count + E::kRows - 1) / E::kRows);
      const int64_t next = seen.last - j0 - kBlock;
      Ahead<2> ahead = keys_ahead(j0 + kBlock, next < kBlock ? next : kBlock, kVisitSteps * tiles);
      for (int64_t g = 0; g < p_.group(); ++g) {
        for (int64_t i = 0; i < count; i += E::kRows) {
          const int64_t r = g * count + i;
          const int tile = static_cast<int>(count - i < E::kRows ? count - i : E::kRows);
          visit(g, i0 + i, r, 0, tile, t_.dq + r * n_.q_width, n_.q_width, ahead);
        }
      }
    }
    for (int64_t g = 0; g < p_.group(); ++g) {
      write(t_.dq + g * count * n_.q_width, n_.q_width, logits_.scale,
            this->rows(args_.dq, p_.q_begin(batch_) + i0, head(g), count, p_.head_dim));
    }
  }

 private:
  int64_t head(int64_t g) const { return kv_head_ * p_.group() + g; }
  Rows rows(const AttentionView& view, int64_t row, int64_t h, int64_t count, int64_t width) const {
    return rows_of(p_, view, batch_, row, h, count, width);
  }
  C* stat(const AttentionView& view, int64_t g, int64_t i) const {
    return static_cast<C*>(view.data) + batch_ * view.batch + (p_.q_begin(batch_) + i) * view.row +
           head(g) * view.head;
  }
  C* dq_row(bool in_place, int64_t g, int64_t i) const {
    if (!in_place) return t_.dq + (g * band_.queries + i) * n_.q_width;
    return static_cast<C*>(rows(args_.dq, p_.q_begin(batch_) + i, head(g), 1, p_.head_dim).data);
  }
  void write(const C* from, int64_t ld, C scale, const Rows& to) const {
    unpack_rows(p_.dtype, from, ld, [scale](int64_t) { return scale; }, to);
  }

  void load_keys(int64_t j0, int64_t count, bool for_dq) {
    j0_ = j0;
    keys_ = count;
    const int64_t first = p_.k_begin(batch_) + j0;
    const Rows k = rows(args_.k, first, kv_head_, count, p_.head_dim);
    const Rows v = rows(args_.v, first, kv_head_, count, p_.value_dim);
    pack_columns<E>(p_.dtype, k, t_.k_columns);
    pack_columns<E>(p_.dtype, v, t_.v_columns);
    if (for_dq) {
      pack_steps<E>(p_.dtype, k, t_.k_steps, n_.q_width, logits_.folded);
      k_finite_ = all_finite(t_.k_steps, round_up(count, kD) * n_.q_width);
    }
  }

  Ahead<2> keys_ahead(int64_t j, int64_t count, int64_t steps) const {
    const int64_t first = p_.k_begin(batch_) + j;
    return {p_.dtype,
            {rows(args_.k, first, kv_head_, count, p_.head_dim),
             rows(args_.v, first, kv_head_, count, p_.value_dim)},
            steps};
  }

  Ahead<3> queries_ahead(int64_t g, int64_t i, int64_t count, int64_t steps) const {
    const int64_t first = p_.q_begin(batch_) + i;
    return {p_.dtype,
            {rows(args_.q, first, head(g), count, p_.head_dim),
             rows(args_.dout, first, head(g), count, p_.value_dim),
             rows(args_.dq, first, head(g), count, p_.head_dim)},
            steps};
  }

  // Queries [i0, i0 + count) of head g into rows [r, r + count) of the scratch.
  void load_queries(int64_t g, int64_t i0, int64_t count, int64_t r, bool for_dkv) {
    const int64_t first = p_.q_begin(batch_) + i0;
    const Rows q = rows(args_.q, first, head(g), count, p_.head_dim);
    const Rows dout = rows(args_.dout, first, head(g), count, p_.value_dim);
    for_dkv_ = for_dkv;
    pack_rows<E>(p_.dtype, q, t_.q_rows + r * n_.q_width, n_.q_width, logits_.folded);
    pack_rows<E>(p_.dtype, dout, t_.dout_rows + r * n_.v_width, n_.v_width);
    if (for_dkv) {
      if (kD > 1) {
        pack_steps<E>(p_.dtype, q, t_.q_steps, n_.q_width);
        pack_steps<E>(p_.dtype, dout, t_.dout_steps, n_.v_width);
      }
      q_finite_ = all_finite(t_.q_rows, count * n_.q_width);
      dout_finite_ = all_finite(t_.dout_rows, count * n_.v_width);
    }
    for (int64_t i = 0; i < count; ++i) {
      const C lse = *stat(args_.lse, g, i0 + i);
      // A row that sees nothing: exp(x - inf) = 0.
      t_.lse[r + i] = lse == -kInf ? kInf : lse;
      t_.delta[r + i] = *stat(args_.delta, g, i0 + i);
      t_.keys[r + i] = band_.keys_of(i0 + i);
    }
  }

  void key_block(int64_t j0, int64_t count, bool with_dq, bool dq_in_place) {
    load_keys(j0, count, with_dq);
    std::memset(t_.dk, 0, static_cast<size_t>(count * n_.q_width) * sizeof(C));
    std::memset(t_.dv, 0, static_cast<size_t>(count * n_.v_width) * sizeof(C));
    const Range seen = band_.queries_of(j0, j0 + count);
    for (int64_t g = 0; g < p_.group(); ++g) {
      for (int64_t i0 = seen.first / kQueries * kQueries; i0 < seen.last; i0 += kQueries) {
        const int64_t left = band_.queries - i0;
        const int64_t queries = left < kQueries ? left : kQueries;
        load_queries(g, i0, queries, 0, true);
        // The next head's first queries are few among all: nobody fetches them.
        const int64_t next = seen.last - i0 - kQueries;
        Ahead<3> ahead = queries_ahead(g, i0 + kQueries, next < kQueries ? next : kQueries,
                                       kVisitSteps * (kQueries / E::kRows) + kBlock / E::kRows);
        for (int64_t r = 0; r < queries; r += E::kRows) {
          const int rows = static_cast<int>(queries - r < E::kRows ? queries - r : E::kRows);
          C* dq = with_dq ? dq_row(dq_in_place, g, i0 + r) : nullptr;
          visit(g, i0 + r, r, r, rows, dq, dq_in_place ? args_.dq.row : n_.q_width, ahead);
        }
        add_dk_dv(i0, queries, ahead);
      }
    }
    const int64_t first = p_.k_begin(batch_) + j0;
    write(t_.dk, n_.q_width, logits_.scale, rows(args_.dk, first, kv_head_, count, p_.head_dim));
    write(t_.dv, n_.v_width, C(1), rows(args_.dv, first, kv_head_, count, p_.value_dim));
  }

  // P and dS of queries [i, i + rows), which lie at scratch rows r on, into rows `at` on of the
  // block; and their dQ if wanted.
  template <class Ahead>
  void visit(int64_t g, int64_t i, int64_t r, int64_t at, int rows, C* dq, int64_t dq_ld,
             Ahead& ahead) {
    C* s = kD == 1 ? reinterpret_cast<C*>(t_.p_block) + at * kBlock : t_.s_tile;
    C* dp = kD == 1 ? reinterpret_cast<C*>(t_.ds_block) + at * kBlock : t_.dp_tile;
    Range seen = {0, 0};
    for (int row = 0; row < rows; ++row) {
      seen = hull(seen, intersect(t_.keys[r + row], {j0_, j0_ + keys_}));
    }
    seen = seen.empty() ? Range{0, 0} : Range{seen.first - j0_, seen.last - j0_};
    const Range columns = {seen.first / kPanel<E> * kPanel<E>, round_up(seen.last, kL)};

    ahead.step();
    if (!seen.empty()) {
      const int64_t panel = columns.first / kPanel<E>;
      const int64_t k_panel = n_.q_steps * kPanel<E> * kD;
      const int64_t v_panel = n_.v_steps * kPanel<E> * kD;
      gemm<E>({t_.q_rows + r * n_.q_width, n_.q_width, kD, t_.k_columns + panel * k_panel,
               kPanel<E> * kD, k_panel, s + columns.first, kBlock, n_.q_steps, nullptr},
              rows, columns.size());
      ahead.step();
      gemm<E>({t_.dout_rows + r * n_.v_width, n_.v_width, kD, t_.v_columns + panel * v_panel,
               kPanel<E> * kD, v_panel, dp + columns.first, kBlock, n_.v_steps, nullptr},
              rows, columns.size());
    }
    ahead.step();
    for (int row = 0; row < rows; ++row) {
      const Range own = {t_.keys[r + row].first - j0_, t_.keys[r + row].last - j0_};
      differentiate(g, i + row, r + row, columns, own, s + row * kBlock, dp + row * kBlock);
    }
    if constexpr (kD == 2) {
      if (for_dkv_) store_block(at, rows, s, dp);
    }
    if (dq == nullptr || seen.empty()) return;

    ahead.step();
    if constexpr (kD == 2) store_ds(rows, dp, false);
    const int64_t k0 = seen.first / E::kAlign * E::kAlign / kD;
    const Item* ds = kD == 1 ? t_.ds_block + at * kBlock : t_.ds_rows;
    const Gemm<E> product = {
        ds + k0 * kD,   kBlock, kD,    t_.k_steps + k0 * kD * n_.q_width,        n_.q_width * kD,
        kPanel<E> * kD, dq,     dq_ld, round_up(seen.last, E::kAlign) / kD - k0, kOnes.row};
    if (k_finite_) {
      gemm<E>(product, rows, n_.q_width);
      if constexpr (kD == 2) {
        store_ds(rows, dp, true);
        gemm<E>(product, rows, n_.q_width);
      }
      return;
    }
    for (int row = 0; row < rows; ++row) {
      const Range own = intersect(t_.keys[r + row], {j0_, j0_ + keys_});
      const int64_t origin = j0_ + k0 * kD;
      gemm_exact<E>(product, row, own.first - origin, own.last - origin, p_.head_dim);
    }
  }

  // One row: scores and dP become P and dS, zero outside the visible columns.
  void differentiate(int64_t g, int64_t i, int64_t r, Range columns, Range own, C* s, C* dp) const {
    const C slope = logits_.slope(p_, batch_, head(g));
    const int64_t distance = i + band_.shift() - j0_;
    const C lse = t_.lse[r];
    const C delta = t_.delta[r];
    for (int64_t c = 0; c < columns.first; c += kL) {
      store(s + c, Vec<C>{});
      store(dp + c, Vec<C>{});
    }
    for (int64_t c = columns.first; c < columns.last; c += kL) {
      Vec<C> x = load<C>(s + c);
      Vec<C> ds = load<C>(dp + c) - delta;
      if (logits_.capped) {
        const Vec<C> t = tanh(x * logits_.cap_in);
        x = logits_.cap * t;
        ds *= C(1) - t * t;
      } else {
        x *= logits_.scale;
      }
      if (logits_.biased) x += Logits<E>::bias(slope, distance - c);
      const Vec<C> p = exp(x - lse);
      store(s + c, keep(p, c, own, C(0)));
      store(dp + c, keep(p * ds, c, own, C(0)));
    }
    for (int64_t c = columns.last; c < kBlock; c += kL) {
      store(s + c, Vec<C>{});
      store(dp + c, Vec<C>{});
    }
  }

  // A tile of P and dS in C into the 16-bit layout of the blocks.
  void store_block(int64_t at, int rows, const C* p, const C* ds) {
    for (int64_t c = 0; c < kBlock; c += kL) {
      store_columns(t_.p_block, at, rows, c, p + c);
      store_columns(t_.ds_block, at, rows, c, ds + c);
    }
  }

  void store_columns(Item* block, int64_t at, int rows, int64_t c, const C* tile) {
    typename E::Operand pairs[(E::kRows + 1) / 2];
    for (int row = 0; row < E::kRows; row += 2) {
      const C* here = tile + row * kBlock;
      pairs[row / 2] = E::pair(row < rows ? load<C>(here) : Vec<C>{},
                               row + 1 < rows ? load<C>(here + kBlock) : Vec<C>{});
    }
    if constexpr (E::kStridedA) {
      for (int row = 0; row < rows; row += 2) {
        std::memcpy(block + (at + row) * kBlock + 2 * c, &pairs[row / 2], sizeof pairs[0]);
      }
    } else {
      static_assert(E::kRows == 2 * kL, "the pairs of a tile's rows must fill the lanes");
      transpose(pairs);
      for (int i = 0; i < kL; ++i) {
        std::memcpy(block + (c + i) * kQueries + at, &pairs[i], sizeof pairs[0]);
      }
    }
  }

  // A tile of dS as the A operand of dQ; `rest`: what its rounding, which is there, has left over.
  // dS sums to 0 over the keys and rounded dS does not: a component that all keys share would come
  // back multiplied by the difference, up to 6 times what the accuracy rule allows.
  void store_ds(int rows, const C* ds, bool rest) {
    for (int row = 0; row < rows; ++row) {
      for (int64_t c = 0; c < kBlock; c += 2 * kL) {
        const C* here = ds + row * kBlock + c;
        Item* out = t_.ds_rows + row * kBlock + c;
        Vec<C> low = load<C>(here), high = load<C>(here + kL);
        if (rest) {
          low -= load<C>(out);
          high -= load<C>(out + kL);
        }
        E::store_a(out, low, high);
      }
    }
  }

  // dV += P^T dout and dK += dS^T Q over the query block.
  void add_dk_dv(int64_t i0, int64_t queries, Ahead<3>& ahead) {
    constexpr int64_t a_row = E::kStridedA ? kD : kQueries;
    constexpr int64_t a_step = E::kStridedA ? kBlock * kD : kD;
    for (int64_t j = 0; j < keys_; j += E::kRows) {
      const int rows = static_cast<int>(keys_ - j < E::kRows ? keys_ - j : E::kRows);
      const Range seen = intersect(band_.queries_of(j0_ + j, j0_ + j + rows), {i0, i0 + queries});
      if (seen.empty()) continue;
      ahead.step();
      const int64_t i_first = (seen.first - i0) / E::kAlign * E::kAlign;
      const int64_t steps = (round_up(seen.last - i0, E::kAlign) - i_first) / kD;
      const int64_t a = i_first / kD * a_step + j * a_row;
      const Gemm<E> dv = {t_.p_block + a,
                          a_row,
                          a_step,
                          t_.dout_steps + i_first * n_.v_width,
                          n_.v_width * kD,
                          kPanel<E> * kD,
                          t_.dv + j * n_.v_width,
                          n_.v_width,
                          steps,
                          kOnes.row};
      const Gemm<E> dk = {t_.ds_block + a,
                          a_row,
                          a_step,
                          t_.q_steps + i_first * n_.q_width,
                          n_.q_width * kD,
                          kPanel<E> * kD,
                          t_.dk + j * n_.q_width,
                          n_.q_width,
                          steps,
                          kOnes.row};
      add(dv, dout_finite_, j, rows, i0 + i_first, seen.last, n_.v_width);
      add(dk, q_finite_, j, rows, i0 + i_first, seen.last, n_.q_width);
    }
  }

  void add(const Gemm<E>& product, bool finite, int64_t j, int rows, int64_t first, int64_t last,
           int64_t width) const {
    if (finite) return gemm<E>(product, rows, width);
    for (int row = 0; row < rows; ++row) {
      const Range own = intersect(band_.queries_of(j0_ + j + row), {first, last});
      gemm_exact<E>(product, row, own.first - first, own.last - first, width);
    }
  }

  const AttentionBwdArgs& args_;
  const AttentionProblem& p_;
  int64_t batch_, kv_head_;
  Band band_;
  Sizes<E> n_;
  Logits<E> logits_;
  BackwardScratch<E> t_;
  int64_t j0_ = 0, keys_ = 0;  // the key block that is loaded
  bool for_dkv_ = false;       // and whether the queries are for its dK and dV
  bool k_finite_ = true, q_finite_ = true, dout_finite_ = true;
};

}  // namespace ceg::CEG_ISA
