// Flash attention backward, from the probabilities recomputed with the forward's lse:
//   P = exp(S - lse)   dP = dout V^T   dS = P * (dP - delta)   delta = rowsum(dout * out) - dlse
//   dV = P^T dout      dK = scale * dS^T Q                     dQ = scale * dS K
//
// Two schedules with the same bits. One pass (10 D flops a pair) gives each (sequence, kv head) to
// one thread, which adds up dQ while it walks over the key blocks. Two passes (14 D) recompute P
// and dP for dQ, but every key block and every query block is a task of its own: for few heads, or
// where a 16-bit dQ is so long that the lower halves of its sums (attention_dq.h) exceed the
// scratch budget. Each sum runs over ascending blocks of a fixed grid in either schedule, and no
// two threads add to the same number.
#include <cmath>
#include <limits>

#include "attention_amx.h"
#include "attention_bwd_task.h"
#include "kernels.h"

namespace ceg::CEG_ISA {
namespace {

constexpr int64_t kScratchBytes = int64_t{1} << 20;

// delta = rowsum(dout * out) - dlse. Call inside a parallel region. All heads of a row before the
// next row, as they lie in memory: rows of one head are too far apart for the hardware to fetch.
template <class C, class S>
void compute_delta(const AttentionBwdArgs& args) {
  const AttentionProblem& p = args.problem;
  for (int64_t b = 0; b < p.batch; ++b) {
#pragma omp for schedule(static) nowait
    for (int64_t i = p.q_begin(b); i < p.q_begin(b) + p.q_len(b); ++i) {
      for (int64_t h = 0; h < p.heads; ++h) {
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
#pragma omp barrier
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
int64_t scratch_bytes(const AttentionProblem& p, int64_t rows, int64_t dq_rows, bool key_pass) {
  Carver count(nullptr);
  BackwardScratch<E>().carve(count, Sizes<E>(p), rows, dq_rows, key_pass, halves_dq(p));
  return count.used();
}

template <class E>
void backward(const AttentionBwdArgs& args) {
  using C = typename E::Compute;
  const AttentionProblem& p = args.problem;
  const int64_t dq_rows = p.group() * p.max_q;
  const int64_t heads = p.batch * p.kv_heads;
  // Idle threads in the last round must not cost more than the recomputation, 14 / 10.
  const int64_t rounds = (heads + args.threads - 1) / args.threads;
  const bool balanced = rounds * args.threads * 10 <= heads * 14;
  const bool one_pass = balanced && scratch_bytes<E>(p, kQueries, dq_rows, true) <= kScratchBytes;

#pragma omp parallel num_threads(args.threads)
  {
    const DenormalsOff guard;
    [[maybe_unused]] const typename E::ThreadState state;
    static thread_local Arena arena;
    if constexpr (std::is_same_v<C, double>) {
      compute_delta<C, double>(args);
    } else {
      with_storage(p.dtype, [&](auto s) { compute_delta<C, decltype(s)>(args); });
    }
    if (args.dsink) compute_dsink<C>(args);

    const auto carve = [&](int64_t rows, int64_t dq, bool key_pass) {
      Carver carver(arena.reserve(scratch_bytes<E>(p, rows, dq, key_pass)));
      BackwardScratch<E> scratch;
      scratch.carve(carver, Sizes<E>(p), rows, dq, key_pass, halves_dq(p));
      return scratch;
    };
    const BackwardScratch<E> scratch = carve(kQueries, one_pass ? dq_rows : 0, true);
    if (one_pass) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < heads; ++i) {
        Backward<E>(args, i / p.kv_heads, i % p.kv_heads, scratch).run_head();
      }
    } else {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < args.num_key_tasks * p.kv_heads; ++i) {
        const AttentionTask& task = args.key_tasks[i / p.kv_heads];
        Backward<E>(args, task.batch, i % p.kv_heads, scratch).run_keys(task.first, task.count);
      }
      const BackwardScratch<E> query_scratch = carve(args.task_rows, args.task_rows, false);
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
#if defined(__AVX512BF16__)
#if defined(__AMX_BF16__)
  using Bf16 = AmxBf16;
#else
  using Bf16 = DotBf16;
#endif
  if (args.problem.dtype == DType::bf16) return backward<Bf16>(args);
  avx512::attention_bwd_kernel(args);  // the same code: not compiled again
#else
  if (args.problem.dtype == DType::f64) return backward<Fma<double> >(args);
  backward<Fma<float> >(args);
#endif
}

}  // namespace ceg::CEG_ISA
