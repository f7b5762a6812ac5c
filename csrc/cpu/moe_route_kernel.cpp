#include <algorithm>
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

template <class C>
using Rank = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;

// Integers in the order of torch.sort: NaN above infinity, the zeros equal.
template <class C>
Vec<Rank<C>> rank_of(Vec<C> key) {
  const Vec<C> one_of_each =
      key == key ? key + C{0} : broadcast(std::numeric_limits<C>::quiet_NaN());
  const auto bits = reinterpret_cast<Vec<Rank<C>>>(one_of_each);
  constexpr int sign = 8 * sizeof(C) - 1;
  return bits ^ ((bits >> sign) & std::numeric_limits<Rank<C>>::max());
}

// The top k of as many tokens as a vector has lanes, one a lane: experts come one after the other
// and are sorted into lists of the best so far.
template <class C>
class Choice {
  static constexpr int kL = kLanes<C>;

 public:
  explicit Choice(int64_t top_k) : top_k_(top_k), best_(top_k * kL), expert_(top_k * kL) {}

  // ranks: [kL][width], width >= experts in whole vectors.
  void choose(const Rank<C>* ranks, int64_t width, int64_t experts) {
    for (int64_t k = 0; k < top_k_; ++k) {
      store(best_.data() + k * kL, broadcast(std::numeric_limits<Rank<C>>::min()));
    }
    for (int64_t first = 0; first < experts; first += kL) {
      Vec<Rank<C>> columns[kL];
      for (int t = 0; t < kL; ++t) columns[t] = load_rank(ranks + t * width + first);
      transpose(columns);
      const int64_t count = experts - first < kL ? experts - first : kL;
      for (int64_t e = 0; e < count; ++e) insert(columns[e], static_cast<Rank<C>>(first + e));
    }
  }

  // Of the token in `lane`.
  void take(int lane, int32_t* ids) {
    for (int64_t k = 0; k < top_k_; ++k) {
      ids[k] = static_cast<int32_t>(expert_.data()[k * kL + lane]);
    }
  }

 private:
  static Vec<Rank<C>> load_rank(const Rank<C>* p) {
    Vec<Rank<C>> v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }

  // Behind its equals, which have lower indices; whom it overtakes moves down by one.
  void insert(Vec<Rank<C>> rank, Rank<C> number) {
    Vec<Rank<C>> expert = broadcast(number), overtaken = {};
    for (int64_t k = 0; k < top_k_; ++k) {
      Rank<C>* const best = best_.data() + k * kL;
      Rank<C>* const its_expert = expert_.data() + k * kL;
      const Vec<Rank<C>> other = load_rank(best), other_expert = load_rank(its_expert);
      overtaken |= rank > other;
      store(best, overtaken ? rank : other);
      store(its_expert, overtaken ? expert : other_expert);
      rank = overtaken ? other : rank;
      expert = overtaken ? other_expert : expert;
    }
  }

  int64_t top_k_;
  Scratch<Rank<C>> best_, expert_;
};

template <class C>
struct Row {  // of all experts, in whole vectors
  C *logits, *scores;
  Rank<C>* ranks;
};

template <class C>
class RowBuffers {
 public:
  RowBuffers(int64_t rows, int64_t experts)
      : width_((experts + kLanes<C> - 1) / kLanes<C> * kLanes<C>),
        logits_(rows * width_),
        scores_(rows * width_),
        ranks_(rows * width_) {
    for (int64_t i = 0; i < rows * width_; ++i) ranks_.data()[i] = 0;  // rows past the last token
  }
  int64_t width() const { return width_; }
  Row<C> row(int64_t r) {
    return {logits_.data() + r * width_, scores_.data() + r * width_, ranks_.data() + r * width_};
  }

 private:
  int64_t width_;
  Scratch<C> logits_, scores_;
  Scratch<Rank<C>> ranks_;
};

template <class S, class C>
void load_row(const S* from, C* to, int64_t n) {
  for_each_vec<C>(n, [&](int64_t i, int64_t lanes) { store(to + i, load_n<C>(from + i, lanes)); });
  for (int64_t i = n; i % kLanes<C>; ++i) to[i] = -kInfinity<C>;
}

