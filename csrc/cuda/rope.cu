#include "rope.h"

#include "../check.h"
#include "kernels.h"
#include "launch.h"
#include "vector.h"

namespace ceg::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kHeads = 4;  // of one thread: the angles are loaded once for them

template <class T>
struct Heads {
  const T* from;
  T* to;
  int64_t from_batch, from_token, from_head, to_batch, to_token, to_head;  // strides
  int heads;
};

template <class T>
struct Rotation {
  Heads<T> q, k;
  const float *cos, *sin;
  int64_t cos_stride, sin_stride, table_rows;
  const void* positions;  // null: the number of the token in its sequence
  int64_t positions_batch, positions_token;
  bool wide_positions;
  int64_t tokens;  // of all sequences
  int length;      // of one
  int half, rest;  // rotary_dim / 2; elements that are copied
  int lanes;       // threads a token; the rest of a block's threads are for other tokens
  float sign;      // of sin
};

template <class T>
__device__ __forceinline__ int64_t position(const Rotation<T>& a, int64_t b, int64_t t) {
  if (!a.positions) return t;
  const int64_t at = b * a.positions_batch + t * a.positions_token;
  return a.wide_positions ? static_cast<const int64_t*>(a.positions)[at]
                          : static_cast<const int*>(a.positions)[at];
}

template <int N>
__device__ __forceinline__ void load_angles(const float* from, float (&to)[N]) {
  constexpr int kPart = N < kVector<float> ? N : kVector<float>;
#pragma unroll
  for (int i = 0; i < N; i += kPart) {
    float part[kPart];
    load_constant<kPart>(from + i).unpack(part);
#pragma unroll
    for (int j = 0; j < kPart; ++j) to[i + j] = part[j];
  }
}

// N pairs lie in two vectors: first elements and second ones, or, interleaved, N / 2 pairs each.
template <bool kInterleaved, int N>
__device__ __forceinline__ void turn(float (&a)[N], float (&b)[N], const float (&cos)[N],
                                     const float (&sin)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    // The vector and place of the pair's two elements; N = 1 has one element in each vector.
    const int first = 2 * i, second = 2 * i + 1;
    float& x = !kInterleaved ? a[i] : first < N ? a[first % N] : b[first % N];
    float& y = !kInterleaved ? b[i] : second < N ? a[second % N] : b[second % N];
    const float turned = x * cos[i] - y * sin[i];
    y = y * cos[i] + x * sin[i];
    x = turned;
  }
}

