// Launchers of attention on a GPU: check the arguments, say what the kernels need, run them.
#include "attention.h"

#include "../attention_inputs.h"
#include "../check.h"
#include "attention_sm90_launch.h"
#include "attention_split.h"
#include "launch.h"

namespace ceg::cuda {
namespace {

using Optional = std::optional<Tensor>;

// Rows are read and written in pieces of 16 bytes.
void check_aligned(const char* name, const Tensor& t) {
  constexpr int kItems = 8, kBytes = 16;
  const int64_t width = t.shape[t.ndim - 1];
  CEG_CHECK(width % kItems == 0, name, " must have a head_dim divisible by ", kItems, ", got ",
            width);
  if (t.numel() == 0) return;
  for (int i = 0; i < t.ndim - 1; ++i) {
    CEG_CHECK(t.shape[i] <= 1 || t.stride[i] % kItems == 0, name,
              " must have strides divisible by ", kItems, ", got ", t.stride[i], " in dimension ",
              i);
  }
  CEG_CHECK(reinterpret_cast<uintptr_t>(t.data) % kBytes == 0, name,
            " must start at a multiple of ", kBytes, " bytes, got ", t.data);
}

void check(const AttentionInputs& in) {
  in.check(launch_device("q", in.q), {DType::bf16, DType::f16});
  check_aligned("q", in.q);
  check_aligned("k", in.k);
  check_aligned("v", in.v);
  for (const auto& [name, length] : {std::pair{"q", in.max_q()}, {"k", in.max_k()}}) {
    CEG_CHECK(length >= 0 && length <= kUnbounded, name, " must have at most ", kUnbounded,
              " positions a sequence, got ", length);
  }
  // Tiles reach beyond the last row.
  constexpr int64_t kMostRows = INT32_MAX - (1 << 16);
  for (const auto& [name, t] : {std::pair{"q", &in.q}, {"k", &in.k}}) {
    const int64_t rows = t->shape[in.head_axis() - 1];
    CEG_CHECK(rows <= kMostRows, name, " must have at most ", kMostRows, " rows, got ", rows);
  }
  const int64_t heads = in.batch() * in.heads();
  CEG_CHECK(heads <= INT32_MAX, "q must have at most 2^31 - 1 heads in all, got ", heads);
}

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

Attention problem_of(const AttentionInputs& in) {
  Attention p = {};
  p.batch = static_cast<int>(in.batch());
  p.heads = static_cast<int>(in.heads());
  p.kv_heads = static_cast<int>(in.kv_heads());
  p.head_dim = static_cast<int>(in.head_dim());
  p.value_dim = static_cast<int>(in.value_dim());
  p.max_q = static_cast<int>(in.max_q());
  p.max_k = static_cast<int>(in.max_k());
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
    const Tensor& t = *in.alibi_slopes;
    p.slopes = t.ptr<const float>();
    p.slopes_batch = t.ndim == 2 ? t.stride[0] : 0;
    p.slopes_head = t.stride[t.ndim - 1];
  }
  if (in.sink) {
    p.sink = in.sink->ptr<const float>();
    p.sink_head = in.sink->stride[0];
  }
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

// What the forward and the backward read.
template <class Args>
Args reading(const AttentionInputs& in) {
  Args args = {};
  args.problem = problem_of(in);
  args.q = view_of(in.q, in.varlen());
  args.k = view_of(in.k, in.varlen());
  args.v = view_of(in.v, in.varlen());
  args.q_rows = static_cast<int>(in.q.shape[in.head_axis() - 1]);
  args.k_rows = static_cast<int>(in.k.shape[in.head_axis() - 1]);
  return args;
}

AttentionFwd forward_of(const AttentionInputs& in) {
  AttentionFwd args = reading<AttentionFwd>(in);
  args.schedule = schedule_of(args.problem, true);
  return args;
}

AttentionBwd backward_of(const AttentionInputs& in, const Tensor& dout) {
  AttentionBwd args = reading<AttentionBwd>(in);
  args.dout = view_of(dout, in.varlen());
  args.of_keys = schedule_of(args.problem, false);
  args.of_queries = schedule_of(args.problem, true);
  return args;
}

bool is_decoding(const Attention& p) { return cuda::is_decoding(p.max_q, p.group()); }

int64_t decode_rows(const AttentionFwd& args) {
  return is_decoding(args.problem) ? attention_decode_rows(args) : 0;
}

// Floats that a launcher asked for, a row after the other.
float* workspace_of(const char* name, const Tensor& t, int64_t rows, int64_t columns,
                    const Device& where) {
  check_shape(name, t, {rows, columns});
  check_dtype(name, t, {DType::f32});
  if (rows == 0) return nullptr;
  check_output(name, t, where);
  CEG_CHECK(reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.stride[0] == columns, name,
            " must be dense from a multiple of 16 bytes on, got stride ", t.stride[0], " at ",
            t.data);
  return t.ptr<float>();
}

struct Named {
  const char* name;
  const TensorOfRows& rows;
};

std::string sm90_why_not(std::initializer_list<Named> mapped) {
#if !defined(CEG_HAS_SM90A) && !defined(CEG_CUDA_SIM)
  return "needs a build for sm_90a";
#endif
  const int capability = compute_capability();
  if (capability != 90) return "needs sm_90, got sm_" + std::to_string(capability);
  for (const auto& [name, rows] : mapped) {
    if (std::string why = tensor_map_why_not(name, rows); !why.empty()) return why;
  }
  return "";
}

// ask(args) of a backward, on its GPU.
template <class Ask>
auto of_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                 const Optional& cu_seqlens_q, const Optional& cu_seqlens_k, int64_t max_seqlen_q,
                 int64_t max_seqlen_k, Ask ask) {
  const Optional none;
  const AttentionInputs in = {q,    k,    v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                              none, none, 1, false,        -1,           -1,           0};
  check(in);
  in.check_out_like("dout", dout);
  check_aligned("dout", dout);
  const OnDevice guard(q.device);
  return ask(backward_of(in, dout));
}

}  // namespace

