// Flash attention on the CPU: problem description shared by launchers and kernels.
//   B batch, H query heads, Hk key/value heads (H % Hk == 0), Tq, Tk lengths, D head_dim of q and
//   k, Dv head_dim of v.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>

#include "../tensor.h"

namespace ceg {

// Element (sequence b, row t, head h) at data + b * batch + t * row + h * head, in items.
struct AttentionView {
  void* data = nullptr;
  int64_t batch = 0;
  int64_t row = 0;
  int64_t head = 0;
};

struct AttentionProblem {
  DType dtype;
  int64_t batch, heads, kv_heads, head_dim, value_dim;
  int64_t max_q, max_k;           // every sequence's length unless cu_seqlens are given
  const int32_t* cu_q = nullptr;  // (B + 1,)
  const int32_t* cu_k = nullptr;
  double scale, softcap;
  int64_t window_left, window_right;  // kUnbounded where open; causal is folded into the right one
  AttentionView alibi;                // compute type, no rows; null data: none
  AttentionView sink;

  static constexpr int64_t kUnbounded = int64_t{1} << 40;  // sums with positions cannot overflow

  int64_t group() const { return heads / kv_heads; }
  // Decoding: keys are not packed, and long ones are cut into chunks. From the shape alone, because
  // sums are taken in another order.
  bool few_rows() const { return max_q * group() <= 48; }
  int64_t q_begin(int64_t b) const { return cu_q ? cu_q[b] : 0; }
  int64_t k_begin(int64_t b) const { return cu_k ? cu_k[b] : 0; }
  int64_t q_len(int64_t b) const { return cu_q ? cu_q[b + 1] - cu_q[b] : max_q; }
  int64_t k_len(int64_t b) const { return cu_k ? cu_k[b + 1] - cu_k[b] : max_k; }
};

// Rows [first, first + count) of sequence `batch`, for every kv head. Of keys, those that the band
// and [key_begin, key_end) have in common.
struct AttentionTask {
  int64_t batch, first, count;
  int64_t key_begin = 0, key_end = AttentionProblem::kUnbounded;
  bool sink = true;  // the sink counts here, as in one chunk of a sequence it must
};

struct AttentionFwdArgs {
  AttentionProblem problem;
  AttentionView q, k, v, out, lse;
  const AttentionTask* tasks;  // of queries, longest first
  int64_t num_tasks;
  int64_t task_rows;  // no task has more queries * heads of a group than this
  // Above 1, task b * chunks + c takes chunk c of the keys that sequence b sees and leaves a
  // partial result, and the partial results of a sequence are put together in the order of its
  // chunks.
  int64_t chunks = 1;
  int threads;
  std::atomic<int64_t>* executed;  // gets the FLOPs of the products, padding included
};

struct AttentionBwdArgs {
  AttentionProblem problem;
  AttentionView dout, dlse, q, k, v, out, lse, dq, dk, dv, delta;
  void* dsink;  // (H,) contiguous in the compute type, or null
  const AttentionTask* query_tasks;
  int64_t num_query_tasks;
  int64_t task_rows;
  const AttentionTask* key_tasks;
  int64_t num_key_tasks;
  int threads;
  std::atomic<int64_t>* executed;  // as of the forward
};

// Keys of one block (the AMX forward takes two at once). Fixed for all thread counts: it decides
// the order of the sums.
inline constexpr int64_t kAttentionBlockKeys = 128;

// Both return the FLOPs of the products that they executed.
int64_t attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                      const std::optional<Tensor>& cu_seqlens_q,
                      const std::optional<Tensor>& cu_seqlens_k, int64_t max_seqlen_q,
                      int64_t max_seqlen_k, const std::optional<Tensor>& alibi_slopes,
                      const std::optional<Tensor>& sink, const Tensor& out, const Tensor& lse,
                      double softmax_scale, bool causal, int64_t window_left, int64_t window_right,
                      double softcap, int threads, const std::string& isa);

int64_t attention_bwd(const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q,
                      const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                      const std::optional<Tensor>& cu_seqlens_q,
                      const std::optional<Tensor>& cu_seqlens_k, int64_t max_seqlen_q,
                      int64_t max_seqlen_k, const std::optional<Tensor>& alibi_slopes,
                      const std::optional<Tensor>& sink, const Tensor& dq, const Tensor& dk,
                      const Tensor& dv, const std::optional<Tensor>& dsink, double softmax_scale,
                      bool causal, int64_t window_left, int64_t window_right, double softcap,
                      int threads, const std::string& isa);

}  // namespace ceg
