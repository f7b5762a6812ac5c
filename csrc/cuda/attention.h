// Flash attention on a GPU: what the launcher tells the kernels.
//   B batch, H query heads, H_kv key/value heads (H % H_kv == 0), Tq, Tk lengths, D head_dim of q
//   and k, Dv head_dim of v. The formula is in ops/attention_reference.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "../tensor.h"
#include "attention_range.h"

namespace ceg::cuda {

// Item (sequence b, row t, head h) at data + b * batch + t * row + h * head, in items.
struct View {
  void* data;
  int64_t batch, row, head;
};

// A factor in more digits than a float has.
struct ToNatural {
  float high, low;
};

struct Attention {
  int batch, heads, kv_heads, head_dim, value_dim;
  int max_q, max_k;  // every sequence's length unless cu_seqlens are given
  const int32_t* cu_q;
  const int32_t* cu_k;  // (B + 1,), or null
  int left, right;      // kUnbounded where open; causal is folded into the right one
  float scale, softcap;
  // A score, which is q.k where plain() and a natural logit elsewhere, times to_log2 is the
  // exponent of a power of 2. From both to natural logits.
  float to_log2;
  ToNatural of_score, of_log2;
  const float* slopes;                // (B, H), or null
  int64_t slopes_batch, slopes_head;  // strides
  const float* sink;                  // (H,), or null
  int64_t sink_head;

  CEG_HOST_DEVICE int group() const { return heads / kv_heads; }
  // Nothing but the scale stands between q.k and the softmax, and the maximum commutes with it.
  bool plain() const { return scale > 0 && softcap == 0 && !slopes; }
};

struct AttentionFwd {
  Attention problem;
  View q, k, v, out, lse;
  int q_rows, k_rows;  // of all sequences where they are packed, else of one
  Schedule schedule;
};

struct AttentionBwd {
  Attention problem;
  View dout, q, k, v, out, lse, dlse, delta, dq, dk, dv;
  float* dsink;        // (H,), dense, or null
  int q_rows, k_rows;  // of all sequences where they are packed, else of one
  Schedule of_keys, of_queries;
  // For one pass: tiles of 64 queries and 64 columns, (splits, tiles of queries, H, columns / 64),
  // and how the keys of a head are split.
  float* sums;
  Schedule of_splits;  // its tiles are splits

  // Tiles of queries; each packed sequence has its own.
  CEG_HOST_DEVICE int64_t query_tiles() const {
    return problem.cu_q ? int64_t{q_rows} / 64 + problem.batch
                        : int64_t{problem.batch} * ((q_rows + 63) / 64);
  }
  // Of query 0 and head 0 of a sequence whose first row is first_q.
  CEG_HOST_DEVICE float* sums_of(int split, int b, int first_q, int width) const {
    const int64_t tile = problem.cu_q ? first_q / 64 + b : int64_t{b} * ((q_rows + 63) / 64);
    return sums + (split * query_tiles() + tile) * problem.heads * 64 * width;
  }
};

// For sm_90 alone (attention_sm90_*.cu). The first two are why it cannot run these on the current
// device, or "".
std::string attention_sm90_why_not(const AttentionFwd& args);
std::string attention_sm90_why_not(const AttentionBwd& args);
void attention_sm90_fwd(const AttentionFwd& args, DType dtype, uintptr_t stream);
void attention_sm90_dkdv(const AttentionBwd& args, DType dtype, uintptr_t stream);
void attention_sm90_dq(const AttentionBwd& args, DType dtype, uintptr_t stream);
// All of it with the pairs visited once, given `sums` with this many rows of 64 floats; 0 where it
// takes two passes, and why, or "" (attention_sm90_bwd.cu).
int64_t attention_sm90_bwd_rows(const AttentionBwd& args);
std::string attention_sm90_one_pass_why_not(const AttentionBwd& args);
void attention_sm90_bwd(const AttentionBwd& args, DType dtype, uintptr_t stream);
// For the few queries of decoding, on every GPU (attention_decode.cu; the rule is is_decoding() of
// attention_split.h), given `parts` with this many rows of Dv + 2 floats on the current device.
int64_t attention_decode_rows(const AttentionFwd& args);
void attention_decode(const AttentionFwd& args, float* parts, DType dtype, uintptr_t stream);
// Kernels for sm_80 and everything after it (attention_sm80_*.cu). Items are bf16 or fp16.
void attention_sm80_fwd(const AttentionFwd& args, DType dtype, uintptr_t stream);
void attention_sm80_dkdv(const AttentionBwd& args, DType dtype, uintptr_t stream);
void attention_sm80_dq(const AttentionBwd& args, DType dtype, uintptr_t stream);
// delta = rowsum(dout * out) - dlse, and with it dsink (attention_bwd_rows.cu).
void attention_delta(const AttentionBwd& args, DType dtype, uintptr_t stream);
void attention_dsink(const AttentionBwd& args, uintptr_t stream);

void attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                   const std::optional<Tensor>& cu_seqlens_q,
                   const std::optional<Tensor>& cu_seqlens_k, int64_t max_seqlen_q,
                   int64_t max_seqlen_k, const std::optional<Tensor>& alibi_slopes,
                   const std::optional<Tensor>& sink, const Tensor& out, const Tensor& lse,
                   const Tensor& parts, double softmax_scale, bool causal, int64_t window_left,
                   int64_t window_right, double softcap, uintptr_t stream);

