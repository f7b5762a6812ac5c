// Flash attention backward, from the probabilities recomputed with the forward's lse:
//   P = exp(S - lse)   dP = dout V^T   dS = P * (dP - delta)   delta = rowsum(dout * out) - dlse
//   dV = P^T dout      dK = scale * dS^T Q                     dQ = scale * dS K
//
// Two schedules with the same bits. One pass (10 D flops a pair) gives each (sequence, kv head) to
// one thread, which adds up dQ while it walks over the key blocks. Two passes (14 D) recompute P and
// dP for dQ, but every key block and every query block is a task of its own: for few heads, or where
// dQ cannot be summed in fp32 within the scratch budget. Each sum runs over ascending blocks of a
// fixed grid in either schedule, and no two threads add to the same number.
#include <cmath>
#include <limits>

#include "attention_mask.h"
#include "kernels.h"

namespace ceg::CEG_ISA {
namespace {

constexpr int64_t kBlock = kAttentionBlockKeys;
constexpr int64_t kQueries = 96;  // of one block: a multiple of kTileRows and of kDepth
constexpr int64_t kScratchBytes = int64_t{1} << 20;

static_assert(kQueries % kTileRows == 0 && kQueries % 2 == 0, "tiles and pairs must not straddle");

template <class E>
struct Sizes {
  int64_t q_steps, v_steps;  // of the dot products over D and Dv
  int64_t q_width, v_width;

  explicit Sizes(const AttentionProblem& p)
      : q_steps((p.head_dim + E::kDepth - 1) / E::kDepth),
        v_steps((p.value_dim + E::kDepth - 1) / E::kDepth),
        q_width(round_up(p.head_dim, kLanes<typename E::Compute>)),
        v_width(round_up(p.value_dim, kLanes<typename E::Compute>)) {}
};

template <class E>
struct Scratch {
  using C = typename E::Compute;
  using Item = typename E::Item;

  // A key block as B operands: K^T, V^T, K.
  Item *k_columns, *v_columns, *k_steps;
  C *dk, *dv;  // [kBlock][width]
  // Query rows as A operands, and as B operands (the same memory where the layouts agree).
  Item *q_rows, *dout_rows, *q_steps, *dout_steps;
  C *lse, *delta;  // [rows]
  Range* keys;     // [rows] visible
  // Probabilities and dS of a query block against a key block: pairs of rows interleaved to
  // kDepth, so that they are the A operand of P^T dout. Of one tile: in C, and dS as A operand.
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
    q_rows = c.template take<Item>(rows * n.q_width);
    dout_rows = c.template take<Item>(rows * n.v_width);
    const bool steps = E::kDepth > 1 && key_pass;
    q_steps = steps ? c.template take<Item>(rows * n.q_width) : q_rows;
    dout_steps = steps ? c.template take<Item>(rows * n.v_width) : dout_rows;
    lse = c.template take<C>(rows);
    delta = c.template take<C>(rows);
    keys = c.template take<Range>(rows);
    const int64_t block_rows = key_pass ? kQueries : kTileRows;
    p_block = c.template take<Item>(block_rows * kBlock);
    ds_block = c.template take<Item>(block_rows * kBlock);
    s_tile = c.template take<C>(E::kDepth > 1 ? kTileRows * kBlock : 0);
    dp_tile = c.template take<C>(E::kDepth > 1 ? kTileRows * kBlock : 0);
    ds_rows = c.template take<Item>(E::kDepth > 1 ? kTileRows * kBlock : 0);
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
  static constexpr C kOnes[kTileRows] = {1, 1, 1, 1, 1, 1};

