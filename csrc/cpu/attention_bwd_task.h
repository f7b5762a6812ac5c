// The backward of one kv head, of one of its key blocks, or of some of its queries: see
// attention_bwd_kernel.cpp.
#pragma once

#include <limits>

#include "attention_bwd_pairs.h"
#include "attention_dq.h"

namespace ceg::CEG_ISA {

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
  // What one key block adds to dQ of a tile, in the place of its scores where those are not needed
  // any more; of all queries at work, see DqRows and Lost.
  C* dq_tile;        // [kRows][q_width]
  uint16_t* dq_low;  // [dq_rows][q_width]
  C* lost;           // [dq_rows]

  void carve(Carver& c, const Sizes<E>& n, int64_t rows, int64_t dq_rows, bool key_pass,
             bool halves) {
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
    const int64_t tile_width = E::kDepth > 1 ? 2 * kBlock : 0;
    dq_tile = c.template take<C>(E::kRows * (n.q_width > tile_width ? n.q_width : tile_width));
    s_tile = dq_tile;
    dp_tile = dq_tile ? dq_tile + E::kRows * kBlock : nullptr;
    ds_rows = c.template take<Item>(E::kDepth > 1 ? E::kRows * kBlock : 0);
    dq_low = c.template take<uint16_t>(halves ? dq_rows * n.q_width : 0);
    lost = c.template take<C>(E::kDepth > 1 ? dq_rows : 0);
  }
};

template <class E>
class Backward {
  using C = typename E::Compute;
  using Item = typename E::Item;
  static constexpr int kL = kLanes<C>;
  static constexpr int kD = E::kDepth;
  static constexpr C kInf = std::numeric_limits<C>::infinity();
  static constexpr int64_t kNoDq = -1;
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
  ~Backward() { *args_.executed += executed_; }
  Backward(const Backward&) = delete;
  Backward& operator=(const Backward&) = delete;

  // One pass: everything of this kv head.
  void run_head() {
    for (int64_t g = 0; g < p_.group(); ++g) clear(g, 0, g * band_.queries, band_.queries);
    for (int64_t j0 = 0; j0 < band_.keys; j0 += kBlock) {
      const int64_t left = band_.keys - j0;
      key_block(j0, left < kBlock ? left : kBlock, true);
    }
    for (int64_t g = 0; g < p_.group(); ++g) finish(g, 0, g * band_.queries, band_.queries);
  }

  // First of two passes: dK and dV of one key block.
  void run_keys(int64_t j0, int64_t count) { key_block(j0, count, false); }