// A block takes some tokens and kHeads heads of q or of k (blockIdx.y); a thread N pairs of them.
template <class T, int N, bool kInterleaved>
__global__ void __launch_bounds__(kThreads, resident(kThreads, 102))
    rope_kernel(const Rotation<T> a) {
  const int lane = threadIdx.x % a.lanes, tokens_each = kThreads / a.lanes;
  const int64_t token =
      static_cast<int64_t>(blockIdx.x) * tokens_each + static_cast<int>(threadIdx.x) / a.lanes;
  if (token >= a.tokens || static_cast<int>(threadIdx.x) >= tokens_each * a.lanes) return;
  const int64_t b = token / a.length, t = token - b * a.length;
  const int q_groups = (a.q.heads + kHeads - 1) / kHeads;
  const bool of_q = static_cast<int>(blockIdx.y) < q_groups;
  const Heads<T>& x = of_q ? a.q : a.k;
  const int first_head = (static_cast<int>(blockIdx.y) - (of_q ? 0 : q_groups)) * kHeads;
  const T* from = x.from + b * x.from_batch + t * x.from_token + first_head * x.from_head;
  T* to = x.to + b * x.to_batch + t * x.to_token + first_head * x.to_head;
  const int64_t row = position(a, b, t);
  const bool known = row >= 0 && row < a.table_rows;

  for (int o = lane * N; o < a.half; o += a.lanes * N) {
    // Load: the heads' vectors are under way before the first is turned.
    const int o_first = kInterleaved ? 2 * o : o, o_second = o_first + (kInterleaved ? N : a.half);
    Pack<T, N> first[kHeads], second[kHeads];
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      if (first_head + head >= x.heads) continue;
      first[head] = load_once<N>(from + head * x.from_head + o_first);
      second[head] = load_once<N>(from + head * x.from_head + o_second);
    }
    float cos[N], sin[N];
    if (known) {
      load_angles(a.cos + row * a.cos_stride + o, cos);
      load_angles(a.sin + row * a.sin_stride + o, sin);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      cos[i] = known ? cos[i] : __int_as_float(0x7fffffff);
      sin[i] = known ? sin[i] * a.sign : cos[i];
    }

    // Turn and write.
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      if (first_head + head >= x.heads) continue;
      float u[N], v[N];
      first[head].unpack(u);
      second[head].unpack(v);
      turn<kInterleaved>(u, v, cos, sin);
      store(to + head * x.to_head + o_first, u);
      store(to + head * x.to_head + o_second, v);
    }
  }

  // Copy what is not turned, unless it is there already.
  if (to == from) return;
  for (int o = 2 * a.half + lane * N; o < 2 * a.half + a.rest; o += a.lanes * N) {
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      if (first_head + head >= x.heads) continue;
      __stwb(reinterpret_cast<Access<T, N>*>(to + head * x.to_head + o),
             load_once<N>(from + head * x.from_head + o).raw);
    }
  }
}

template <class T>
Heads<T> heads_of(const std::optional<Tensor>& x, const std::optional<Tensor>& out) {
  if (!x) return {};
  return {.from = x->ptr<T>(),
          .to = out->ptr<T>(),
          .from_batch = x->stride[0],
          .from_token = x->stride[1],
          .from_head = x->stride[2],
          .to_batch = out->stride[0],
          .to_token = out->stride[1],
          .to_head = out->stride[2],
          .heads = static_cast<int>(x->shape[2])};
}

template <class T, int N>
void run(Rotation<T> a, bool interleaved, uintptr_t stream) {
  // A token's threads: as many as there are vectors of pairs, or of elements to copy.
  const int vectors = (a.half > a.rest ? a.half : a.rest) / N;
  a.lanes = vectors < 1 ? 1 : vectors < kThreads ? vectors : kThreads;
  const int64_t tokens_each = kThreads / a.lanes;
  const int64_t blocks = (a.tokens + tokens_each - 1) / tokens_each;
  const int groups = (a.q.heads + kHeads - 1) / kHeads + (a.k.heads + kHeads - 1) / kHeads;
  launch({.name = "rope_kernel",
          .grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(groups)),
          .block = kThreads,
          .stream = stream},
         interleaved ? rope_kernel<T, N, true> : rope_kernel<T, N, false>, a);
}

// In vectors, both parts of a head and every row of the tables must start at one.
template <class T>
bool in_vectors(const Tensor& q, const std::optional<Tensor>& k, const Tensor& cos,
                const Tensor& sin, const Tensor& q_out, const std::optional<Tensor>& k_out) {
  const auto aligned = [](const std::optional<Tensor>& t) { return !t || vectorizable(*t); };
  return cos.shape[1] % kVector<T> == 0 && aligned(q) && aligned(k) && aligned(cos) &&
         aligned(sin) && aligned(q_out) && aligned(k_out);
}

}  // namespace

