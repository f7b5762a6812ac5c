#include <algorithm>

#include "../check.h"
#include "kernels.h"
#include "launch.h"
#include "moe.h"
#include "reduce.h"
#include "vector.h"

namespace ceg::cuda {
namespace {

enum class Score { softmax, sigmoid };

constexpr int kMostWarps = 4;  // tokens a block, one a warp
constexpr int kResident = resident(kWarp * kMostWarps, 64);
constexpr int kFew = 32;  // tokens that are one block, which then needs no zeros to count from
constexpr size_t kRoom = 48 << 10;  // of a block in shared memory, without asking for more

template <class T>
struct Route {
  const T* logits = nullptr;
  const float *bias = nullptr, *dweights = nullptr;
  float* weights = nullptr;
  int *expert_ids = nullptr, *totals = nullptr;
  T* dlogits = nullptr;
  int64_t logits_stride = 0, weights_stride = 0, ids_stride = 0;
  int64_t dweights_stride = 0, dlogits_stride = 0;
  int64_t tokens;
  int experts, top_k;
  Score score;
  bool renormalize;
};

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int bits = kWarp / 2; bits; bits /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, bits));
  }
  return value;
}

// Of a row: exp(logit - highest) / sum is the softmax.
struct Softmax {
  float highest, sum;

  template <class T>
  static __device__ __forceinline__ Softmax of(const T* logits, int experts) {
    float highest = -INFINITY, sum = 0;
    for (int e = threadIdx.x; e < experts; e += kWarp) {
      highest = fmaxf(highest, to_float(logits[e]));
    }
    highest = warp_max(highest);
    for (int e = threadIdx.x; e < experts; e += kWarp) sum += expf(to_float(logits[e]) - highest);
    return {highest, warp_sum(sum)};
  }
  __device__ __forceinline__ float score(float logit) const { return expf(logit - highest) / sum; }
};

// Larger for a larger key, and for the lower index of equal keys; NaN counts as infinity. 0 is less
// than any.
__device__ __forceinline__ uint64_t rank_of(float key, int index) {
  if (key != key) key = INFINITY;
  if (key == 0) key = 0;  // one zero, not two
  const unsigned bits = __float_as_uint(key);
  const unsigned ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | ~static_cast<unsigned>(index);
}

__device__ __forceinline__ uint64_t warp_max(uint64_t value) {
#pragma unroll
  for (int bits = kWarp / 2; bits; bits /= 2) {
    const uint64_t other = __shfl_xor_sync(kFullWarp, value, bits);
    value = other > value ? other : value;
  }
  return value;
}

// The best of a lane's experts: lane, lane + 32, ...; NaN in `keys` marks those that are taken.
__device__ __forceinline__ uint64_t best_of_lane(const float* keys, int experts) {
  uint64_t best = 0;
  for (int e = threadIdx.x; e < experts; e += kWarp) {
    const float key = keys[e];
    const uint64_t rank = key == key ? rank_of(key, e) : 0;
    best = rank > best ? rank : best;
  }
  return best;
}