  // Second of two passes: dQ of the group's rows of some queries.
  void run_queries(int64_t i0, int64_t count) {
    for (int64_t g = 0; g < p_.group(); ++g) {
      load_queries(g, i0, count, g * count, false);
      clear(g, i0, g * count, count);
    }
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
          visit(g, i0 + i, r, 0, tile, r, ahead);
        }
      }
    }
    for (int64_t g = 0; g < p_.group(); ++g) finish(g, i0, g * count, count);
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
  // dQ of queries [i, i + count), the first of them at row `at` of the scratch for dQ.
  DqRows dq_rows(int64_t g, int64_t i, int64_t at, int64_t count) const {
    const Rows out = rows(args_.dq, p_.q_begin(batch_) + i, head(g), count, p_.head_dim);
    return {out, halves_dq(p_) ? t_.dq_low + at * n_.q_width : nullptr, n_.q_width};
  }
  void clear(int64_t g, int64_t i, int64_t at, int64_t count) const {
    clear_dq<C>(dq_rows(g, i, at, count));
    if (kD > 1) std::memset(t_.lost + at, 0, static_cast<size_t>(count) * sizeof(C));
  }
  // A row of dS sums to 0 and a rounded one does not: what all keys have in common would come back
  // times the difference, up to 6 times what the accuracy rule allows. So the last key that a row
  // sees is given what rounding took.
  void finish(int64_t g, int64_t i, int64_t at, int64_t count) const {
    const DqRows dq = dq_rows(g, i, at, count);
    if (dq.low == nullptr && logits_.scale == 1) return;
    finish_dq<C>(p_.dtype, dq, logits_.scale, [&](int64_t r) -> Lost<C> {
      const Range keys = band_.keys_of(i + r);
      if (kD == 1 || keys.empty()) return {0, nullptr};
      const int64_t last = p_.k_begin(batch_) + keys.last - 1;
      return {t_.lost[at + r], rows(args_.k, last, kv_head_, 1, p_.head_dim).data};
    });
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
      k_finite_ = pack_steps<E>(p_.dtype, k, t_.k_steps, n_.q_width, logits_.folded);
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
    Item* const q_rows = t_.q_rows + r * n_.q_width;
    Item* const dout_rows = t_.dout_rows + r * n_.v_width;
    if (kD == 1 || !for_dkv) {
      q_finite_ = pack_rows<E>(p_.dtype, q, q_rows, n_.q_width, logits_.folded);
      dout_finite_ = pack_rows<E>(p_.dtype, dout, dout_rows, n_.v_width);
    }
    if constexpr (kD > 1) {
      if (for_dkv) {
        q_finite_ = pack_rows_and_steps<E>(q, q_rows, t_.q_steps, n_.q_width);
        dout_finite_ = pack_rows_and_steps<E>(dout, dout_rows, t_.dout_steps, n_.v_width);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const C lse = *stat(args_.lse, g, i0 + i);
      // A row that sees nothing: exp(x - inf) = 0.
      t_.lse[r + i] = lse == -kInf ? kInf : lse;
      t_.delta[r + i] = *stat(args_.delta, g, i0 + i);
      t_.keys[r + i] = band_.keys_of(i0 + i);
    }
  }

  void key_block(int64_t j0, int64_t count, bool with_dq) {
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
        Ahead<3> ahead =
            queries_ahead(g, i0 + kQueries, next < kQueries ? next : kQueries,
                          kVisitSteps * (kQueries / E::kRows) + 2 * (kBlock / E::kRows));
        for (int64_t r = 0; r < queries; r += E::kRows) {
          const int rows = static_cast<int>(queries - r < E::kRows ? queries - r : E::kRows);
          visit(g, i0 + r, r, r, rows, with_dq ? g * band_.queries + i0 + r : kNoDq, ahead);
        }
        add_dk_dv(i0, queries, ahead);
      }
    }
    const int64_t first = p_.k_begin(batch_) + j0;
    write(t_.dk, n_.q_width, logits_.scale, rows(args_.dk, first, kv_head_, count, p_.head_dim));
    write(t_.dv, n_.v_width, C(1), rows(args_.dv, first, kv_head_, count, p_.value_dim));
  }

  // P and dS of queries [i, i + rows), which lie at scratch rows r on, into rows `at` on of the
  // block; and their dQ, whose scratch begins at row dq_at, if wanted.
  template <class Ahead>
  void visit(int64_t g, int64_t i, int64_t r, int64_t at, int rows, int64_t dq_at, Ahead& ahead) {
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
      multiply({t_.q_rows + r * n_.q_width, n_.q_width, kD, t_.k_columns + panel * k_panel,
                kPanel<E> * kD, k_panel, s + columns.first, kBlock, n_.q_steps, nullptr},
               rows, columns.size());
      ahead.step();
      multiply({t_.dout_rows + r * n_.v_width, n_.v_width, kD, t_.v_columns + panel * v_panel,
                kPanel<E> * kD, v_panel, dp + columns.first, kBlock, n_.v_steps, nullptr},
               rows, columns.size());
    }
    ahead.step();
    const bool with_dq = dq_at != kNoDq && !seen.empty();
    const PairTile<E> tile = {s,
                              dp,
                              for_dkv_ ? t_.p_block : nullptr,
                              t_.ds_block,
                              with_dq ? t_.ds_rows : nullptr,
                              with_dq ? t_.lost + dq_at : nullptr,
                              at,
                              rows,
                              columns};
    differentiate<E>(logits_, tile, [&](int row) -> PairRow<C> {
      const Range own = {t_.keys[r + row].first - j0_, t_.keys[r + row].last - j0_};
      return {t_.lse[r + row], t_.delta[r + row], logits_.slope(p_, batch_, head(g)),
              i + row + band_.shift() - j0_, own};
    });
    if (!with_dq) return;

    ahead.step();
    const int64_t k0 = seen.first / E::kAlign * E::kAlign / kD;
    const Item* ds = kD == 1 ? t_.ds_block + at * kBlock : t_.ds_rows;
    const DqRows dq = dq_rows(g, i, dq_at, rows);
    // Whole vectors can be added by the product itself.
    const bool direct = kD == 1 && dq.low == nullptr && n_.q_width == p_.head_dim;
    C* const sums = direct ? static_cast<C*>(dq.out.data) : t_.dq_tile;
    const Gemm<E> product = {ds + k0 * kD,
                             kBlock,
                             kD,
                             t_.k_steps + k0 * kD * n_.q_width,
                             n_.q_width * kD,
                             kPanel<E> * kD,
                             sums,
                             direct ? dq.out.stride : n_.q_width,
                             round_up(seen.last, E::kAlign) / kD - k0,
                             direct ? kOnes.row : nullptr};
    if (k_finite_) {
      multiply(product, rows, n_.q_width);
    } else {
      for (int row = 0; row < rows; ++row) {
        const Range own = intersect(t_.keys[r + row], {j0_, j0_ + keys_});
        const int64_t origin = j0_ + k0 * kD;
        gemm_exact<E>(product, row, own.first - origin, own.last - origin, p_.head_dim);
      }
      executed_ += gemm_flops(product, rows, n_.q_width);
    }
    if (!direct) add_to_dq<C>(dq, t_.dq_tile, n_.q_width);
  }

  // dV += P^T dout and dK += dS^T Q over the query block: one after the other, so that dout, and
  // then Q, stays in L1.
  void add_dk_dv(int64_t i0, int64_t queries, Ahead<3>& ahead) {
    add_product(i0, queries, t_.p_block, t_.dout_steps, dout_finite_, t_.dv, n_.v_width, ahead);
    add_product(i0, queries, t_.ds_block, t_.q_steps, q_finite_, t_.dk, n_.q_width, ahead);
  }

  void add_product(int64_t i0, int64_t queries, const Item* a, const Item* b, bool finite, C* sum,
                   int64_t width, Ahead<3>& ahead) {
    constexpr int64_t a_row = E::kStridedA ? kD : kQueries;
    constexpr int64_t a_step = E::kStridedA ? kBlock * kD : kD;
    for (int64_t j = 0; j < keys_; j += E::kRows) {
      const int rows = static_cast<int>(keys_ - j < E::kRows ? keys_ - j : E::kRows);
      const Range seen = intersect(band_.queries_of(j0_ + j, j0_ + j + rows), {i0, i0 + queries});
      if (seen.empty()) continue;
      ahead.step();
      const int64_t first = (seen.first - i0) / E::kAlign * E::kAlign;
      const int64_t steps = (round_up(seen.last - i0, E::kAlign) - first) / kD;
      const Gemm<E> product = {a + first / kD * a_step + j * a_row,
                               a_row,
                               a_step,
                               b + first * width,
                               width * kD,
                               kPanel<E> * kD,
                               sum + j * width,
                               width,
                               steps,
                               kOnes.row};
      add(product, finite, j, rows, i0 + first, seen.last, width);
    }
  }

  void add(const Gemm<E>& product, bool finite, int64_t j, int rows, int64_t first, int64_t last,
           int64_t width) {
    if (finite) return multiply(product, rows, width);
    executed_ += gemm_flops(product, rows, width);
    for (int row = 0; row < rows; ++row) {
      const Range own = intersect(band_.queries_of(j0_ + j + row), {first, last});
      gemm_exact<E>(product, row, own.first - first, own.last - first, width);
    }
  }

  void multiply(const Gemm<E>& product, int rows, int64_t columns) {
    executed_ += gemm_flops(product, rows, columns);
    gemm<E>(product, rows, columns);
  }

  const AttentionBwdArgs& args_;
  const AttentionProblem& p_;
  int64_t batch_, kv_head_;
  Band band_;
  Sizes<E> n_;
  Logits<E> logits_;
  BackwardScratch<E> t_;
  int64_t executed_ = 0;       // FLOPs of the products
  int64_t j0_ = 0, keys_ = 0;  // the key block that is loaded
  bool for_dkv_ = false;       // and whether the queries are for its dK and dV
  bool k_finite_ = true, q_finite_ = true, dout_finite_ = true;
};

}  // namespace ceg::CEG_ISA