 public:
  Backward(const AttentionBwdArgs& args, int64_t batch, int64_t kv_head,
           const Scratch<E>& scratch)
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
    for (int64_t g = 0; g < p_.group(); ++g) {
      for (int64_t i = 0; i < band_.queries; ++i) write_dq(dq_row(dq_in_place, g, i), g, i);
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
      for (int64_t g = 0; g < p_.group(); ++g) {
        for (int64_t i = 0; i < count; i += kTileRows) {
          const int64_t r = g * count + i;
          const int tile = static_cast<int>(count - i < kTileRows ? count - i : kTileRows);
          visit(g, i0 + i, r, 0, tile, t_.dq + r * n_.q_width, n_.q_width);
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      write_dq(t_.dq + r * n_.q_width, r / count, i0 + r % count);
    }
  }

 private:
  int64_t head(int64_t g) const { return kv_head_ * p_.group() + g; }
  Rows rows_of(const AttentionView& view, int64_t row, int64_t h, int64_t count,
               int64_t width) const {
    return {static_cast<char*>(view.data) +
                (batch_ * view.batch + row * view.row + h * view.head) * item_size(p_.dtype),
            view.row, count, width};
  }
  C* stat(const AttentionView& view, int64_t g, int64_t i) const {
    return static_cast<C*>(view.data) + batch_ * view.batch +
           (p_.q_begin(batch_) + i) * view.row + head(g) * view.head;
  }
  C* dq_row(bool in_place, int64_t g, int64_t i) const {
    if (!in_place) return t_.dq + (g * band_.queries + i) * n_.q_width;
    return static_cast<C*>(const_cast<void*>(
        rows_of(args_.dq, p_.q_begin(batch_) + i, head(g), 1, p_.head_dim).data));
  }
  void write_dq(const C* dq, int64_t g, int64_t i) const {
    const Rows out = rows_of(args_.dq, p_.q_begin(batch_) + i, head(g), 1, p_.head_dim);
    unpack_row<C>(p_.dtype, dq, static_cast<C>(p_.scale), const_cast<void*>(out.data),
                  p_.head_dim);
  }

  void load_keys(int64_t j0, int64_t count, bool for_dq) {
    j0_ = j0;
    keys_ = count;
    const int64_t first = p_.k_begin(batch_) + j0;
    const Rows k = rows_of(args_.k, first, kv_head_, count, p_.head_dim);
    const Rows v = rows_of(args_.v, first, kv_head_, count, p_.value_dim);
    pack_columns<E>(p_.dtype, k, t_.k_columns);
    pack_columns<E>(p_.dtype, v, t_.v_columns);
    if (for_dq) {
      pack_steps<E>(p_.dtype, k, t_.k_steps, n_.q_width);
      k_finite_ = all_finite(t_.k_steps, round_up(count, kD) * n_.q_width);
    }
  }

  // Queries [i0, i0 + count) of head g into rows [r, r + count) of the scratch.
  void load_queries(int64_t g, int64_t i0, int64_t count, int64_t r, bool for_dkv) {
    const int64_t first = p_.q_begin(batch_) + i0;
    const Rows q = rows_of(args_.q, first, head(g), count, p_.head_dim);
    const Rows dout = rows_of(args_.dout, first, head(g), count, p_.value_dim);
    pack_rows<E>(p_.dtype, q, t_.q_rows + r * n_.q_width, n_.q_width, logits_.q_scale);
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
        for (int64_t r = 0; r < queries; r += kTileRows) {
          const int rows = static_cast<int>(queries - r < kTileRows ? queries - r : kTileRows);
          C* dq = with_dq ? dq_row(dq_in_place, g, i0 + r) : nullptr;
          visit(g, i0 + r, r, r, rows, dq, dq_in_place ? args_.dq.row : n_.q_width);
        }
        add_dk_dv(i0, queries);
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      const int64_t row = p_.k_begin(batch_) + j0 + j;
      const Rows dk = rows_of(args_.dk, row, kv_head_, 1, p_.head_dim);
      const Rows dv = rows_of(args_.dv, row, kv_head_, 1, p_.value_dim);
      unpack_row<C>(p_.dtype, t_.dk + j * n_.q_width, logits_.scale,
                    const_cast<void*>(dk.data), p_.head_dim);
      unpack_row<C>(p_.dtype, t_.dv + j * n_.v_width, C(1), const_cast<void*>(dv.data),
                    p_.value_dim);
    }
  }

  // P and dS of queries [i, i + rows), which lie at scratch rows r on, into rows `at` on of the
  // block; and their dQ if wanted.
  void visit(int64_t g, int64_t i, int64_t r, int64_t at, int rows, C* dq, int64_t dq_ld) {
    C* s = kD == 1 ? reinterpret_cast<C*>(t_.p_block) + at * kBlock : t_.s_tile;
    C* dp = kD == 1 ? reinterpret_cast<C*>(t_.ds_block) + at * kBlock : t_.dp_tile;
    Range seen = {0, 0};
    for (int row = 0; row < rows; ++row) {
      seen = hull(seen, intersect(t_.keys[r + row], {j0_, j0_ + keys_}));
    }
    seen = seen.empty() ? Range{0, 0} : Range{seen.first - j0_, seen.last - j0_};
    const Range columns = {seen.first / kPanel<E> * kPanel<E>, round_up(seen.last, kL)};

    if (!seen.empty()) {
      const int64_t panel = columns.first / kPanel<E>;
      const int64_t k_panel = n_.q_steps * kPanel<E> * kD;
      const int64_t v_panel = n_.v_steps * kPanel<E> * kD;
      gemm<E>({t_.q_rows + r * n_.q_width, n_.q_width, kD, t_.k_columns + panel * k_panel,
               kPanel<E> * kD, k_panel, s + columns.first, kBlock, n_.q_steps, nullptr},
              rows, columns.size());
      gemm<E>({t_.dout_rows + r * n_.v_width, n_.v_width, kD, t_.v_columns + panel * v_panel,
               kPanel<E> * kD, v_panel, dp + columns.first, kBlock, n_.v_steps, nullptr},
              rows, columns.size());
    }
    for (int row = 0; row < rows; ++row) {
      const Range own = {t_.keys[r + row].first - j0_, t_.keys[r + row].last - j0_};
      differentiate(g, i + row, r + row, columns, own, s + row * kBlock, dp + row * kBlock);
    }
    if constexpr (kD == 2) store_block(at, rows, s, dp);
    if (dq == nullptr || seen.empty()) return;

    const int64_t k0 = seen.first / kD;
    const Item* ds = kD == 1 ? t_.ds_block + at * kBlock : t_.ds_rows;
    const Gemm<E> product = {ds + k0 * kD, kBlock, kD, t_.k_steps + k0 * kD * n_.q_width,
                             n_.q_width * kD, kPanel<E> * kD, dq, dq_ld,
                             (seen.last + kD - 1) / kD - k0, kOnes};
    if (k_finite_) return gemm<E>(product, rows, n_.q_width);
    for (int row = 0; row < rows; ++row) {
      const Range own = intersect(t_.keys[r + row], {j0_, j0_ + keys_});
      const int64_t origin = j0_ + k0 * kD;
      gemm_exact<E>(product, row, own.first - origin, own.last - origin, p_.head_dim);
    }
  }

