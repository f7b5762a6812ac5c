// Mixture of experts: routing, the order of tokens by expert, and the copies in and out.
//
// N tokens, E experts, K choices per token, D model width, R = N * K rows of the buffer that is
// sorted by expert. slots (N, K): the row of a choice, -1 if it was dropped. sources (R,): the
// choice n * K + k in a row, -1 if the row is empty. Indices that point nowhere count as -1.
#pragma once

#include <optional>
#include <string>

#include "../tensor.h"

namespace ceg::cuda {

// Of moe_route: a warp's keys, of moe_index: a warp's counts, must fit 48 KiB of shared memory.
constexpr int kMostExperts = 4096;

// The K experts with the highest score + bias (without bias: the highest logits), highest first,
// the lower index at a tie; weights are their scores, divided by their sum if `renormalize`.
void moe_route(const Tensor& logits, const std::optional<Tensor>& bias, const Tensor& weights,
               const Tensor& expert_ids, const Tensor& tokens_per_expert, const std::string& score,
               bool renormalize, uintptr_t stream);

void moe_route_bwd(const Tensor& dweights, const Tensor& logits, const Tensor& expert_ids,
                   const Tensor& dlogits, const std::string& score, bool renormalize,
                   uintptr_t stream);

// Stable order by (expert, token, choice); at most `capacity` choices per expert, -1 for any
// number. offsets (E + 1,) are the first rows of the experts. counts: (moe_index_rows(expert_ids),
// E) int32, whose contents are left undefined.
void moe_index(const Tensor& expert_ids, const Tensor& slots, const Tensor& sources,
               const Tensor& offsets, const Tensor& counts, int64_t capacity, uintptr_t stream);

int64_t moe_index_rows(const Tensor& expert_ids);

// out[r] = x[sources[r] / top_k], zeros in empty rows.
void moe_dispatch(const Tensor& x, const Tensor& sources, int64_t top_k, const Tensor& out,
                  uintptr_t stream);

// out[n] = sum over k of weights[n, k] * y[slots[n, k]], in this order, dropped choices left out.
void moe_combine(const Tensor& y, const Tensor& slots, const std::optional<Tensor>& weights,
                 const Tensor& out, uintptr_t stream);

void moe_combine_bwd(const Tensor& dout, const Tensor& y, const Tensor& sources,
                     const Tensor& slots, const Tensor& weights, const Tensor& dy,
                     const Tensor& dweights, uintptr_t stream);

}  // namespace ceg::cuda
