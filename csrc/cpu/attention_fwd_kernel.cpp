// Flash attention forward. A task is a block of queries of one sequence and kv head, with all heads
// of the group: rows (g, i). Keys are visited in blocks, packed once per task; each tile of
// E::kRows rows then runs scores, softmax and p.v while its scores are in L1.
//
// A row's arithmetic depends only on its own visible keys and the fixed block grid (a tile's extra
// columns contribute exact zeros), so neither the task size nor the thread count changes its bits.
//
// With few queries and many keys (decoding) a task is one chunk of the keys: its state stays where
// it is until all are done, then the chunks of a sequence are merged in order and written.
#include <cmath>
#include <limits>

#include "attention_amx.h"
#include "attention_dots.h"
#include "attention_mask.h"
#include "attention_pack.h"
#include "kernels.h"

namespace ceg::CEG_ISA {
namespace {

template <class E>
struct Scratch {
  using C = typename E::Compute;
  using Item = typename E::Item;
  static constexpr int64_t kBlock = E::kForwardBlocks * kAttentionBlockKeys;

  Item* q;      // [rows][q_width]
  C* out;       // [rows][v_width], unnormalised
  C* top;       // [rows] running maximum of the logits
  C* sum;       // [rows] of the probabilities
  Range* keys;  // [rows] visible
  Item* k;      // [kBlock / kPanel][q_steps][kPanel][depth]
  Item* v;      // [kBlock / depth][v_width][depth]
  C* s;         // [E::kRows][kBlock]
  Item* p;      // the same, as the A operand

  void carve(Carver& carver, const Sizes<E>& n, int64_t rows) {
    q = carver.template take<Item>(round_up(rows, E::kRows) * n.q_width);
    out = carver.template take<C>(rows * n.v_width);
    top = carver.template take<C>(rows);
    sum = carver.template take<C>(rows);
    keys = carver.template take<Range>(rows);
    k = carver.template take<Item>(kBlock * n.q_steps * E::kDepth);
    v = carver.template take<Item>(kBlock * n.v_width);
    s = carver.template take<C>(E::kRows * kBlock);
    p = E::kDepth == 1 ? reinterpret_cast<Item*>(s) : carver.template take<Item>(E::kRows * kBlock);
  }
};

template <class E>
class Task {
  using C = typename E::Compute;
  using Item = typename E::Item;
  static constexpr int kL = kLanes<C>;
  static constexpr int64_t kBlock = Scratch<E>::kBlock;
  static constexpr int kStats = (E::kRows + kL - 1) / kL * kL;  // rows in whole vectors
  static constexpr C kInf = std::numeric_limits<C>::infinity();

 public:
  Task(const AttentionFwdArgs& args, const AttentionTask& task, int64_t kv_head,
       const Scratch<E>& scratch)
      : args_(args),
        p_(args.problem),
        task_(task),
        kv_head_(kv_head),
        rows_(task.count * args.problem.group()),
        tile_rows_(args.problem.few_rows() ? kTileRows : E::kRows),
        band_(args.problem, task.batch),
        n_(args.problem),
        logits_(args.problem),
        row_scale_(logits_.plain() ? logits_.scale : C(1)),
        t_(scratch) {}

  void run() {
    accumulate();
    write();
  }

  // Leaves out, top and sum in the scratch.
  void accumulate() {
    load_queries();
    const Range keys = intersect(band_.keys_of(task_.first, task_.first + task_.count),
                                 {task_.key_begin, task_.key_end});
    for (int64_t j0 = keys.first / kBlock * kBlock; j0 < keys.last; j0 += kBlock) {
      const Range block = intersect({j0, j0 + kBlock}, keys);
      load_keys(j0, block.last - j0);
      Ahead<2> next = keys_ahead(block.last, keys.last);
      for (int64_t r = 0; r < rows_; r += tile_rows_) {
        visit(r, static_cast<int>(rows_ - r < tile_rows_ ? rows_ - r : tile_rows_), block, j0,
              next);
      }
    }
    *args_.executed += executed_;
  }

  // Joins the states that the later chunks of the keys left.
  template <class StateOf>
  void finish(int64_t chunks, StateOf state) {
    for (int64_t c = 1; c < chunks; ++c) merge(state(c));
    write();
  }

 private:
  int64_t head(int64_t r) const { return kv_head_ * p_.group() + r / task_.count; }
  int64_t query(int64_t r) const { return task_.first + r % task_.count; }

  Rows rows(const AttentionView& view, int64_t row, int64_t h, int64_t count, int64_t width) const {
    return rows_of(p_, view, task_.batch, row, h, count, width);
  }

