// Launchers of attention: check the arguments, cut the work into tasks, run the kernels.
#include "attention.h"

#include <algorithm>
#include <vector>

#include "../attention_inputs.h"
#include "../check.h"
#include "isa.h"
#include "kernels.h"

namespace ceg {
namespace {

// A query task packs each key block once (0.6 ns an item, 8% of the work of 384 rows at D = 64), so
// it takes as many rows as leave room in a thread's 1 MiB of scratch: the forward keeps q and out,
// the backward q, dout and up to half of dq beside one more layout of the keys.
constexpr int64_t kForwardRowBytes = int64_t{640} << 10;
constexpr int64_t kBackwardRowBytes = int64_t{352} << 10;

using Optional = std::optional<Tensor>;

void check_cu_seqlens(const char* name, const Tensor& cu, int64_t total, int64_t max_seqlen) {
  const int32_t* p = cu.ptr<const int32_t>();
  const int64_t n = cu.shape[0];
  CEG_CHECK(p[0] == 0, name, " must start with 0, got ", p[0]);
  for (int64_t b = 1; b < n; ++b) {
    CEG_CHECK(p[b] >= p[b - 1], name, " must not decrease, got ", p[b - 1], " then ", p[b],
              " at index ", b);
    CEG_CHECK(p[b] - p[b - 1] <= max_seqlen, name, " must hold sequences of at most max_seqlen ",
              max_seqlen, ", got ", p[b] - p[b - 1], " at index ", b - 1);
  }
  CEG_CHECK(p[n - 1] == total, name, " must end with the number of rows ", total, ", got ",
            p[n - 1]);
}

// (B, T, H, D), or (total, H, D) without the batch.
AttentionView view_of(const Tensor& t, bool varlen) {
  if (varlen) return {t.data, 0, t.stride[0], t.stride[1]};
  return {t.data, t.stride[0], t.stride[1], t.stride[2]};
}

// (B, H, T), or (H, total).
AttentionView row_view_of(const Tensor& t, bool varlen) {
  if (varlen) return {t.data, 0, t.stride[1], t.stride[0]};
  return {t.data, t.stride[0], t.stride[2], t.stride[1]};
}

AttentionProblem check_problem(const AttentionInputs& in) {
  in.check({}, {DType::f32, DType::bf16, DType::f16, DType::f64});
  if (in.varlen()) {
    check_cu_seqlens("cu_seqlens_q", *in.cu_seqlens_q, in.q.shape[0], in.max_seqlen_q);
    check_cu_seqlens("cu_seqlens_k", *in.cu_seqlens_k, in.k.shape[0], in.max_seqlen_k);
  }
  AttentionProblem p = {};
  p.dtype = in.q.dtype;
  p.batch = in.batch();
  p.heads = in.heads();
  p.kv_heads = in.kv_heads();
  p.head_dim = in.head_dim();
  p.value_dim = in.value_dim();
  p.max_q = in.max_q();
  p.max_k = in.max_k();
  if (in.varlen()) {
    p.cu_q = in.cu_seqlens_q->ptr<const int32_t>();
    p.cu_k = in.cu_seqlens_k->ptr<const int32_t>();
  }
  p.scale = in.softmax_scale;
  p.softcap = in.softcap;
  const auto bound = [](int64_t w) {
    return w < 0 || w > AttentionProblem::kUnbounded ? AttentionProblem::kUnbounded : w;
  };
  p.window_left = bound(in.window_left);
  p.window_right = in.causal ? 0 : bound(in.window_right);
  if (in.alibi_slopes) {
    const Tensor& t = *in.alibi_slopes;
    p.alibi = {t.data, t.ndim == 2 ? t.stride[0] : 0, 0, t.stride[t.ndim - 1]};
  }
  if (in.sink) p.sink = {in.sink->data, 0, 0, in.sink->stride[0]};
  return p;
}

// Pairs that row `i` of `rows` sees among `others`, for the band mirrored accordingly.
int64_t visible(int64_t i, int64_t shift, int64_t before, int64_t after, int64_t others) {
  const int64_t first = std::max<int64_t>(0, i + shift - before);
  const int64_t last = std::min(others, i + shift + after + 1);
  return std::max<int64_t>(0, last - first);
}

// Blocks of at most `block` rows of every sequence, most work first.
std::vector<AttentionTask> make_tasks(const AttentionProblem& p, bool of_queries, int64_t block) {
  std::vector<std::pair<int64_t, AttentionTask>> sized;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t rows = of_queries ? p.q_len(b) : p.k_len(b);
    const int64_t others = of_queries ? p.k_len(b) : p.q_len(b);
    const int64_t before = of_queries ? p.window_left : p.window_right;
    const int64_t after = of_queries ? p.window_right : p.window_left;
    for (int64_t first = 0; first < rows; first += block) {
      const int64_t count = std::min(block, rows - first);
      const int64_t middle = first + count / 2;
      const int64_t work = visible(middle, others - rows, before, after, others) * count;
      sized.push_back({work, {b, first, count}});
    }
  }
  std::stable_sort(sized.begin(), sized.end(),
                   [](const auto& a, const auto& b) { return a.first > b.first; });
  std::vector<AttentionTask> tasks;
  for (const auto& [work, task] : sized) tasks.push_back(task);
  return tasks;
}

// Queries per task: as many as pay for packing the keys, but enough tasks for all threads.
int64_t queries_per_task(const AttentionProblem& p, int threads, int64_t bytes) {
  // Engines pad a row to at most 32 items.
  const int64_t width = (p.head_dim + 31) / 32 * 32 + (p.value_dim + 31) / 32 * 32;
  const int64_t row_bytes = item_size(compute_type(p.dtype)) * width;
  int64_t queries = std::max<int64_t>(1, bytes / row_bytes / p.group());
  queries = std::min(queries, std::max<int64_t>(1, p.max_q));
  const int64_t least = std::max<int64_t>(1, 48 / p.group());
  const auto tasks = [&] { return p.batch * p.kv_heads * ((p.max_q + queries - 1) / queries); };
  while (threads > 1 && queries > least && tasks() < 8 * threads) queries = (queries + 1) / 2;
  return queries;
}

// How a forward with few queries (decoding) is cut along its keys, or one chunk where that does not
// pay. It follows from shapes and flags alone: the threads must not move a boundary, because each
// boundary rounds.
struct KeyChunks {
  int64_t count = 1, keys = 0;
};

KeyChunks key_chunks(const AttentionProblem& p) {
  // Below 512 keys a chunk's start and its share of the combination show (1 query, D = 64).
  constexpr int64_t kLeastKeys = 512;
  constexpr int64_t kEnoughTasks = 128;
  constexpr int64_t kPartialBytes = int64_t{512} << 10;
  const int64_t heads = p.batch * p.kv_heads;
  const int64_t rows = p.max_q * p.group();
  if (heads == 0 || rows == 0 || !p.few_rows()) return {};
  const int64_t span = std::min(p.max_k, p.window_left + p.window_right + p.max_q);
  // A state holds a row of whole vectors, its maximum and its sum.
  const int64_t state_bytes =
      rows * ((p.value_dim + 15) / 16 * 16 + 2) * item_size(compute_type(p.dtype));
  const int64_t count =
      std::min({(span + kLeastKeys - 1) / kLeastKeys, (kEnoughTasks + heads - 1) / heads,
                kPartialBytes / (heads * state_bytes)});
  if (count < 2) return {};
  // A window can begin anywhere in a block.
  const int64_t blocks = (span + kAttentionBlockKeys - 1) / kAttentionBlockKeys + 1;
  const int64_t keys = (blocks + count - 1) / count * kAttentionBlockKeys;
  return {(blocks * kAttentionBlockKeys + keys - 1) / keys, keys};
}

std::vector<AttentionTask> make_chunk_tasks(const AttentionProblem& p, KeyChunks chunks) {
  std::vector<AttentionTask> tasks;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t shift = p.k_len(b) - p.q_len(b);
    const int64_t seen = std::max<int64_t>(0, shift - p.window_left);
    const int64_t begin = seen / kAttentionBlockKeys * kAttentionBlockKeys;
    const int64_t keys = p.q_len(b) > 0 ? chunks.keys : 0;
    for (int64_t c = 0; c < chunks.count; ++c) {
      tasks.push_back({b, 0, p.q_len(b), begin + c * keys, begin + (c + 1) * keys, c == 0});
    }
  }
  return tasks;
}

}  // namespace