std::string attention_sm90_why_not(const AttentionFwd& args) {
  if (is_decoding(args.problem)) {
    return "needs more than " + std::to_string(kFewQueries) + " queries, got " +
           std::to_string(args.problem.max_q) + ": attention_decode_kernel takes them";
  }
  const MappedRows rows(args);
  return sm90_why_not({{"q", rows.q}, {"k", rows.k}, {"v", rows.v}});
}

std::string attention_sm90_why_not(const AttentionBwd& args) {
  const MappedRows rows(args);
  const TensorOfRows dout = rows_of_dout(args);
  return sm90_why_not({{"dout", dout}, {"q", rows.q}, {"k", rows.k}, {"v", rows.v}});
}

std::string attention_fwd_sm90_why_not(const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Optional& cu_seqlens_q, const Optional& cu_seqlens_k,
                                       int64_t max_seqlen_q, int64_t max_seqlen_k) {
  const Optional none;
  const AttentionInputs in = {q,    k,    v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                              none, none, 1, false,        -1,           -1,           0};
  check(in);
  const OnDevice guard(q.device);
  return attention_sm90_why_not(forward_of(in));
}

std::string attention_bwd_sm90_why_not(const Tensor& dout, const Tensor& q, const Tensor& k,
                                       const Tensor& v, const Optional& cu_seqlens_q,
                                       const Optional& cu_seqlens_k, int64_t max_seqlen_q,
                                       int64_t max_seqlen_k) {
  return of_backward(dout, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                     [](const AttentionBwd& args) { return attention_sm90_why_not(args); });
}

std::string attention_bwd_one_pass_why_not(const Tensor& dout, const Tensor& q, const Tensor& k,
                                           const Tensor& v, const Optional& cu_seqlens_q,
                                           const Optional& cu_seqlens_k, int64_t max_seqlen_q,
                                           int64_t max_seqlen_k) {
  return of_backward(dout, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                     attention_sm90_one_pass_why_not);
}

int64_t attention_bwd_rows(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                           const Optional& cu_seqlens_q, const Optional& cu_seqlens_k,
                           int64_t max_seqlen_q, int64_t max_seqlen_k) {
  return of_backward(dout, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                     attention_sm90_bwd_rows);
}