  void load_queries() {
    const int64_t first = p_.q_begin(task_.batch) + task_.first;
    for (int64_t g = 0; g < p_.group(); ++g) {
      const int64_t h = kv_head_ * p_.group() + g;
      pack_rows<E>(p_.dtype, rows(args_.q, first, h, task_.count, p_.head_dim),
                   t_.q + g * task_.count * n_.q_width, n_.q_width, logits_.folded);
    }
    std::memset(t_.out, 0, static_cast<size_t>(rows_ * n_.v_width) * sizeof(C));
    for (int64_t r = 0; r < rows_; ++r) {
      t_.keys[r] = intersect(band_.keys_of(query(r)), {task_.key_begin, task_.key_end});
      // The sink is a key without a value: the state after having seen it.
      const bool sink = p_.sink.data != nullptr && task_.sink;
      t_.top[r] = sink ? static_cast<const C*>(p_.sink.data)[head(r) * p_.sink.head] : -kInf;
      t_.sum[r] = sink ? C(1) : C(0);
    }
  }

  void load_keys(int64_t j0, int64_t count) {
    const int64_t first = p_.k_begin(task_.batch) + j0;
    k_rows_ = rows(args_.k, first, kv_head_, count, p_.head_dim);
    v_rows_ = rows(args_.v, first, kv_head_, count, p_.value_dim);
    if (p_.few_rows()) return;
    pack_columns<E>(p_.dtype, k_rows_, t_.k);
    v_finite_ = pack_steps<E>(p_.dtype, v_rows_, t_.v, n_.v_width);
  }

  Ahead<2> keys_ahead(int64_t j, int64_t stop) const {
    const int64_t first = p_.k_begin(task_.batch) + j;
    const int64_t count = p_.few_rows() ? 0 : stop - j < kBlock ? stop - j : kBlock;
    const int64_t tiles = (rows_ + tile_rows_ - 1) / tile_rows_;
    return {p_.dtype,
            {rows(args_.k, first, kv_head_, count, p_.head_dim),
             rows(args_.v, first, kv_head_, count, p_.value_dim)},
            3 * tiles};
  }

  // Scores, softmax and p.v of rows [r, r + rows) against the keys of one block.
  void visit(int64_t r, int rows, Range block, int64_t j0, Ahead<2>& next) {
    Range seen = {0, 0};
    for (int i = 0; i < rows; ++i) seen = hull(seen, intersect(t_.keys[r + i], block));
    if (seen.empty()) return;
    seen = {seen.first - j0, seen.last - j0};
    const int64_t start = seen.first / kPanel<E> * kPanel<E>;
    const int64_t stop = round_up(seen.last, 2 * kL);

    next.step();
    scores(t_.q + r * n_.q_width, rows, start, stop);
    next.step();
    C rescale[kStats];
    softmax(r, rows, j0, {start, stop}, rescale);
    next.step();
    values(r, rows, block, j0, seen, rescale);
  }

  void scores(const Item* q, int rows, int64_t start, int64_t stop) {
    if constexpr (E::kDepth == 1) {
      if (p_.few_rows()) {
        dot_scores<E>(p_.dtype, q, n_.q_width, rows, k_rows_, start, stop, t_.s, kBlock);
        executed_ += 2 * rows * (stop - start) * p_.head_dim;
        return;
      }
    }
    const int64_t panel = n_.q_steps * kPanel<E> * E::kDepth;
    multiply({q, n_.q_width, E::kDepth, t_.k + start / kPanel<E> * panel, kPanel<E> * E::kDepth,
              panel, t_.s + start, kBlock, n_.q_steps, nullptr},
             rows, stop - start);
  }

  void multiply(const Gemm<E>& product, int rows, int64_t columns) {
    executed_ += gemm_flops(product, rows, columns);
    gemm<E>(product, rows, columns);
  }

  void values(int64_t r, int rows, Range block, int64_t j0, Range seen, const C* rescale) {
    Range own[E::kRows];
    for (int i = 0; i < rows; ++i) {
      const Range keys = intersect(t_.keys[r + i], block);
      own[i] = {keys.first - j0, keys.last - j0};
    }
    if constexpr (E::kDepth == 1) {
      if (p_.few_rows()) {
        const WeightedSum<C> sum = {t_.p,       kBlock, v_rows_, t_.out + r * n_.v_width,
                                    n_.v_width, rescale};
        add_values<E>(p_.dtype, sum, rows, n_.v_width, seen, own);
        executed_ += 2 * rows * seen.size() * p_.value_dim;
        return;
      }
    }
    const int64_t k0 = seen.first / E::kAlign * E::kAlign / E::kDepth;
    const int64_t k1 = round_up(seen.last, E::kAlign) / E::kDepth;
    const Gemm<E> pv = {t_.p + k0 * E::kDepth,
                        kBlock,
                        E::kDepth,
                        t_.v + k0 * E::kDepth * n_.v_width,
                        n_.v_width * E::kDepth,
                        kPanel<E> * E::kDepth,
                        t_.out + r * n_.v_width,
                        n_.v_width,
                        k1 - k0,
                        rescale};
    if (v_finite_) {
      multiply(pv, rows, n_.v_width);
    } else {
      const int64_t origin = k0 * E::kDepth;
      executed_ += gemm_flops(pv, rows, n_.v_width);
      for (int i = 0; i < rows; ++i) {
        gemm_exact<E>(pv, i, own[i].first - origin, own[i].last - origin, n_.v_width);
      }
    }
  }

