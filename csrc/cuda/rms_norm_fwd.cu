#include "launch.h"
#include "reduce.h"
#include "rms_norm.h"
#include "rms_norm_weight.h"

namespace ceg::cuda {
namespace {

template <class T>
struct Forward {
  const T *x, *residual;
  Weight<T> weight;
  T *y, *sum;
  float* rstd;
  int64_t x_stride, residual_stride, y_stride, sum_stride;
  int64_t rows;
  int dim;
  float eps;
};

// N elements of h = x + residual, in fp32.
template <int N, class T>
__device__ __forceinline__ void unpack_sum(const Pack<T, N>& x, const Pack<T, N>& residual,
                                           bool with_residual, float (&h)[N]) {
  x.unpack(h);
  if (!with_residual) return;
  float more[N];
  residual.unpack(more);
#pragma unroll
  for (int j = 0; j < N; ++j) h[j] += more[j];
}

template <int N, class T>
__device__ __forceinline__ void write(const Forward<T>& a, int64_t row, int o, float rstd,
                                      const float (&h)[N]) {
  float y[N];
  a.weight.scale(o, y);
#pragma unroll
  for (int j = 0; j < N; ++j) y[j] *= h[j] * rstd;
  store(a.y + row * a.y_stride + o, y);
  if (a.sum) store(a.sum + row * a.sum_stride + o, h);
}

// kRows rows a block, each with kThreads threads that hold kElements of it in registers: memory is
// read once.
template <class T, int N, int kThreads, int kElements, int kRows>
__global__ void __launch_bounds__(kThreads* kRows,
                                  resident(kThreads* kRows, kElements <= 8 ? 64 : 84))
    rms_norm_fwd_kernel(const Forward<T> a) {
  static_assert(kRows == 1 || kThreads == kWarp, "several rows a block: a warp each, no barriers");
  static_assert(kElements % N == 0, "a thread holds whole vectors");
  constexpr int kItems = kElements / N;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.y;
  if (kRows > 1 && row >= a.rows) return;
  const T* x = a.x + row * a.x_stride;
  const T* residual = a.residual + row * a.residual_stride;

  // Load: everything is under way before the first sum waits for it.
  Pack<T, N> packs[kItems] = {}, more[kItems] = {};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int o = (i * kThreads + threadIdx.x) * N;
    if (o < a.dim) packs[i] = load_once<N>(x + o);
    if (a.residual && o < a.dim) more[i] = load_once<N>(residual + o);
  }

  // Reduce. Columns beyond the row are zeros.
  float h[kItems][N], squares = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    unpack_sum(packs[i], more[i], a.residual, h[i]);
#pragma unroll
    for (int j = 0; j < N; ++j) squares += h[i][j] * h[i][j];
  }
  squares = shared_memory<BlockSum<kThreads>>()(squares, 0);
  // Rounded to nearest: rsqrtf may be two ulp off, and every element of the row with it.
  const float rstd = __frsqrt_rn(squares / static_cast<float>(a.dim) + a.eps);
  if (threadIdx.x == 0) a.rstd[row] = rstd;

  // Scale and write.
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int o = (i * kThreads + threadIdx.x) * N;
    if (o < a.dim) write(a, row, o, rstd, h[i]);
  }
}

// Rows that do not fit the registers of a block are read twice, the second time from L2.
template <class T, int N, int kThreads>
__global__ void __launch_bounds__(kThreads, resident(kThreads, 64))
    rms_norm_long_fwd_kernel(const Forward<T> a) {
  const int64_t row = blockIdx.x;
  const T* x = a.x + row * a.x_stride;
  const T* residual = a.residual + row * a.residual_stride;
  const auto load = [&](int o, float (&h)[N]) {
    Pack<T, N> more = {};
    if (a.residual) more = load_constant<N>(residual + o);
    unpack_sum(load_constant<N>(x + o), more, a.residual, h);
  };

  // Reduce.
  float squares = 0;
  for (int o = threadIdx.x * N; o < a.dim; o += kThreads * N) {
    float h[N], here = 0;  // a sum of its own, so that the error grows with the row's vectors only
    load(o, h);
#pragma unroll
    for (int j = 0; j < N; ++j) here += h[j] * h[j];
    squares += here;
  }
  squares = shared_memory<BlockSum<kThreads>>()(squares, 0);
  const float rstd = __frsqrt_rn(squares / static_cast<float>(a.dim) + a.eps);
  if (threadIdx.x == 0) a.rstd[row] = rstd;

  // Scale and write.
  for (int o = threadIdx.x * N; o < a.dim; o += kThreads * N) {
    float h[N];
    load(o, h);
    write(a, row, o, rstd, h);
  }
}

