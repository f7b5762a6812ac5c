#include "../check.h"
#include "isa.h"
#include "kernels.h"
#include "moe.h"

namespace ceg {
namespace {

Score parse_score(const std::string& score) {
  CEG_CHECK(score == "softmax" || score == "sigmoid", "score must be softmax or sigmoid, got ",
            score);
  return score == "softmax" ? Score::softmax : Score::sigmoid;
}

void check_logits(const Tensor& logits) {
  check_shape("logits", logits, {-1, -1});
  check_float("logits", logits);
  check_rows("logits", logits);
}

}  // namespace

void moe_route(const Tensor& logits, const std::optional<Tensor>& bias, const Tensor& weights,
               const Tensor& expert_ids, const Tensor& tokens_per_expert, const std::string& score,
               bool renormalize, int threads, const std::string& isa) {
  check_logits(logits);
  const int64_t tokens = logits.shape[0], experts = logits.shape[1];
  const DType compute = compute_type(logits.dtype);
  if (bias) {
    check_shape("bias", *bias, {experts});
    check_dtype("bias", *bias, {compute});
    check_rows("bias", *bias);
  }
  check_shape("weights", weights, {tokens, -1});
  check_dtype("weights", weights, {compute});
  check_output("weights", weights);
  const int64_t top_k = weights.shape[1];
  CEG_CHECK(top_k >= 1 && top_k <= experts, "top_k must be in [1, ", experts, "], got ", top_k);
  check_shape("expert_ids", expert_ids, {tokens, top_k});
  check_dtype("expert_ids", expert_ids, {DType::i32});
  check_output("expert_ids", expert_ids);
  check_shape("tokens_per_expert", tokens_per_expert, {experts});
  check_dtype("tokens_per_expert", tokens_per_expert, {DType::i32});
  check_output("tokens_per_expert", tokens_per_expert);
  kernels(isa).moe_route({.logits = logits,
                          .bias = bias,
                          .weights = weights,
                          .expert_ids = expert_ids,
                          .tokens_per_expert = tokens_per_expert,
                          .score = parse_score(score),
                          .renormalize = renormalize,
                          .threads = threads_for(logits, threads)});
}

void moe_route_bwd(const Tensor& dweights, const Tensor& logits, const Tensor& expert_ids,
                   const Tensor& dlogits, const std::string& score, bool renormalize, int threads,
                   const std::string& isa) {
  check_logits(logits);
  check_shape("dweights", dweights, {logits.shape[0], -1});
  check_dtype("dweights", dweights, {compute_type(logits.dtype)});
  check_rows("dweights", dweights);
  check_shape("expert_ids", expert_ids, {logits.shape[0], dweights.shape[1]});
  check_dtype("expert_ids", expert_ids, {DType::i32});
  check_rows("expert_ids", expert_ids);
  check_range("expert_ids", expert_ids, 0, logits.shape[1]);
  check_like("dlogits", dlogits, logits);
  check_output("dlogits", dlogits);
  kernels(isa).moe_route_bwd({.dweights = dweights,
                              .logits = logits,
                              .expert_ids = expert_ids,
                              .dlogits = dlogits,
                              .score = parse_score(score),
                              .renormalize = renormalize,
                              .threads = threads_for(logits, threads)});
}

}  // namespace ceg
