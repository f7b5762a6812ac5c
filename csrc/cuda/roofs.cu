#include "roofs.h"

#include "../check.h"
#include "kernels.h"
#include "launch.h"
#include "mma.h"
#include "vector.h"

namespace ceg::cuda {
namespace {

constexpr int kThreads = 256;
// Eight warps for each of a multiprocessor's four schedulers, and registers for as many.
constexpr int kBlocks = 4;
constexpr int kInFlight = 4;  // vectors of a thread
constexpr int kChains = 16;
// Rounds of a loop's body, so that counting them takes about a hundredth of the instructions.
constexpr int kUnrolled = 16;
constexpr int kTileRows = 16, kTileColumns = 64, kProducts = kTileColumns / 8;

struct Copy {
  const uint4* source;
  uint4* target;
  int64_t vectors;
};

__global__ void __launch_bounds__(kThreads) roofs_copy_kernel(const Copy a) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kInFlight + threadIdx.x;
  uint4 vectors[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const int64_t at = first + i * kThreads;
    if (at < a.vectors) vectors[i] = __ldcs(a.source + at);
  }
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const int64_t at = first + i * kThreads;
    if (at < a.vectors) __stcs(a.target + at, vectors[i]);
  }
}

template <class T>
struct Chains {
  const T* start;
  T* out;
  T factor, addend;
  int64_t bodies;
};

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) roofs_fma_kernel(const Chains<T> a) {
  T chains[kChains];
#pragma unroll
  for (int i = 0; i < kChains; ++i) chains[i] = a.start[i];
#pragma unroll 1
  for (int64_t body = 0; body < a.bodies; ++body) {
#pragma unroll
    for (int round = 0; round < kUnrolled; ++round) {
#pragma unroll
      for (int i = 0; i < kChains; ++i) chains[i] = chains[i] * a.factor + a.addend;
    }
  }
  T sum = 0;
#pragma unroll
  for (int i = 0; i < kChains; ++i) sum += chains[i];
  a.out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

template <class T>
struct Products {
  const T *a, *b;
  float* out;
  int64_t bodies;
};

template <class T>
__device__ __forceinline__ uint32_t pair_at(const T* from, int columns, Position low,
                                            Position high) {
  return pack<T>(to_float(from[low.row * columns + low.column]),
                 to_float(from[high.row * columns + high.column]));
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) roofs_mma_kernel(const Products<T> p) {
  const int lane = threadIdx.x % kWarp;
  uint32_t a[4], b[kProducts][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a[i] = pair_at(p.a, 16, mma_a_position(lane, i, 0), mma_a_position(lane, i, 1));
  }
#pragma unroll
  for (int n = 0; n < kProducts; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      b[n][i] = pair_at(p.b + 8 * n, kTileColumns, mma_b_position(lane, i, 0),
                        mma_b_position(lane, i, 1));
    }
  }

  float c[kProducts][4] = {};
#pragma unroll 1
  for (int64_t body = 0; body < p.bodies; ++body) {
#pragma unroll
    for (int round = 0; round < kUnrolled; ++round) {
#pragma unroll
      for (int n = 0; n < kProducts; ++n) mma_m16n8k16<T>(c[n], a, b[n][0], b[n][1]);
    }
  }

  float sum = 0;
#pragma unroll
  for (int n = 0; n < kProducts; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += c[n][i];
  }
  p.out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

unsigned blocks_for(const Tensor& out, int64_t rounds) {
  CEG_CHECK(out.shape[0] > 0 && out.shape[0] % kThreads == 0, "out must have a multiple of ",
            kThreads, " elements, got ", out.shape[0]);
  CEG_CHECK(rounds > 0 && rounds % kUnrolled == 0, "rounds must be a positive multiple of ",
            kUnrolled, ", got ", rounds);
  return static_cast<unsigned>(out.shape[0] / kThreads);
}

Launch over(const char* name, unsigned blocks, uintptr_t stream) {
  return {.name = name, .grid = blocks, .block = kThreads, .stream = stream};
}

template <class T>
void fma(const Tensor& start, const Tensor& out, double factor, double addend, int64_t rounds,
         uintptr_t stream) {
  const Chains<T> chains{.start = start.ptr<T>(),
                         .out = out.ptr<T>(),
                         .factor = static_cast<T>(factor),
                         .addend = static_cast<T>(addend),
                         .bodies = rounds / kUnrolled};
  launch(over("roofs_fma_kernel", blocks_for(out, rounds), stream), roofs_fma_kernel<T>, chains);
}

template <class T>
void mma(const Tensor& a, const Tensor& b, const Tensor& out, int64_t rounds, uintptr_t stream) {
  const Products<T> products{
      .a = a.ptr<T>(), .b = b.ptr<T>(), .out = out.ptr<float>(), .bodies = rounds / kUnrolled};
  launch(over("roofs_mma_kernel", blocks_for(out, rounds), stream), roofs_mma_kernel<T>, products);
}

}  // namespace

