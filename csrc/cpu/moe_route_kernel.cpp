#include <limits>

#include "moe.h"
#include "rows.h"
#include "vec_math.h"

namespace ceg::CEG_ISA {
namespace {

template <class C>
constexpr C kInfinity = std::numeric_limits<C>::infinity();

template <class C>
inline Vec<C> sigmoid(Vec<C> x) {
  return C{1} / (C{1} + exp(-x));
}

template <class C>
C row_max(const C* row, int64_t n) {
  Vec<C> best = broadcast(-kInfinity<C>);
  for (int64_t i = 0; i < n; i += kLanes<C>) best = max(best, load<C>(row + i));
  return reduce_max(best);
}

// scores = softmax or sigmoid of the logits. Both rows are padded to whole vectors, the logits
// with -inf.
template <class C>
void score_row(const C* logits, C* scores, int64_t experts, Score score) {
  if (score == Score::sigmoid) {
    for (int64_t i = 0; i < experts; i += kLanes<C>)
      store(scores + i, sigmoid<C>(load<C>(logits + i)));
    return;
  }
  const C highest = row_max(logits, experts);
  Vec<C> sum = {};
  for (int64_t i = 0; i < experts; i += kLanes<C>) {
    const Vec<C> e = exp(load<C>(logits + i) - highest);
    store(scores + i, e);
    sum += e;
  }
  const C total = reduce_add(sum);
  for (int64_t i = 0; i < experts; i += kLanes<C>) store(scores + i, load<C>(scores + i) / total);
}

// Index of the largest key that is not -inf, the lowest of equal ones; -1 if there is none.
template <class C>
int64_t argmax(const C* keys, int64_t n) {
  using I = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;
  Vec<C> best = broadcast(-kInfinity<C>);
  Vec<I> block = broadcast(I{-1});
  for (int64_t i = 0; i < n; i += kLanes<C>) {
    const Vec<C> v = load<C>(keys + i);
    block = v > best ? broadcast(static_cast<I>(i)) : block;
    best = v > best ? v : best;
  }
  const C highest = reduce_max(best);
  if (highest == -kInfinity<C>) return -1;
  int64_t index = n;
  for (int lane = 0; lane < kLanes<C>; ++lane) {
    const int64_t candidate = block[lane] + lane;
    if (best[lane] == highest && candidate < index) index = candidate;
  }
  return index;
}

// Takes the top k of the keys, which it destroys.
template <class C>
void choose(C* keys, int64_t experts, int32_t* ids, int64_t top_k) {
  for (int64_t k = 0; k < top_k; ++k) {
    int64_t best = argmax(keys, experts);
    if (best < 0) {
      // Only experts at -inf are left: the lowest that has not been taken.
      const auto taken = [&](int64_t e) {
        for (int64_t j = 0; j < k; ++j) {
          if (ids[j] == e) return true;
        }
        return false;
      };
      for (best = 0; taken(best);) ++best;
    }
    ids[k] = static_cast<int32_t>(best);
    keys[best] = -kInfinity<C>;
  }
}

template <class C>
struct RowBuffers {
  explicit RowBuffers(int64_t experts)
      : logits(experts + kLanes<C>), scores(experts + kLanes<C>), keys(experts + kLanes<C>) {}
  Scratch<C> logits, scores, keys;
};

template <class S, class C>
void load_row(const S* from, C* to, int64_t n) {
  for_each_vec<C>(n, [&](int64_t i, int64_t lanes) { store(to + i, load_n<C>(from + i, lanes)); });
  for (int64_t i = n; i % kLanes<C>; ++i) to[i] = -kInfinity<C>;
}

template <class C>
void fill_keys(RowBuffers<C>& row, const C* bias, int64_t experts) {
  C* keys = row.keys.data();
  for_each_vec<C>(experts, [&](int64_t i, int64_t n) {
    Vec<C> key = load<C>(row.logits.data() + i);
    if (bias) key = load<C>(row.scores.data() + i) + load_n<C>(bias + i, n);
    // NaN sorts first, as in torch.
    store(keys + i, key == key ? key : broadcast(kInfinity<C>));
  });
  for (int64_t i = experts; i % kLanes<C>; ++i) keys[i] = -kInfinity<C>;
}

// Scores of the chosen experts in type W. With renormalisation softmax needs only their own maximum
// and sum.
template <class C, class W>
void weigh(RowBuffers<C>& row, const int32_t* ids, W* weights, int64_t top_k, Score score,
           bool renormalize) {
  const C* logits = row.logits.data();
  W highest = logits[ids[0]], sum = 0;
  for (int64_t k = 1; k < top_k; ++k) highest = logits[ids[k]] > highest ? logits[ids[k]] : highest;
  for (int64_t k = 0; k < top_k; ++k) {
    const W logit = logits[ids[k]];
    weights[k] = score == Score::sigmoid ? sigmoid<W>(broadcast(logit))[0]
                 : renormalize           ? exp(broadcast(logit - highest))[0]
                                         : row.scores.data()[ids[k]];
    sum += weights[k];
  }
  if (!renormalize) return;
  for (int64_t k = 0; k < top_k; ++k) weights[k] /= sum;
}

template <class S>
void route(const MoeRouteArgs& a) {
  using C = ComputeOf<S>;
  const int64_t tokens = a.logits.shape[0], experts = a.logits.shape[1];
  const int64_t top_k = a.weights.shape[1];
  const C* bias = a.bias ? a.bias->ptr<C>() : nullptr;
  const bool all_scores = bias || (a.score == Score::softmax && !a.renormalize);
  int32_t* totals = a.tokens_per_expert.ptr<int32_t>();
  for (int64_t e = 0; e < experts; ++e) totals[e] = 0;

#pragma omp parallel num_threads(a.threads)
  {
    const DenormalsOff guard;
    RowBuffers<C> row(experts);
    Scratch<int32_t> counts(experts);
    for (int64_t e = 0; e < experts; ++e) counts.data()[e] = 0;
#pragma omp for schedule(static) nowait
    for (int64_t n = 0; n < tokens; ++n) {
      int32_t* ids = a.expert_ids.ptr<int32_t>() + n * a.expert_ids.stride[0];
      load_row(a.logits.ptr<S>() + n * a.logits.stride[0], row.logits.data(), experts);
      if (all_scores) score_row(row.logits.data(), row.scores.data(), experts, a.score);
      fill_keys(row, bias, experts);
      choose(row.keys.data(), experts, ids, top_k);
      weigh(row, ids, a.weights.ptr<C>() + n * a.weights.stride[0], top_k, a.score, a.renormalize);
      for (int64_t k = 0; k < top_k; ++k) ++counts.data()[ids[k]];
    }
    // Integers: the order of the threads does not matter.
    for (int64_t e = 0; e < experts; ++e) {
#pragma omp atomic
      totals[e] += counts.data()[e];
    }
  }
}

// Gradient of one row. Only softmax without renormalisation reaches experts that were not chosen.
// The few values of the chosen experts are kept in double: their differences cancel.
template <class S, class C>
void route_row_backward(const MoeRouteBwdArgs& a, int64_t n, RowBuffers<C>& row, double* weights) {
  const int64_t experts = a.logits.shape[1], top_k = a.dweights.shape[1];
  const C* dweights = a.dweights.ptr<C>() + n * a.dweights.stride[0];
  const int32_t* ids = a.expert_ids.ptr<int32_t>() + n * a.expert_ids.stride[0];
  const bool dense = a.score == Score::softmax && !a.renormalize;
  C* scores = row.scores.data();
  C* dlogits = row.keys.data();

  // Weights and <dweights, weights>, as in the forward.
  load_row(a.logits.ptr<S>() + n * a.logits.stride[0], row.logits.data(), experts);
  if (dense) score_row(row.logits.data(), scores, experts, a.score);
  weigh(row, ids, weights, top_k, a.score, a.renormalize);
  double along = 0, sum = 1;
  for (int64_t k = 0; k < top_k; ++k) along += dweights[k] * weights[k];
  if (a.score == Score::sigmoid && a.renormalize) {
    sum = 0;  // of the chosen scores before renormalisation
    for (int64_t k = 0; k < top_k; ++k) {
      sum += sigmoid<double>(broadcast<double>(row.logits.data()[ids[k]]))[0];
    }
  }

  // d softmax = w * (dw - <dw, w>), over all experts or over the chosen ones.
  const C shared = static_cast<C>(-along);
  for_each_vec<C>(experts, [&](int64_t i, int64_t lanes) {
    store_n(dlogits + i, dense ? load<C>(scores + i) * shared : Vec<C>{}, lanes);
  });
  for (int64_t k = 0; k < top_k; ++k) {
    double d = dweights[k];
    if (a.score == Score::softmax || a.renormalize) d -= along;
    if (a.score == Score::softmax) {
      d *= weights[k];
    } else {
      const double s = weights[k] * sum;
      d = d / sum * s * (1 - s);
    }
    dlogits[ids[k]] = static_cast<C>(d);
  }

  S* out = a.dlogits.ptr<S>() + n * a.dlogits.stride[0];
  for_each_vec<C>(experts, [&](int64_t i, int64_t lanes) {
    store_n(out + i, load_n<C>(dlogits + i, lanes), lanes);
  });
}

template <class S>
void route_backward(const MoeRouteBwdArgs& a) {
  using C = ComputeOf<S>;
#pragma omp parallel num_threads(a.threads)
  {
    const DenormalsOff guard;
    RowBuffers<C> row(a.logits.shape[1]);
    Scratch<double> weights(a.dweights.shape[1]);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < a.logits.shape[0]; ++n) {
      route_row_backward<S>(a, n, row, weights.data());
    }
  }
}

}  // namespace

void moe_route_kernel(const MoeRouteArgs& a) {
  with_storage(a.logits.dtype, [&](auto s) { route<decltype(s)>(a); });
}

void moe_route_bwd_kernel(const MoeRouteBwdArgs& a) {
  with_storage(a.logits.dtype, [&](auto s) { route_backward<decltype(s)>(a); });
}

}  // namespace ceg::CEG_ISA