void rope(const Tensor& q, const std::optional<Tensor>& k, const Tensor& cos, const Tensor& sin,
          const std::optional<Tensor>& positions, const Tensor& q_out,
          const std::optional<Tensor>& k_out, bool interleaved, bool inverse, uintptr_t stream) {
  check_shape("q", q, {-1, -1, -1, -1});
  check_dtype("q", q, {DType::f32, DType::bf16, DType::f16});
  check_rows("q", q, launch_device("q", q));
  check_like("q_out", q_out, q);
  check_output("q_out", q_out, q.device);
  CEG_CHECK(k.has_value() == k_out.has_value(), "k_out must come with k, got ",
            k ? "k alone" : "k_out alone");
  if (k) {
    check_shape("k", *k, {q.shape[0], q.shape[1], -1, q.shape[3]});
    check_dtype("k", *k, {q.dtype});
    check_rows("k", *k, q.device);
    check_like("k_out", *k_out, *k);
    check_output("k_out", *k_out, q.device);
  }
  check_shape("cos", cos, {-1, -1});
  check_dtype("cos", cos, {DType::f32});
  check_rows("cos", cos, q.device);
  check_like("sin", sin, cos);
  CEG_CHECK(2 * cos.shape[1] <= q.shape[3], "cos must have at most head_dim / 2 = ", q.shape[3] / 2,
            " columns, got ", cos.shape[1]);
  if (positions) {
    check_shape("positions", *positions, {q.shape[0], q.shape[1]});
    check_dtype("positions", *positions, {DType::i32, DType::i64});
    check_rows("positions", *positions, q.device);
  } else {
    CEG_CHECK(cos.shape[0] >= q.shape[1], "cos must have a row for each of the ", q.shape[1],
              " positions, got ", cos.shape[0]);
  }
  constexpr int64_t kMost = 1 << 16;
  const int64_t tokens = q.shape[0] * q.shape[1], heads = q.shape[2] + (k ? k->shape[2] : 0);
  CEG_CHECK(tokens <= INT32_MAX, "q must have at most 2^31 - 1 tokens, got ", tokens);
  CEG_CHECK(heads <= kMost && q.shape[3] <= kMost, "q and k must have at most 2^16 heads of 2^16, ",
            "got ", heads, " of ", q.shape[3]);
  if (tokens == 0 || heads == 0 || q.shape[3] == 0) return;

  const OnDevice guard(q.device);
  with_storage(q.dtype, [&](auto storage) {
    using T = decltype(storage);
    const Rotation<T> a{.q = heads_of<T>(q, q_out),
                        .k = heads_of<T>(k, k_out),
                        .cos = cos.ptr<float>(),
                        .sin = sin.ptr<float>(),
                        .cos_stride = cos.stride[0],
                        .sin_stride = sin.stride[0],
                        .table_rows = cos.shape[0],
                        .positions = positions ? positions->data : nullptr,
                        .positions_batch = positions ? positions->stride[0] : 0,
                        .positions_token = positions ? positions->stride[1] : 0,
                        .wide_positions = positions && positions->dtype == DType::i64,
                        .tokens = tokens,
                        .length = static_cast<int>(q.shape[1]),
                        .half = static_cast<int>(cos.shape[1]),
                        .rest = static_cast<int>(q.shape[3] - 2 * cos.shape[1]),
                        .lanes = 0,
                        .sign = inverse ? -1.0f : 1.0f};
    if (in_vectors<T>(q, k, cos, sin, q_out, k_out)) {
      run<T, kVector<T>>(a, interleaved, stream);
    } else {
      run<T, 1>(a, interleaved, stream);
    }
  });
}

void list_rope(Kernels& kernels) {
  for_each_storage([&](auto storage, const char* type) {
    using T = decltype(storage);
    constexpr int N = kVector<T>;
    add(kernels, "rope_kernel", type, N, rope_kernel<T, N, false>, kThreads);
    add(kernels, "rope_kernel", type, N, rope_kernel<T, N, true>, kThreads, " interleaved");
    add(kernels, "rope_kernel", type, 1, rope_kernel<T, 1, false>, kThreads);
    add(kernels, "rope_kernel", type, 1, rope_kernel<T, 1, true>, kThreads, " interleaved");
  });
}

}  // namespace ceg::cuda
