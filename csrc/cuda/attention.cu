// Launchers of attention on a GPU: check the arguments, say what the kernels need, run them.
#include "attention.h"

#include <cmath>

#include "../check.h"
#include "launch.h"

namespace ceg::cuda {
namespace {

using Optional = std::optional<Tensor>;

// What both directions take.
struct Inputs {
  const Tensor &q, &k, &v;
  const Optional &cu_seqlens_q, &cu_seqlens_k;
  int64_t max_seqlen_q, max_seqlen_k;
  const Optional &alibi_slopes, &sink;
  double softmax_scale;
  bool causal;
  int64_t window_left, window_right;
  double softcap;

  bool varlen() const { return cu_seqlens_q.has_value(); }
};

// (B, T, H, D), or (total, H, D) without the batch.
View view_of(const Tensor& t, bool varlen) {
  if (varlen) return {t.data, 0, t.stride[0], t.stride[1]};
  return {t.data, t.stride[0], t.stride[1], t.stride[2]};
}

// (B, H, T), or (H, total).
View row_view_of(const Tensor& t, bool varlen) {
  if (varlen) return {t.data, 0, t.stride[1], t.stride[0]};
  return {t.data, t.stride[0], t.stride[2], t.stride[1]};
}

Attention problem_of(const Inputs& in) {
  const int axis = in.varlen() ? 1 : 2;  // of heads
  Attention p = {};
  p.batch = static_cast<int>(in.varlen() ? in.cu_seqlens_q->shape[0] - 1 : in.q.shape[0]);
  p.heads = static_cast<int>(in.q.shape[axis]);
  p.kv_heads = static_cast<int>(in.k.shape[axis]);
  p.head_dim = static_cast<int>(in.q.shape[axis + 1]);
  p.value_dim = static_cast<int>(in.v.shape[axis + 1]);
  p.max_q = static_cast<int>(in.varlen() ? in.max_seqlen_q : in.q.shape[1]);
  p.max_k = static_cast<int>(in.varlen() ? in.max_seqlen_k : in.k.shape[1]);
  if (in.varlen()) {
    p.cu_q = in.cu_seqlens_q->ptr<const int32_t>();
    p.cu_k = in.cu_seqlens_k->ptr<const int32_t>();
  }
  const auto bound = [](int64_t w) {
    return static_cast<int>(w < 0 || w > kUnbounded ? kUnbounded : w);
  };
  p.left = bound(in.window_left);
  p.right = in.causal ? 0 : bound(in.window_right);
  p.scale = static_cast<float>(in.softmax_scale);
  p.softcap = static_cast<float>(in.softcap);
  if (in.alibi_slopes) {
    p.slopes = in.alibi_slopes->ptr<const float>();
    p.slopes_batch = in.alibi_slopes->ndim == 2 ? in.alibi_slopes->stride[0] : 0;
  }
  if (in.sink) p.sink = in.sink->ptr<const float>();

  const auto split = [](double factor) {
    const float high = static_cast<float>(factor);
    return ToNatural{high, static_cast<float>(factor - high)};
  };
  const double scale = p.plain() ? in.softmax_scale : 1.0;
  p.to_log2 = static_cast<float>(scale * 1.4426950408889634);
  p.of_score = split(scale);
  p.of_log2 = split(scale / p.to_log2);
  return p;
}

// Of queries, and of keys with the queries of their group.
Schedule schedule_of(const Attention& p, bool of_queries) {
  const int64_t row = 2 * (p.head_dim + p.value_dim);  // bytes of a position
  if (!of_queries) {
    const int heads = p.batch * p.kv_heads;
    return {0, heads, section_of(heads, row * p.max_q * p.group())};
  }
  const int kv_heads = p.batch * p.kv_heads;
  return {0, kv_heads * p.group(), section_of(kv_heads, row * p.max_k) * p.group()};
}

}  // namespace

void attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& cu_seqlens_q,
                   const Optional& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                   const Optional& alibi_slopes, const Optional& sink, const Tensor& out,
                   const Tensor& lse, double softmax_scale, bool causal, int64_t window_left,
                   int64_t window_right, double softcap, uintptr_t stream) {
  const Inputs in = {q,
                     k,
                     v,
                     cu_seqlens_q,
                     cu_seqlens_k,
                     max_seqlen_q,
                     max_seqlen_k,
                     alibi_slopes,
                     sink,
                     softmax_scale,
                     causal,
                     window_left,
                     window_right,
                     softcap};
  AttentionFwd args = {};
  args.problem = problem_of(in);
  args.q = view_of(q, in.varlen());
  args.k = view_of(k, in.varlen());
  args.v = view_of(v, in.varlen());
  args.out = view_of(out, in.varlen());
  args.lse = row_view_of(lse, in.varlen());
  args.schedule = schedule_of(args.problem, true);
  attention_sm80_fwd(args, q.dtype, stream);
}

}  // namespace ceg::cuda