template <class C>
void fill_ranks(const Row<C>& row, const C* bias, int64_t experts) {
  for_each_vec<C>(experts, [&](int64_t i, int64_t n) {
    Vec<C> key = load<C>(row.logits + i);
    if (bias) key = load<C>(row.scores + i) + load_n<C>(bias + i, n);
    store(row.ranks + i, rank_of<C>(key));
  });
}

// Scores of the chosen experts in type W. With renormalisation softmax needs only their own maximum
// and sum.
template <class C, class W>
void weigh(const Row<C>& row, const int32_t* ids, W* weights, int64_t top_k, Score score,
           bool renormalize) {
  const C* logits = row.logits;
  W highest = logits[ids[0]], sum = 0;
  for (int64_t k = 1; k < top_k; ++k) highest = logits[ids[k]] > highest ? logits[ids[k]] : highest;
  for (int64_t k = 0; k < top_k; ++k) {
    const W logit = logits[ids[k]];
    weights[k] = score == Score::sigmoid ? sigmoid<W>(broadcast(logit))[0]
                 : renormalize           ? exp(broadcast(logit - highest))[0]
                                         : row.scores[ids[k]];
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
    constexpr int kL = kLanes<C>;
    RowBuffers<C> rows(kL, experts);
    Choice<C> choice(top_k);
    Scratch<int32_t> counts(experts);
    for (int64_t e = 0; e < experts; ++e) counts.data()[e] = 0;
#pragma omp for schedule(static) nowait
    for (int64_t first = 0; first < tokens; first += kL) {
      const int count = static_cast<int>(std::min<int64_t>(kL, tokens - first));
      for (int t = 0; t < count; ++t) {
        const Row<C> row = rows.row(t);
        load_row(a.logits.ptr<S>() + (first + t) * a.logits.stride[0], row.logits, experts);
        if (all_scores) score_row(row.logits, row.scores, experts, a.score);
        fill_ranks(row, bias, experts);
      }
      choice.choose(rows.row(0).ranks, rows.width(), experts);
      for (int t = 0; t < count; ++t) {
        int32_t* ids = a.expert_ids.ptr<int32_t>() + (first + t) * a.expert_ids.stride[0];
        C* weights = a.weights.ptr<C>() + (first + t) * a.weights.stride[0];
        choice.take(t, ids);
        weigh(rows.row(t), ids, weights, top_k, a.score, a.renormalize);
        for (int64_t k = 0; k < top_k; ++k) ++counts.data()[ids[k]];
      }
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
void route_row_backward(const MoeRouteBwdArgs& a, int64_t n, const Row<C>& row, double* weights,
                        C* dlogits) {
  const int64_t experts = a.logits.shape[1], top_k = a.dweights.shape[1];
  const C* dweights = a.dweights.ptr<C>() + n * a.dweights.stride[0];
  const int32_t* ids = a.expert_ids.ptr<int32_t>() + n * a.expert_ids.stride[0];
  const bool dense = a.score == Score::softmax && !a.renormalize;
  C* const scores = row.scores;

  // Weights and <dweights, weights>, as in the forward.
  load_row(a.logits.ptr<S>() + n * a.logits.stride[0], row.logits, experts);
  if (dense) score_row(row.logits, scores, experts, a.score);
  weigh(row, ids, weights, top_k, a.score, a.renormalize);
  double along = 0, sum = 1;
  for (int64_t k = 0; k < top_k; ++k) along += dweights[k] * weights[k];
  if (a.score == Score::sigmoid && a.renormalize) {
    sum = 0;  // of the chosen scores before renormalisation
    for (int64_t k = 0; k < top_k; ++k) {
      sum += sigmoid<double>(broadcast<double>(row.logits[ids[k]]))[0];
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
    RowBuffers<C> rows(1, a.logits.shape[1]);
    Scratch<C> dlogits(rows.width());
    Scratch<double> weights(a.dweights.shape[1]);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < a.logits.shape[0]; ++n) {
      route_row_backward<S>(a, n, rows.row(0), weights.data(), dlogits.data());
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
