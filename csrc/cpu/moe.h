// Mixture of experts: routing, the order of tokens by expert, and the copies in and out.
//
// N tokens, E experts, K choices per token, D model width, R = N * K rows of the buffer that is
// sorted by expert. slots (N, K): the row of a choice, -1 if it was dropped. sources (R,): the
// choice n * K + k in a row, -1 if the row is empty.
#pragma once

#include <optional>
#include <string>

#include "../tensor.h"

namespace ceg {

enum class Score { softmax, sigmoid };

struct MoeRouteArgs {
  Tensor logits;               // (N, E)
  std::optional<Tensor> bias;  // (E,), for the choice only
  Tensor weights, expert_ids;  // (N, K)
  Tensor tokens_per_expert;    // (E,)
  Score score;
  bool renormalize;
  int threads;
};

struct MoeRouteBwdArgs {
  Tensor dweights;    // (N, K)
  Tensor logits;      // (N, E)
  Tensor expert_ids;  // (N, K)
  Tensor dlogits;     // (N, E)
  Score score;
  bool renormalize;
  int threads;
};

struct MoeDispatchArgs {
  Tensor x;        // (N, D)
  Tensor sources;  // (R,)
  int64_t top_k;
  Tensor out;  // (R, D)
  int threads;
};

struct MoeCombineArgs {
  Tensor y;                       // (R, D)
  Tensor slots;                   // (N, K)
  std::optional<Tensor> weights;  // (N, K)
  Tensor out;                     // (N, D)
  int threads;
};

struct MoeCombineBwdArgs {
  Tensor dout;            // (N, D)
  Tensor y;               // (R, D)
  Tensor sources;         // (R,)
  Tensor slots, weights;  // (N, K)
  Tensor dy;              // (R, D)
  Tensor dweights;        // (N, K)
  int threads;
};

// The K experts with the highest score + bias (without bias: the highest logits), highest first,
// the lower index at a tie; weights are their scores, divided by their sum if `renormalize`.
void moe_route(const Tensor& logits, const std::optional<Tensor>& bias, const Tensor& weights,
               const Tensor& expert_ids, const Tensor& tokens_per_expert, const std::string& score,
               bool renormalize, int threads, const std::string& isa);

void moe_route_bwd(const Tensor& dweights, const Tensor& logits, const Tensor& expert_ids,
                   const Tensor& dlogits, const std::string& score, bool renormalize, int threads,
                   const std::string& isa);

// Stable order by (expert, token, choice); at most `capacity` choices per expert, -1 for any
// number. offsets (E + 1,) are the first rows of the experts.
void moe_index(const Tensor& expert_ids, const Tensor& slots, const Tensor& sources,
               const Tensor& offsets, int64_t capacity, int threads, const std::string& isa);

// out[r] = x[sources[r] / top_k], zeros in empty rows.
void moe_dispatch(const Tensor& x, const Tensor& sources, int64_t top_k, const Tensor& out,
                  int threads, const std::string& isa);

// out[n] = sum over k of weights[n, k] * y[slots[n, k]], in this order, dropped choices left out.
void moe_combine(const Tensor& y, const Tensor& slots, const std::optional<Tensor>& weights,
                 const Tensor& out, int threads, const std::string& isa);

void moe_combine_bwd(const Tensor& dout, const Tensor& y, const Tensor& sources,
                     const Tensor& slots, const Tensor& weights, const Tensor& dy,
                     const Tensor& dweights, int threads, const std::string& isa);

}  // namespace ceg