  // As many rows at once as a vector has lanes, so that their maxima and sums are folded together.
  void softmax(int64_t r, int rows, int64_t j0, Range columns, C* rescale) {
    for (int first = 0; first < rows; first += kL) {
      const int count = rows - first < kL ? rows - first : kL;
      C* const s = t_.s + first * kBlock;
      Item* const p = t_.p + first * kBlock;
      C* const tops = t_.top + r + first;
      C* const sums = t_.sum + r + first;
      Vec<C> each[kL] = {};
      for (int i = 0; i < count; ++i) {
        each[i] = logits(s + i * kBlock, r + first + i, j0, columns);
      }
      const Vec<C> high = reduce_each(each, [](auto a, auto b) { return max(a, b); });
      // What the rows have summed up so far, brought to the new maximum.
      const Vec<C> before = load_n<C>(tops, count);
      const Vec<C> now = max(high * row_scale_, before);
      // Nothing visible yet: any finite number keeps exp(-inf - shift) at 0 instead of NaN.
      const Vec<C> shift = now == -kInf ? Vec<C>{} : now;
      const Vec<C> factor = exp(before - shift);
      store(rescale + first, factor);
      store_n(tops, now, count);
      for (int i = 0; i < count; ++i) {
        each[i] = probabilities(s + i * kBlock, p + i * kBlock, columns, shift[i]);
      }
      const Vec<C> more = reduce_each(each, [](auto a, auto b) { return a + b; });
      store_n(sums, load_n<C>(sums, count) * factor + more, count);
    }
  }

  // Of row r: masked keys become -inf. The largest of each lane.
  Vec<C> logits(C* s, int64_t r, int64_t j0, Range columns) const {
    const Range own = {t_.keys[r].first - j0, t_.keys[r].last - j0};
    if (!logits_.plain()) to_logits(s, columns, r, j0);
    if (own.first > columns.first || own.last < columns.last) {
      for (int64_t c = columns.first; c < columns.last; c += kL) {
        store(s + c, keep(load<C>(s + c), c, own, -kInf));
      }
    }
    Vec<C> even = load<C>(s + columns.first), odd = load<C>(s + columns.first + kL);
    for (int64_t c = columns.first + 2 * kL; c < columns.last; c += 2 * kL) {
      even = max(load<C>(s + c), even);
      odd = max(load<C>(s + c + kL), odd);
    }
    return max(even, odd);
  }

  // Their sum, by lane.
  Vec<C> probabilities(const C* s, Item* p, Range columns, C top) const {
    Vec<C> sum = {};
    for (int64_t c = columns.first; c < columns.last; c += 2 * kL) {
      const Vec<C> a = exp(load<C>(s + c) * row_scale_ - top);
      const Vec<C> b = exp(load<C>(s + c + kL) * row_scale_ - top);
      sum += a + b;
      E::store_a(p + c, a, b);
    }
    return sum;
  }

  void to_logits(C* s, Range columns, int64_t r, int64_t j0) const {
    const C slope = logits_.slope(p_, task_.batch, head(r));
    const int64_t distance = query(r) + band_.shift() - j0;
    for (int64_t c = columns.first; c < columns.last; c += kL) {
      Vec<C> x = load<C>(s + c);
      x = logits_.capped ? logits_.cap * tanh(x * logits_.cap_in) : x * logits_.scale;
      if (logits_.biased) x += Logits<E>::bias(slope, distance - c);
      store(s + c, x);
    }
  }

  // The state of rows that saw later keys joins ours.
  void merge(const Scratch<E>& later) {
    for (int64_t r = 0; r < rows_; ++r) {
      const C top = std::fmax(t_.top[r], later.top[r]);
      const C shift = top == -kInf ? C(0) : top;
      const C ours = exp(broadcast(t_.top[r] - shift))[0];
      const C theirs = exp(broadcast(later.top[r] - shift))[0];
      C* out = t_.out + r * n_.v_width;
      const C* more = later.out + r * n_.v_width;
      for (int64_t d = 0; d < n_.v_width; d += kL) {
        store(out + d, load<C>(out + d) * ours + load<C>(more + d) * theirs);
      }
      t_.sum[r] = t_.sum[r] * ours + later.sum[r] * theirs;
      t_.top[r] = top;
    }
  }