// Token n, by a warp with room for a key an expert. count(e): by one lane for each choice.
template <class T, class Count>
__device__ __forceinline__ void route(const Route<T>& a, int64_t n, float* keys, Count count) {
  const T* logits = a.logits + n * a.logits_stride;
  int* ids = a.expert_ids + n * a.ids_stride;
  float* weights = a.weights + n * a.weights_stride;

  // Keys: without a bias the logits decide, with the same order as their scores.
  const bool softmax = a.score == Score::softmax;
  Softmax all{};
  if (softmax && (a.bias || !a.renormalize)) all = Softmax::of(logits, a.experts);
  for (int e = threadIdx.x; e < a.experts; e += kWarp) {
    float key = to_float(logits[e]);
    if (a.bias) key = (softmax ? all.score(key) : sigmoid(key)) + a.bias[e];
    keys[e] = key == key ? key : INFINITY;
  }

  // Choose. Only the lane that lost its best looks again.
  uint64_t mine = best_of_lane(keys, a.experts);
  for (int k = 0; k < a.top_k; ++k) {
    const int chosen = static_cast<int>(~static_cast<unsigned>(warp_max(mine)));
    if (chosen % kWarp == static_cast<int>(threadIdx.x)) {
      ids[k] = chosen;
      count(chosen);
      keys[chosen] = NAN;
      mine = best_of_lane(keys, a.experts);
    }
  }
  __syncwarp();

  // Weigh. Renormalised, softmax needs only the chosen logits' own maximum and sum.
  float highest = -INFINITY, sum = 0;
  for (int k = threadIdx.x; k < a.top_k; k += kWarp) {
    highest = fmaxf(highest, to_float(logits[ids[k]]));
  }
  highest = warp_max(highest);
  for (int k = threadIdx.x; k < a.top_k; k += kWarp) {
    const float logit = to_float(logits[ids[k]]);
    const float weight = !softmax        ? sigmoid(logit)
                         : a.renormalize ? expf(logit - highest)
                                         : all.score(logit);
    weights[k] = weight;
    sum += weight;
  }
  if (!a.renormalize) return;
  sum = warp_sum(sum);
  for (int k = threadIdx.x; k < a.top_k; k += kWarp) weights[k] /= sum;
}

// Counts are integers: any order gives the same sum. Dynamic shared memory: a row of keys a warp.
template <class T>
__global__ void __launch_bounds__(kWarp* kMostWarps, kResident) moe_route_kernel(const Route<T> a) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (n >= a.tokens) return;
  float* keys = reinterpret_cast<float*>(dynamic_shared_memory()) + threadIdx.y * a.experts;
  route(a, n, keys, [&](int expert) { atomicAdd(a.totals + expert, 1); });
}

// All tokens in one block, which counts in shared memory too: one launch, without zeros before it.
template <class T>
__global__ void __launch_bounds__(kWarp* kFew, 1) moe_route_few_kernel(const Route<T> a) {
  int* counts = reinterpret_cast<int*>(dynamic_shared_memory());
  float* keys = reinterpret_cast<float*>(counts + a.experts) + threadIdx.y * a.experts;
  const int thread = threadIdx.y * kWarp + threadIdx.x, threads = kWarp * blockDim.y;
  for (int e = thread; e < a.experts; e += threads) counts[e] = 0;
  __syncthreads();
  route(a, threadIdx.y, keys, [&](int expert) { atomicAdd(counts + expert, 1); });
  __syncthreads();
  for (int e = thread; e < a.experts; e += threads) a.totals[e] = counts[e];
}

// A warp has one token. Only softmax without renormalisation reaches experts that were not chosen.
// The few values of the chosen experts are kept in double: their differences cancel.
template <class T>
__global__ void __launch_bounds__(kWarp* kMostWarps, kResident)
    moe_route_bwd_kernel(const Route<T> a) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (n >= a.tokens) return;
  const T* logits = a.logits + n * a.logits_stride;
  const int* ids = a.expert_ids + n * a.ids_stride;
  const float* dweights = a.dweights + n * a.dweights_stride;
  T* dlogits = a.dlogits + n * a.dlogits_stride;
  const bool softmax = a.score == Score::softmax, dense = softmax && !a.renormalize;
  Softmax all{};
  if (dense) all = Softmax::of(logits, a.experts);

  // Scores of the chosen before renormalisation (of softmax up to a factor), their sum, and
  // <dweights, weights>. An id that is no expert's has no part.
  const auto chosen = [&](int k) { return k < a.top_k && ids[k] >= 0 && ids[k] < a.experts; };
  float highest = -INFINITY;
  for (int k = threadIdx.x; k < a.top_k; k += kWarp) {
    if (chosen(k)) highest = fmaxf(highest, to_float(logits[ids[k]]));
  }
  highest = dense ? all.highest : warp_max(highest);
  const auto score = [&](int k) {
    const double logit = to_float(logits[ids[k]]);
    return softmax ? exp(logit - highest) : sigmoid(logit);
  };
  double sum = 0, along = 0;
  for (int k = threadIdx.x; k < a.top_k; k += kWarp) {
    if (!chosen(k)) continue;
    sum += score(k);
    along += dweights[k] * score(k);
  }