int64_t attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                      const Optional& cu_seqlens_q, const Optional& cu_seqlens_k,
                      int64_t max_seqlen_q, int64_t max_seqlen_k, const Optional& alibi_slopes,
                      const Optional& sink, const Tensor& out, const Tensor& lse,
                      double softmax_scale, bool causal, int64_t window_left, int64_t window_right,
                      double softcap, int threads, const std::string& isa) {
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
  AttentionFwdArgs args = {};
  args.problem = check_problem(in);
  in.check_out_like("out", out);
  check_output("out", out);
  in.check_row_stat("lse", lse);
  args.q = view_of(q, in.varlen());
  args.k = view_of(k, in.varlen());
  args.v = view_of(v, in.varlen());
  args.out = view_of(out, in.varlen());
  args.lse = row_view_of(lse, in.varlen());
  args.threads = thread_count(threads);
  const int64_t queries = queries_per_task(args.problem, args.threads, kForwardRowBytes);
  const KeyChunks chunks = key_chunks(args.problem);
  args.chunks = chunks.count;
  const std::vector<AttentionTask> tasks = chunks.count > 1
                                               ? make_chunk_tasks(args.problem, chunks)
                                               : make_tasks(args.problem, true, queries);
  args.tasks = tasks.data();
  args.num_tasks = static_cast<int64_t>(tasks.size());
  args.task_rows = queries * args.problem.group();
  std::atomic<int64_t> executed = 0;
  args.executed = &executed;
  kernels(isa).attention_fwd(args);
  return executed;
}