void roofs_copy(const Tensor& source, const Tensor& target, uintptr_t stream) {
  check_shape("source", source, {-1});
  check_rows("source", source, launch_device("source", source));
  check_like("target", target, source);
  check_output("target", target, source.device);
  CEG_CHECK(vectorizable(source) && vectorizable(target), "source and target must be ",
            "whole vectors of 16 bytes that start at one, got ", source.shape[0], " elements");
  const OnDevice guard(source.device);
  const int64_t vectors = source.shape[0] * item_size(source.dtype) / 16;
  constexpr int64_t kEach = kThreads * kInFlight;
  const int64_t blocks = (vectors + kEach - 1) / kEach;
  CEG_CHECK(blocks <= INT32_MAX, "source must have fewer than 2^45 bytes, got ", vectors * 16);
  const Copy copy{.source = source.ptr<uint4>(), .target = target.ptr<uint4>(), .vectors = vectors};
  launch(over("roofs_copy_kernel", static_cast<unsigned>(blocks), stream), roofs_copy_kernel, copy);
}

double roofs_fma(const Tensor& start, const Tensor& out, double factor, double addend,
                 int64_t rounds, uintptr_t stream) {
  check_shape("start", start, {kChains});
  check_dtype("start", start, {DType::f32, DType::f64});
  check_rows("start", start, launch_device("start", start));
  check_shape("out", out, {-1});
  check_dtype("out", out, {start.dtype});
  check_output("out", out, start.device);
  const OnDevice guard(start.device);
  (start.dtype == DType::f64 ? fma<double> : fma<float>)(start, out, factor, addend, rounds,
                                                         stream);
  return 2.0 * kChains * static_cast<double>(rounds) * static_cast<double>(out.shape[0]);
}

double roofs_mma(const Tensor& a, const Tensor& b, const Tensor& out, int64_t rounds,
                 uintptr_t stream) {
  check_shape("a", a, {kTileRows, 16});
  check_dtype("a", a, {DType::bf16, DType::f16});
  check_rows("a", a, launch_device("a", a));
  check_shape("b", b, {16, kTileColumns});
  check_dtype("b", b, {a.dtype});
  check_rows("b", b, a.device);
  for (const Tensor* t : {&a, &b}) {
    CEG_CHECK(t->stride[0] == t->shape[1], t == &a ? "a" : "b", " must be dense, got a stride of ",
              t->stride[0]);
  }
  check_shape("out", out, {-1});
  check_dtype("out", out, {DType::f32});
  check_output("out", out, a.device);
  const OnDevice guard(a.device);
  (a.dtype == DType::f16 ? mma<f16> : mma<bf16>)(a, b, out, rounds, stream);
  const double warps = static_cast<double>(out.shape[0] / kWarp);
  return 2.0 * kTileRows * kTileColumns * 16 * static_cast<double>(rounds) * warps;
}

int64_t roofs_threads() { return int64_t{1} * multiprocessors() * kBlocks * kThreads; }

void list_roofs(Kernels& kernels) {
  const auto list = [&](const char* name, const char* type, auto* kernel) {
    kernels.push_back(
        {std::string(name) + " " + type, reinterpret_cast<const void*>(kernel), kThreads});
  };
  list("roofs_copy_kernel", "x16", roofs_copy_kernel);
  list("roofs_fma_kernel", "float32", roofs_fma_kernel<float>);
  list("roofs_fma_kernel", "float64", roofs_fma_kernel<double>);
  list("roofs_mma_kernel", "bfloat16", roofs_mma_kernel<bf16>);
  list("roofs_mma_kernel", "float16", roofs_mma_kernel<f16>);
}

}  // namespace ceg::cuda