  void write() {
    const int64_t first = p_.q_begin(task_.batch) + task_.first;
    for (int64_t g = 0; g < p_.group(); ++g) {
      const int64_t r0 = g * task_.count;
      const int64_t h = head(r0);
      const C* sum = t_.sum + r0;
      unpack_rows(
          p_.dtype, t_.out + r0 * n_.v_width, n_.v_width,
          [&](int64_t r) { return sum[r] == 0 ? C(0) : C(1) / sum[r]; },
          rows(args_.out, first, h, task_.count, p_.value_dim));
      C* lse = static_cast<C*>(args_.lse.data) + task_.batch * args_.lse.batch +
               first * args_.lse.row + h * args_.lse.head;
      for (int64_t r = 0; r < task_.count; ++r) {
        lse[r * args_.lse.row] = t_.top[r0 + r] + std::log(sum[r]);
      }
    }
  }

  const AttentionFwdArgs& args_;
  const AttentionProblem& p_;
  const AttentionTask& task_;
  int64_t kv_head_, rows_, tile_rows_;
  Band band_;
  Sizes<E> n_;
  Logits<E> logits_;
  C row_scale_;  // what the softmax still has to apply
  Scratch<E> t_;
  Rows k_rows_ = {}, v_rows_ = {};  // of the block
  int64_t executed_ = 0;
  bool v_finite_ = true;
};

// The states of all (task, kv head) pairs, where tasks are chunks of keys.
template <class E>
class States {
 public:
  States(Arena& arena, const AttentionFwdArgs& args) {
    Carver count(nullptr);
    carve(count, args);
    Carver carver(arena.reserve(count.used()));
    carve(carver, args);
  }

  // `scratch`, with the state of task i in the place of its own.
  Scratch<E> state(Scratch<E> scratch, int64_t i) const {
    scratch.out = out_ + i * out_items_;
    scratch.top = top_ + i * rows_;
    scratch.sum = sum_ + i * rows_;
    return scratch;
  }

 private:
  using C = typename E::Compute;

  void carve(Carver& carver, const AttentionFwdArgs& args) {
    const int64_t count = args.chunks > 1 ? args.num_tasks * args.problem.kv_heads : 0;
    rows_ = round_up(args.task_rows, kLanes<C>);  // no cache line has two writers
    out_items_ = args.task_rows * Sizes<E>(args.problem).v_width;
    out_ = carver.template take<C>(count * out_items_);
    top_ = carver.template take<C>(count * rows_);
    sum_ = carver.template take<C>(count * rows_);
  }

  int64_t rows_, out_items_;
  C *out_, *top_, *sum_;
};

template <class E>
void forward(const AttentionFwdArgs& args) {
  const int64_t kv_heads = args.problem.kv_heads;
  const Sizes<E> sizes(args.problem);
  static thread_local Arena states_arena;
  const States<E> states(states_arena, args);
#pragma omp parallel num_threads(args.threads)
  {
    const DenormalsOff guard;
    [[maybe_unused]] const typename E::ThreadState state;
    static thread_local Arena arena;
    Scratch<E> scratch;
    Carver count(nullptr);
    scratch.carve(count, sizes, args.task_rows);
    Carver carver(arena.reserve(count.used()));
    scratch.carve(carver, sizes, args.task_rows);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < args.num_tasks * kv_heads; ++i) {
      const AttentionTask& task = args.tasks[i / kv_heads];
      if (args.chunks == 1) {
        Task<E>(args, task, i % kv_heads, scratch).run();
      } else {
        Task<E>(args, task, i % kv_heads, states.state(scratch, i)).accumulate();
      }
    }
    if (args.chunks > 1) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < args.problem.batch * kv_heads; ++i) {
        const int64_t first = i / kv_heads * args.chunks;
        const auto state = [&](int64_t chunk) {
          return states.state(scratch, (first + chunk) * kv_heads + i % kv_heads);
        };
        Task<E>(args, args.tasks[first], i % kv_heads, state(0)).finish(args.chunks, state);
      }
    }
  }
}

}  // namespace

void attention_fwd_kernel(const AttentionFwdArgs& args) {
#if defined(__AVX512BF16__)
#if defined(__AMX_BF16__)
  using Bf16 = AmxBf16;
#else
  using Bf16 = DotBf16;
#endif
  // attention_dots.h, which few rows are for, multiplies in fp32.
  const bool dots = args.problem.few_rows();
  if (args.problem.dtype == DType::bf16 && !dots) return forward<Bf16>(args);
  avx512::attention_fwd_kernel(args);  // the same code: not compiled again
#else
  if (args.problem.dtype == DType::f64) return forward<Fma<double> >(args);
  forward<Fma<float> >(args);
#endif
}

}  // namespace ceg::CEG_ISA
