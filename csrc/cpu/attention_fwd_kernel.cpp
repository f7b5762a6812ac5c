// Flash attention forward. A task is a block of queries of one sequence and kv head, with all heads
// of the group: rows (g, i). Keys are visited in blocks, packed once per task; each tile of
// E::kRows rows then runs scores, softmax and p.v while its scores are in L1.
//
// A row's arithmetic depends only on its own visible keys and the fixed block grid (a tile's extra
// columns contribute exact zeros), so neither the task size nor the thread count changes its bits.
#include <cmath>
#include <limits>

#include "attention_amx.h"
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
        band_(args.problem, task.batch),
        n_(args.problem),
        logits_(args.problem),
        t_(scratch) {}

  void run() {
    load_queries();
    const Range keys = band_.keys_of(task_.first, task_.first + task_.count);
    for (int64_t j0 = keys.first / kBlock * kBlock; j0 < keys.last; j0 += kBlock) {
      const Range block = intersect({j0, j0 + kBlock}, keys);
      load_keys(j0, block.last - j0);
      for (int64_t r = 0; r < rows_; r += E::kRows) {
        visit(r, static_cast<int>(rows_ - r < E::kRows ? rows_ - r : E::kRows), block, j0);
      }
    }
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
      t_.keys[r] = band_.keys_of(query(r));
      // The sink is a key without a value: the state after having seen it.
      const bool sink = p_.sink.data != nullptr;
      t_.top[r] = sink ? static_cast<const C*>(p_.sink.data)[head(r) * p_.sink.head] : -kInf;
      t_.sum[r] = sink ? C(1) : C(0);
    }
  }

  void load_keys(int64_t j0, int64_t count) {
    const int64_t first = p_.k_begin(task_.batch) + j0;
    pack_columns<E>(p_.dtype, rows(args_.k, first, kv_head_, count, p_.head_dim), t_.k);
    pack_steps<E>(p_.dtype, rows(args_.v, first, kv_head_, count, p_.value_dim), t_.v, n_.v_width);
    v_finite_ = all_finite(t_.v, round_up(count, E::kDepth) * n_.v_width);
  }

  // Scores, softmax and p.v of rows [r, r + rows) against the keys of one block.
  void visit(int64_t r, int rows, Range block, int64_t j0) {
    Range seen = {0, 0};
    for (int i = 0; i < rows; ++i) seen = hull(seen, intersect(t_.keys[r + i], block));
    if (seen.empty()) return;
    seen = {seen.first - j0, seen.last - j0};
    const int64_t start = seen.first / kPanel<E> * kPanel<E>;
    const int64_t stop = round_up(seen.last, 2 * kL);

    const int64_t panel = n_.q_steps * kPanel<E> * E::kDepth;
    gemm<E>({t_.q + r * n_.q_width, n_.q_width, E::kDepth, t_.k + start / kPanel<E> * panel,
             kPanel<E> * E::kDepth, panel, t_.s + start, kBlock, n_.q_steps, nullptr},
            rows, stop - start);

    C rescale[kStats];
    softmax(r, rows, j0, {start, stop}, rescale);

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
      gemm<E>(pv, rows, n_.v_width);
    } else {
      for (int i = 0; i < rows; ++i) {
        const Range own = intersect(t_.keys[r + i], block);
        const int64_t origin = j0 + k0 * E::kDepth;
        gemm_exact<E>(pv, i, own.first - origin, own.last - origin, n_.v_width);
      }
    }
  }

  void softmax(int64_t r, int rows, int64_t j0, Range columns, C* rescale) {
    const C scale = logits_.plain() ? logits_.scale : C(1);
    C top[kStats];
    // Logits, and the largest of each row.
    for (int i = 0; i < rows; ++i) {
      C* s = t_.s + i * kBlock;
      const Range own = {t_.keys[r + i].first - j0, t_.keys[r + i].last - j0};
      if (!logits_.plain()) to_logits(s, columns, r + i, j0);
      if (own.first > columns.first || own.last < columns.last) {
        for (int64_t c = columns.first; c < columns.last; c += kL) {
          store(s + c, keep(load<C>(s + c), c, own, -kInf));
        }
      }
      Vec<C> high = load<C>(s + columns.first);
      for (int64_t c = columns.first + kL; c < columns.last; c += kL) {
        high = max(load<C>(s + c), high);
      }
      top[i] = std::fmax(t_.top[r + i], reduce_max(high) * scale);
    }
    // What the rows have summed up so far, brought to the new maximum.
    for (int i = 0; i < rows; i += kL) {
      const Vec<C> now = load_n<C>(top + i, rows - i);
      // Nothing visible yet: any finite number keeps exp(-inf - shift) at 0 instead of NaN.
      const Vec<C> shift = now == -kInf ? Vec<C>{} : now;
      store(rescale + i, exp(load_n<C>(t_.top + r + i, rows - i) - shift));
      store_n(t_.top + r + i, now, rows - i);
      store(top + i, shift);
    }
    // Probabilities and their sums.
    for (int i = 0; i < rows; ++i) {
      const C* s = t_.s + i * kBlock;
      Vec<C> sum = {};
      for (int64_t c = columns.first; c < columns.last; c += 2 * kL) {
        const Vec<C> a = exp(load<C>(s + c) * scale - top[i]);
        const Vec<C> b = exp(load<C>(s + c + kL) * scale - top[i]);
        sum += a + b;
        E::store_a(t_.p + i * kBlock + c, a, b);
      }
      t_.sum[r + i] = t_.sum[r + i] * rescale[i] + reduce_add(sum);
    }
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
  int64_t kv_head_, rows_;
  Band band_;
  Sizes<E> n_;
  Logits<E> logits_;
  Scratch<E> t_;
  bool v_finite_ = true;
};

template <class E>
void forward(const AttentionFwdArgs& args) {
  const int64_t kv_heads = args.problem.kv_heads;
  const Sizes<E> sizes(args.problem);
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
      Task<E>(args, args.tasks[i / kv_heads], i % kv_heads, scratch).run();
    }
  }
}

}  // namespace

void attention_fwd_kernel(const AttentionFwdArgs& args) {
  if (args.problem.dtype == DType::f64) return forward<Fma<double>>(args);
#if defined(__AMX_BF16__)
  if (args.problem.dtype == DType::bf16) return forward<AmxBf16>(args);
#elif defined(__AVX512BF16__)
  if (args.problem.dtype == DType::bf16) return forward<DotBf16>(args);
#endif
  forward<Fma<float>>(args);
}

}  // namespace ceg::CEG_ISA