#pragma unroll
  for (int bits = kWarp / 2; bits; bits /= 2) {
    sum += __shfl_xor_sync(kFullWarp, sum, bits);
    along += __shfl_xor_sync(kFullWarp, along, bits);
  }
  if (!a.renormalize) sum = dense ? all.sum : 1;
  along /= sum;

  // d softmax = w * (dw - <dw, w>), over all experts or over the chosen ones.
  for (int e = threadIdx.x; e < a.experts; e += kWarp) {
    const float shared = static_cast<float>(-along);
    dlogits[e] = from_float<T>(dense ? all.score(to_float(logits[e])) * shared : 0.0f);
  }
  __syncwarp();
  for (int k = threadIdx.x; k < a.top_k; k += kWarp) {
    if (!chosen(k)) continue;
    const double s = score(k);
    double d = dweights[k];
    if (softmax || a.renormalize) d -= along;
    d *= softmax ? s / sum : s * (1 - s) / sum;
    dlogits[ids[k]] = from_float<T>(static_cast<float>(d));
  }
}

Score parse_score(const std::string& score) {
  CEG_CHECK(score == "softmax" || score == "sigmoid", "score must be softmax or sigmoid, got ",
            score);
  return score == "softmax" ? Score::softmax : Score::sigmoid;
}

void check_logits(const Tensor& logits) {
  check_shape("logits", logits, {-1, -1});
  check_dtype("logits", logits, {DType::f32, DType::bf16, DType::f16});
  check_rows("logits", logits, launch_device("logits", logits));
  CEG_CHECK(logits.shape[0] <= INT32_MAX && logits.shape[1] <= kMostExperts,
            "logits must have at most 2^31 - 1 rows of at most ", kMostExperts, " experts, got ",
            shape_text(logits));
}

// As many warps a block as their keys leave room for in 48 KiB.
template <class T>
Launch launch_of(const char* name, const Route<T>& a, size_t keys, uintptr_t stream) {
  const size_t row = std::max<size_t>(a.experts, 1) * keys;
  const auto warps =
      static_cast<unsigned>(keys ? std::clamp<size_t>(kRoom / row, 1, kMostWarps) : kMostWarps);
  return {.name = name,
          .grid = static_cast<unsigned>((a.tokens + warps - 1) / warps),
          .block = dim3(kWarp, warps),
          .shared_bytes = row * warps,
          .stream = stream};
}

}  // namespace