int64_t attention_bwd(const Tensor& dout, const Optional& dlse, const Tensor& q, const Tensor& k,
                      const Tensor& v, const Tensor& out, const Tensor& lse,
                      const Optional& cu_seqlens_q, const Optional& cu_seqlens_k,
                      int64_t max_seqlen_q, int64_t max_seqlen_k, const Optional& alibi_slopes,
                      const Optional& sink, const Tensor& dq, const Tensor& dk, const Tensor& dv,
                      const Optional& dsink, double softmax_scale, bool causal, int64_t window_left,
                      int64_t window_right, double softcap, int threads, const std::string& isa) {
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
  AttentionBwdArgs args = {};
  args.problem = check_problem(in);
  in.check_out_like("dout", dout);
  in.check_out_like("out", out);
  in.check_row_stat("lse", lse);
  if (dlse) in.check_row_stat("dlse", *dlse);
  in.check_gradient("dq", dq, "q", q);
  in.check_gradient("dk", dk, "k", k);
  in.check_gradient("dv", dv, "v", v);
  const DType compute = compute_type(q.dtype);
  if (dsink) {
    CEG_CHECK(sink.has_value(), "dsink must be None without a sink, got a tensor");
    check_dtype("dsink", *dsink, {compute});
    check_shape("dsink", *dsink, {args.problem.heads});
    check_output("dsink", *dsink);
    args.dsink = dsink->data;
  }
  const bool varlen = in.varlen();
  args.dout = view_of(dout, varlen);
  args.q = view_of(q, varlen);
  args.k = view_of(k, varlen);
  args.v = view_of(v, varlen);
  args.out = view_of(out, varlen);
  args.dq = view_of(dq, varlen);
  args.dk = view_of(dk, varlen);
  args.dv = view_of(dv, varlen);
  args.lse = row_view_of(lse, varlen);
  if (dlse) args.dlse = row_view_of(*dlse, varlen);
  args.threads = thread_count(threads);

  // One number a row, laid out (B, H, T) or (H, total).
  const int64_t rows = varlen ? q.shape[0] : q.shape[1];
  std::vector<char> delta(static_cast<size_t>(lse.numel() * item_size(compute)));
  args.delta = {delta.data(), varlen ? 0 : args.problem.heads * rows, 1, rows};

  const int64_t queries = queries_per_task(args.problem, args.threads, kBackwardRowBytes);
  const std::vector<AttentionTask> query_tasks = make_tasks(args.problem, true, queries);
  const std::vector<AttentionTask> key_tasks = make_tasks(args.problem, false, kAttentionBlockKeys);
  args.query_tasks = query_tasks.data();
  args.num_query_tasks = static_cast<int64_t>(query_tasks.size());
  args.task_rows = queries * args.problem.group();
  args.key_tasks = key_tasks.data();
  args.num_key_tasks = static_cast<int64_t>(key_tasks.size());
  std::atomic<int64_t> executed = 0;
  args.executed = &executed;
  kernels(isa).attention_bwd(args);
  return executed;
}

}  // namespace ceg