template <class T, int N, int kThreads, int kElements>
constexpr Variant<Forward<T>> in_registers() {
  constexpr int kRows = kThreads == kWarp ? 4 : 1;
  return {kThreads * kElements, dim3(kThreads, kRows),
          rms_norm_fwd_kernel<T, N, kThreads, kElements, kRows>};
}

// By the longest row, ascending. One element at a time is slow whatever the kernel, and not worth a
// build's time.
template <class T, int N>
std::span<const Variant<Forward<T>>> variants() {
  if constexpr (N == 1) {
    static const Variant<Forward<T>> one[] = {in_registers<T, N, 32, 8>()};
    return one;
  } else {
    static const Variant<Forward<T>> all[] = {
        in_registers<T, N, 32, 8>(), in_registers<T, N, 32, 32>(), in_registers<T, N, 128, 32>(),
        in_registers<T, N, 256, 32>(), in_registers<T, N, 512, 32>()};
    return all;
  }
}

constexpr int kLongThreads = 512;

template <class T, int N>
void run(const Forward<T>& a, uintptr_t stream) {
  for (const auto& variant : variants<T, N>()) {
    if (a.dim > variant.longest_row) continue;
    const int64_t each = variant.block.y;
    return launch({.name = "rms_norm_fwd_kernel",
                   .grid = static_cast<unsigned>((a.rows + each - 1) / each),
                   .block = variant.block,
                   .stream = stream},
                  variant.kernel, a);
  }
  launch({.name = "rms_norm_long_fwd_kernel",
          .grid = static_cast<unsigned>(a.rows),
          .block = kLongThreads,
          .stream = stream},
         rms_norm_long_fwd_kernel<T, N, kLongThreads>, a);
}

template <class T, int N>
void list(const std::string& type, Kernels& kernels) {
  list_variants("rms_norm_fwd_kernel", type, N, variants<T, N>(), kernels);
  add(kernels, "rms_norm_long_fwd_kernel", type, N, rms_norm_long_fwd_kernel<T, N, kLongThreads>,
      kLongThreads);
}

int64_t row_stride(const std::optional<Tensor>& t) { return t ? t->stride[0] : 0; }

}  // namespace

void rms_norm_fwd(const Tensor& x, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& residual, const Tensor& y,
                  const std::optional<Tensor>& residual_out, const Tensor& rstd, double eps,
                  double weight_offset, uintptr_t stream) {
  check_matrix("x", x);
  if (weight) check_weight("weight", *weight, x);
  if (residual) check_like("residual", *residual, x);
  CEG_CHECK(!residual_out || residual, "residual_out needs residual, got None");
  check_like("y", y, x);
  check_output("y", y, x.device);
  if (residual_out) {
    check_like("residual_out", *residual_out, x);
    check_output("residual_out", *residual_out, x.device);
  }
  check_rstd(rstd, x);
  check_output("rstd", rstd, x.device);
  if (x.numel() == 0) return;
  const bool vectors = vectorizable(x) && vectorizable(weight) && vectorizable(residual) &&
                       vectorizable(y) && vectorizable(residual_out);
  const OnDevice guard(x.device);
  with_storage(x.dtype, [&](auto storage) {
    using T = decltype(storage);
    const Forward<T> a{.x = x.ptr<T>(),
                       .residual = residual ? residual->ptr<T>() : nullptr,
                       .weight = weight_of<T>(weight, weight_offset),
                       .y = y.ptr<T>(),
                       .sum = residual_out ? residual_out->ptr<T>() : nullptr,
                       .rstd = rstd.ptr<float>(),
                       .x_stride = x.stride[0],
                       .residual_stride = row_stride(residual),
                       .y_stride = y.stride[0],
                       .sum_stride = row_stride(residual_out),
                       .rows = x.shape[0],
                       .dim = static_cast<int>(x.shape[1]),
                       .eps = static_cast<float>(eps)};
    vectors ? run<T, kVector<T>>(a, stream) : run<T, 1>(a, stream);
  });
}

void list_rms_norm_fwd(Kernels& kernels) {
  for_each_storage([&](auto storage, const char* type) {
    using T = decltype(storage);
    list<T, kVector<T>>(type, kernels);
    list<T, 1>(type, kernels);
  });
}

}  // namespace ceg::cuda