void moe_route(const Tensor& logits, const std::optional<Tensor>& bias, const Tensor& weights,
               const Tensor& expert_ids, const Tensor& tokens_per_expert, const std::string& score,
               bool renormalize, uintptr_t stream) {
  check_logits(logits);
  const int64_t tokens = logits.shape[0], experts = logits.shape[1];
  if (bias) {
    check_shape("bias", *bias, {experts});
    check_dtype("bias", *bias, {DType::f32});
    check_rows("bias", *bias, logits.device);
  }
  check_shape("weights", weights, {tokens, -1});
  check_dtype("weights", weights, {DType::f32});
  check_output("weights", weights, logits.device);
  const int64_t top_k = weights.shape[1];
  CEG_CHECK(top_k >= 1 && top_k <= experts, "top_k must be in [1, ", experts, "], got ", top_k);
  check_shape("expert_ids", expert_ids, {tokens, top_k});
  check_dtype("expert_ids", expert_ids, {DType::i32});
  check_output("expert_ids", expert_ids, logits.device);
  check_shape("tokens_per_expert", tokens_per_expert, {experts});
  check_dtype("tokens_per_expert", tokens_per_expert, {DType::i32});
  check_output("tokens_per_expert", tokens_per_expert, logits.device);
  const Score kind = parse_score(score);
  const OnDevice guard(logits.device);
  // Of a block for all tokens: a row of keys a token, and the counts.
  const size_t shared = (tokens + 1) * experts * sizeof(float);
  const bool few = 1 <= tokens && tokens <= kFew && shared <= kRoom;
  if (!few) clear("tokens_per_expert", tokens_per_expert.data, experts * sizeof(int), stream);
  with_storage(logits.dtype, [&](auto storage) {
    using T = decltype(storage);
    const Route<T> a{.logits = logits.ptr<T>(),
                     .bias = bias ? bias->ptr<float>() : nullptr,
                     .weights = weights.ptr<float>(),
                     .expert_ids = expert_ids.ptr<int>(),
                     .totals = tokens_per_expert.ptr<int>(),
                     .logits_stride = logits.stride[0],
                     .weights_stride = weights.stride[0],
                     .ids_stride = expert_ids.stride[0],
                     .tokens = tokens,
                     .experts = static_cast<int>(experts),
                     .top_k = static_cast<int>(top_k),
                     .score = kind,
                     .renormalize = renormalize};
    if (few) {
      const dim3 block(kWarp, static_cast<unsigned>(tokens));
      launch({"moe_route_few_kernel", 1, block, shared, stream}, moe_route_few_kernel<T>, a);
    } else {
      launch(launch_of("moe_route_kernel", a, sizeof(float), stream), moe_route_kernel<T>, a);
    }
  });
}

void moe_route_bwd(const Tensor& dweights, const Tensor& logits, const Tensor& expert_ids,
                   const Tensor& dlogits, const std::string& score, bool renormalize,
                   uintptr_t stream) {
  check_logits(logits);
  check_shape("dweights", dweights, {logits.shape[0], -1});
  check_dtype("dweights", dweights, {DType::f32});
  check_rows("dweights", dweights, logits.device);
  check_shape("expert_ids", expert_ids, {logits.shape[0], dweights.shape[1]});
  check_dtype("expert_ids", expert_ids, {DType::i32});
  check_rows("expert_ids", expert_ids, logits.device);
  check_like("dlogits", dlogits, logits);
  check_output("dlogits", dlogits, logits.device);
  const Score kind = parse_score(score);
  const OnDevice guard(logits.device);
  with_storage(logits.dtype, [&](auto storage) {
    using T = decltype(storage);
    const Route<T> a{.logits = logits.ptr<T>(),
                     .dweights = dweights.ptr<float>(),
                     .expert_ids = expert_ids.ptr<int>(),
                     .dlogits = dlogits.ptr<T>(),
                     .logits_stride = logits.stride[0],
                     .ids_stride = expert_ids.stride[0],
                     .dweights_stride = dweights.stride[0],
                     .dlogits_stride = dlogits.stride[0],
                     .tokens = logits.shape[0],
                     .experts = static_cast<int>(logits.shape[1]),
                     .top_k = static_cast<int>(dweights.shape[1]),
                     .score = kind,
                     .renormalize = renormalize};
    launch(launch_of("moe_route_bwd_kernel", a, 0, stream), moe_route_bwd_kernel<T>, a);
  });
}

void list_moe_route(Kernels& kernels) {
  for_each_storage([&](auto storage, const char* type) {
    using T = decltype(storage);
    add(kernels, "moe_route_kernel", type, 1, moe_route_kernel<T>, kWarp * kMostWarps);
    add(kernels, "moe_route_few_kernel", type, 1, moe_route_few_kernel<T>, kWarp * kFew);
    add(kernels, "moe_route_bwd_kernel", type, 1, moe_route_bwd_kernel<T>, kWarp * kMostWarps);
  });
}

}  // namespace ceg::cuda