  // One row: scores and dP become P and dS, zero outside the visible columns.
  void differentiate(int64_t g, int64_t i, int64_t r, Range columns, Range own, C* s,
                     C* dp) const {
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

  // A tile of P and dS in C into the 16-bit layouts.
  void store_block(int64_t at, int rows, const C* p, const C* ds) {
    for (int row = 0; row < rows; row += 2) {
      Item* p_pair = t_.p_block + (at + row) * kBlock;
      Item* ds_pair = t_.ds_block + (at + row) * kBlock;
      const bool odd = row + 1 < rows;
      for (int64_t c = 0; c < kBlock; c += kL) {
        const C* here = p + row * kBlock + c;
        E::store_pairs(p_pair + 2 * c, load<C>(here), odd ? load<C>(here + kBlock) : Vec<C>{});
        here = ds + row * kBlock + c;
        E::store_pairs(ds_pair + 2 * c, load<C>(here), odd ? load<C>(here + kBlock) : Vec<C>{});
      }
    }
    for (int row = 0; row < rows; ++row) {
      for (int64_t c = 0; c < kBlock; c += 2 * kL) {
        const C* here = ds + row * kBlock + c;
        E::store_a(t_.ds_rows + row * kBlock + c, load<C>(here), load<C>(here + kL));
      }
    }
  }

  // dV += P^T dout and dK += dS^T Q over the query block.
  void add_dk_dv(int64_t i0, int64_t queries) {
    for (int64_t j = 0; j < keys_; j += kTileRows) {
      const int rows = static_cast<int>(keys_ - j < kTileRows ? keys_ - j : kTileRows);
      const Range seen = intersect(band_.queries_of(j0_ + j, j0_ + j + rows), {i0, i0 + queries});
      if (seen.empty()) continue;
      const int64_t i_first = (seen.first - i0) / kD;
      const int64_t steps = (seen.last - i0 + kD - 1) / kD - i_first;
      const int64_t a = i_first * kBlock * kD + j * kD;
      const Gemm<E> dv = {t_.p_block + a, kD, kBlock * kD,
                          t_.dout_steps + i_first * n_.v_width * kD, n_.v_width * kD,
                          kPanel<E> * kD, t_.dv + j * n_.v_width, n_.v_width, steps, kOnes};
      const Gemm<E> dk = {t_.ds_block + a, kD, kBlock * kD,
                          t_.q_steps + i_first * n_.q_width * kD, n_.q_width * kD,
                          kPanel<E> * kD, t_.dk + j * n_.q_width, n_.q_width, steps, kOnes};
      add(dv, dout_finite_, j, rows, i0 + i_first * kD, seen.last, n_.v_width);
      add(dk, q_finite_, j, rows, i0 + i_first * kD, seen.last, n_.q_width);
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
  Scratch<E> t_;
  int64_t j0_ = 0, keys_ = 0;  // the key block that is loaded
  bool k_finite_ = true, q_finite_ = true, dout_finite_ = true;
};

// delta = rowsum(dout * out) - dlse. Call inside a parallel region.
template <class C, class S>
void compute_delta(const AttentionBwdArgs& args) {
  const AttentionProblem& p = args.problem;
#pragma omp for collapse(2) schedule(static)
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.heads; ++h) {
      for (int64_t i = p.q_begin(b); i < p.q_begin(b) + p.q_len(b); ++i) {
        const auto row = [&](const AttentionView& view) {
          return static_cast<const S*>(view.data) + b * view.batch + i * view.row + h * view.head;
        };
        const auto at = [&](const AttentionView& view) {
          return static_cast<C*>(view.data) + b * view.batch + i * view.row + h * view.head;
        };
        Vec<C> sum = {};
        for (int64_t d = 0; d < p.value_dim; d += kLanes<C>) {
          sum = fma(load_n<C>(row(args.dout) + d, p.value_dim - d),
                    load_n<C>(row(args.out) + d, p.value_dim - d), sum);
        }
        *at(args.delta) = reduce_add(sum) - (args.dlse.data ? *at(args.dlse) : C(0));
      }
    }
  }
}

// dsink = -sum over rows of exp(sink - lse) * delta, rows in order. Call inside a parallel region.
template <class C>
void compute_dsink(const AttentionBwdArgs& args) {
  const AttentionProblem& p = args.problem;
#pragma omp for schedule(static)
  for (int64_t h = 0; h < p.heads; ++h) {
    const double sink = static_cast<const C*>(p.sink.data)[h * p.sink.head];
    double sum = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t i = p.q_begin(b); i < p.q_begin(b) + p.q_len(b); ++i) {
        const auto at = [&](const AttentionView& view) {
          return static_cast<const C*>(view.data)[b * view.batch + i * view.row + h * view.head];
        };
        if (sink == -std::numeric_limits<double>::infinity()) continue;
        sum -= std::exp(sink - static_cast<double>(at(args.lse))) * at(args.delta);
      }
    }
    static_cast<C*>(args.dsink)[h] = static_cast<C>(sum);
  }
}

template <class E>
int64_t scratch_bytes(const Sizes<E>& n, int64_t rows, int64_t dq_rows, bool key_pass) {
  Carver count(nullptr);
  Scratch<E>().carve(count, n, rows, dq_rows, key_pass);
  return count.used();
}

template <class E>
void backward(const AttentionBwdArgs& args) {
  using C = typename E::Compute;
  const AttentionProblem& p = args.problem;
  const Sizes<E> n(p);
  const bool in_place = item_size(p.dtype) == sizeof(C) && n.q_width == p.head_dim;
  const int64_t dq_rows = in_place ? 0 : p.group() * p.max_q;
  const int64_t heads = p.batch * p.kv_heads;
  // Idle threads in the last round must not cost more than the recomputation, 14 / 10.
  const int64_t rounds = (heads + args.threads - 1) / args.threads;
  const bool balanced = rounds * args.threads * 10 <= heads * 14;
  const bool one_pass =
      balanced && scratch_bytes<E>(n, kQueries, dq_rows, true) <= kScratchBytes;

#pragma omp parallel num_threads(args.threads)
  {
    const DenormalsOff guard;
    static thread_local Arena arena;
    if constexpr (std::is_same_v<C, double>) {
      compute_delta<C, double>(args);
    } else {
      with_storage(p.dtype, [&](auto s) { compute_delta<C, decltype(s)>(args); });
    }
    if (args.dsink) compute_dsink<C>(args);

    const auto carve = [&](int64_t rows, int64_t dq, bool key_pass) {
      Carver carver(arena.reserve(scratch_bytes<E>(n, rows, dq, key_pass)));
      Scratch<E> scratch;
      scratch.carve(carver, n, rows, dq, key_pass);
      return scratch;
    };
    const Scratch<E> scratch = carve(kQueries, one_pass ? dq_rows : 0, true);
    if (one_pass) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < heads; ++i) {
        Backward<E>(args, i / p.kv_heads, i % p.kv_heads, scratch).run_head(in_place);
      }
    } else {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < args.num_key_tasks * p.kv_heads; ++i) {
        const AttentionTask& task = args.key_tasks[i / p.kv_heads];
        Backward<E>(args, task.batch, i % p.kv_heads, scratch).run_keys(task.first, task.count);
      }
      const Scratch<E> query_scratch = carve(args.task_rows, args.task_rows, false);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < args.num_query_tasks * p.kv_heads; ++i) {
        const AttentionTask& task = args.query_tasks[i / p.kv_heads];
        Backward<E>(args, task.batch, i % p.kv_heads, query_scratch)
            .run_queries(task.first, task.count);
      }
    }
  }
}

}  // namespace

void attention_bwd_kernel(const AttentionBwdArgs& args) {
  if (args.problem.dtype == DType::f64) return backward<Fma<double>>(args);
#if defined(__AVX512BF16__)
  if (args.problem.dtype == DType::bf16) return backward<DotBf16>(args);
#endif
  backward<Fma<float>>(args);
}

}  // namespace ceg::CEG_ISA
