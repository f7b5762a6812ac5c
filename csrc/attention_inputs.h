// The arguments that attention takes on every device, forward and backward, and their checks.
//   B batch, H query heads, H_kv key/value heads (H % H_kv == 0), Tq, Tk lengths, D head_dim of q
//   and k, Dv head_dim of v. q (B, Tq, H, D), or packed (total, H, D) with cu_seqlens (B + 1,).
#pragma once

#include <initializer_list>
#include <optional>

#include "tensor.h"

namespace ceg {

struct AttentionInputs {
  const Tensor &q, &k, &v;
  const std::optional<Tensor>&cu_seqlens_q, &cu_seqlens_k;
  int64_t max_seqlen_q, max_seqlen_k;
  const std::optional<Tensor>&alibi_slopes, &sink;
  double softmax_scale;
  bool causal;
  int64_t window_left, window_right;
  double softcap;

  static constexpr int64_t kMaxHeadDim = 256;

  bool varlen() const { return cu_seqlens_q.has_value(); }
  int head_axis() const { return varlen() ? 1 : 2; }
  int64_t batch() const { return varlen() ? cu_seqlens_q->shape[0] - 1 : q.shape[0]; }
  int64_t heads() const { return q.shape[head_axis()]; }
  int64_t kv_heads() const { return k.shape[head_axis()]; }
  int64_t head_dim() const { return q.shape[head_axis() + 1]; }
  int64_t value_dim() const { return v.shape[head_axis() + 1]; }
  int64_t max_q() const { return varlen() ? max_seqlen_q : q.shape[1]; }
  int64_t max_k() const { return varlen() ? max_seqlen_k : k.shape[1]; }

  // All of these but what stands in cu_seqlens, which only the CPU can read.
  void check(const Device& where, std::initializer_list<DType> dtypes) const;
  // `out`, `dout`: the shape of q with the head_dim of v.
  void check_out_like(const char* name, const Tensor& t) const;
  // `lse`, `dlse`: (B, H, Tq) or (H, total) in the compute type.
  void check_row_stat(const char* name, const Tensor& t) const;
  // `dq`, `dk`, `dv`, `dsink`: written, like the tensor that they are the gradient of.
  void check_gradient(const char* name, const Tensor& t, const char* of_name,
                      const Tensor& of) const;
};

}  // namespace ceg