int64_t attention_fwd_rows(const Tensor& q, const Tensor& k, const Tensor& v,
                           const Optional& cu_seqlens_q, const Optional& cu_seqlens_k,
                           int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t window_left) {
  const Optional none;
  const AttentionInputs in = {q,    k,    v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                              none, none, 1, false,        window_left,  -1,           0};
  check(in);
  const OnDevice guard(q.device);
  return decode_rows(forward_of(in));
}

void attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& cu_seqlens_q,
                   const Optional& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                   const Optional& alibi_slopes, const Optional& sink, const Tensor& out,
                   const Tensor& lse, const Tensor& parts, double softmax_scale, bool causal,
                   int64_t window_left, int64_t window_right, double softcap, uintptr_t stream) {
  const AttentionInputs in = {q,
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
  check(in);
  in.check_out_like("out", out);
  check_output("out", out, q.device);
  check_aligned("out", out);
  in.check_row_stat("lse", lse);

  const OnDevice guard(q.device);
  AttentionFwd args = forward_of(in);
  args.out = view_of(out, in.varlen());
  args.lse = row_view_of(lse, in.varlen());
  if (is_decoding(args.problem)) {
    float* const at =
        workspace_of("parts", parts, decode_rows(args), args.problem.value_dim + 2, q.device);
    return attention_decode(args, at, q.dtype, stream);
  }
  const bool on_sm90 = attention_sm90_why_not(args).empty();
  (on_sm90 ? attention_sm90_fwd : attention_sm80_fwd)(args, q.dtype, stream);
}

void attention_bwd(const Tensor& dout, const Optional& dlse, const Tensor& q, const Tensor& k,
                   const Tensor& v, const Tensor& out, const Tensor& lse,
                   const Optional& cu_seqlens_q, const Optional& cu_seqlens_k, int64_t max_seqlen_q,
                   int64_t max_seqlen_k, const Optional& alibi_slopes, const Optional& sink,
                   const Tensor& dq, const Tensor& dk, const Tensor& dv, const Optional& dsink,
                   const Tensor& delta, const Tensor& sums, double softmax_scale, bool causal,
                   int64_t window_left, int64_t window_right, double softcap, uintptr_t stream) {
  const AttentionInputs in = {q,
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
  check(in);
  in.check_out_like("dout", dout);
  in.check_out_like("out", out);
  in.check_row_stat("lse", lse);
  in.check_row_stat("delta", delta);
  if (dlse) in.check_row_stat("dlse", *dlse);
  in.check_gradient("dq", dq, "q", q);
  in.check_gradient("dk", dk, "k", k);
  in.check_gradient("dv", dv, "v", v);
  for (const auto& [name, t] :
       {std::pair{"dout", &dout}, {"out", &out}, {"dq", &dq}, {"dk", &dk}, {"dv", &dv}}) {
    check_aligned(name, *t);
  }
  if (dsink) {
    CEG_CHECK(sink.has_value(), "dsink must be None without a sink, got a tensor");
    in.check_gradient("dsink", *dsink, "sink", *sink);
    CEG_CHECK(dsink->shape[0] <= 1 || dsink->stride[0] == 1, "dsink must be dense, got stride ",
              dsink->stride[0]);
  }

  const OnDevice guard(q.device);
  const bool varlen = in.varlen();
  AttentionBwd args = backward_of(in, dout);
  args.out = view_of(out, varlen);
  args.dq = view_of(dq, varlen);
  args.dk = view_of(dk, varlen);
  args.dv = view_of(dv, varlen);
  args.lse = row_view_of(lse, varlen);
  args.delta = row_view_of(delta, varlen);
  if (dlse) args.dlse = row_view_of(*dlse, varlen);
  const bool one_pass = sums.numel() > 0;
  if (one_pass) args.sums = workspace_of("sums", sums, attention_sm90_bwd_rows(args), 64, q.device);
  attention_delta(args, q.dtype, stream);
  if (dsink) {
    args.dsink = dsink->ptr<float>();
    attention_dsink(args, stream);
  }
  if (one_pass) return attention_sm90_bwd(args, q.dtype, stream);
  const bool on_sm90 = attention_sm90_why_not(args).empty();
  (on_sm90 ? attention_sm90_dkdv : attention_sm80_dkdv)(args, q.dtype, stream);
  (on_sm90 ? attention_sm90_dq : attention_sm80_dq)(args, q.dtype, stream);
}

}  // namespace ceg::cuda