// Rows of `parts`, of Dv + 2 floats.
int64_t attention_fwd_rows(const Tensor& q, const Tensor& k, const Tensor& v,
                           const std::optional<Tensor>& cu_seqlens_q,
                           const std::optional<Tensor>& cu_seqlens_k, int64_t max_seqlen_q,
                           int64_t max_seqlen_k, int64_t window_left);

// Why the forward of these does not run the kernel for sm_90 on their GPU, or "".
std::string attention_fwd_sm90_why_not(const Tensor& q, const Tensor& k, const Tensor& v,
                                       const std::optional<Tensor>& cu_seqlens_q,
                                       const std::optional<Tensor>& cu_seqlens_k,
                                       int64_t max_seqlen_q, int64_t max_seqlen_k);

// The same of the backward.
std::string attention_bwd_sm90_why_not(const Tensor& dout, const Tensor& q, const Tensor& k,
                                       const Tensor& v, const std::optional<Tensor>& cu_seqlens_q,
                                       const std::optional<Tensor>& cu_seqlens_k,
                                       int64_t max_seqlen_q, int64_t max_seqlen_k);

// The same of visiting each pair once, and the rows of 64 floats that it needs: 0 where not.
std::string attention_bwd_one_pass_why_not(const Tensor& dout, const Tensor& q, const Tensor& k,
                                           const Tensor& v,
                                           const std::optional<Tensor>& cu_seqlens_q,
                                           const std::optional<Tensor>& cu_seqlens_k,
                                           int64_t max_seqlen_q, int64_t max_seqlen_k);
int64_t attention_bwd_rows(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                           const std::optional<Tensor>& cu_seqlens_q,
                           const std::optional<Tensor>& cu_seqlens_k, int64_t max_seqlen_q,
                           int64_t max_seqlen_k);

// Written and read on the way: delta, a float for each of lse's, and sums, (attention_bwd_rows, 64)
// for one pass or (0, 64) for two.
void attention_bwd(const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q,
                   const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                   const std::optional<Tensor>& cu_seqlens_q,
                   const std::optional<Tensor>& cu_seqlens_k, int64_t max_seqlen_q,
                   int64_t max_seqlen_k, const std::optional<Tensor>& alibi_slopes,
                   const std::optional<Tensor>& sink, const Tensor& dq, const Tensor& dk,
                   const Tensor& dv, const std::optional<Tensor>& dsink, const Tensor& delta,
                   const Tensor& sums, double softmax_scale, bool causal, int64_t window_left,
                   int64_t window_right, double softcap, uintptr_t stream);

}  // namespace ceg::cuda
