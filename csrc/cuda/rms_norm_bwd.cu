// With g = dy * (weight + offset):  dx = rstd * g - h * projection + dh,
// projection = rstd^3 * mean(g * h);  dweight = sum over rows of dy * h * rstd.
//
// dweight without atomics: a block owns every gridDim.x-th group of rows, keeps its share in
// registers, and writes it as one row of `partials`, which a second kernel adds in order.
#include <algorithm>

#include "launch.h"
#include "reduce.h"
#include "rms_norm.h"
#include "rms_norm_weight.h"

namespace ceg::cuda {
namespace {

template <class T>
struct Backward {
  const T *dy, *dh, *h;
  Weight<T> weight;
  const float* rstd;
  T* dx;
  float* partials;  // null: dweight is not asked for
  int64_t dy_stride, dh_stride, h_stride, dx_stride;
  int64_t rows;
  int dim;
};

// Rows up to this length are a warp's, several to a block.
constexpr int kWarpRow = 1024;
constexpr int kRowsOfWarps = 4;
constexpr int kWarpThreads = kWarp * kRowsOfWarps;

// Blocks a multiprocessor, by threads a block and by the elements of `item_size` bytes that a
// thread holds (three times: dy, h, dweight).
constexpr int resident_blocks(int threads, int elements, int64_t item_size) {
  return resident(threads, elements <= 8 ? 64 : item_size == 2 ? 128 : 168);
}

// The same by the length of a row: see run().
int blocks_each(const Tensor& h) {
  const int64_t dim = h.shape[1], size = item_size(h.dtype);
  if (dim <= kWarp * 8) return resident_blocks(kWarpThreads, 8, size);
  if (dim <= kWarpRow) return resident_blocks(kWarpThreads, 32, size);
  return resident_blocks(dim <= 4096 ? 128 : 256, 32, size);
}

template <int N, class T>
__device__ __forceinline__ float along(const Backward<T>& a, int o, const Pack<T, N>& dy_pack,
                                       const Pack<T, N>& h_pack) {
  float dy[N], h[N], scale[N], sum = 0;
  dy_pack.unpack(dy);
  h_pack.unpack(h);
  a.weight.scale(o, scale);
#pragma unroll
  for (int j = 0; j < N; ++j) sum += dy[j] * scale[j] * h[j];
  return sum;
}

template <int N, class T>
__device__ __forceinline__ void write_dx(const Backward<T>& a, int64_t row, int o, float rstd,
                                         float projection, const float (&dy)[N],
                                         const float (&h)[N]) {
  float dx[N], scale[N];
  a.weight.scale(o, scale);
#pragma unroll
  for (int j = 0; j < N; ++j) dx[j] = dy[j] * rstd * scale[j] - h[j] * projection;
  if (a.dh) {
    float dh[N];
    load_once<N>(a.dh + row * a.dh_stride + o).unpack(dh);
#pragma unroll
    for (int j = 0; j < N; ++j) dx[j] += dh[j];
  }
  store(a.dx + row * a.dx_stride + o, dx);
}

template <int N>
__device__ __forceinline__ void store_partial(float* to, const float (&dweight)[N]) {
  constexpr int kPart = N < kVector<float> ? N : kVector<float>;
#pragma unroll
  for (int i = 0; i < N; i += kPart) {
    float part[kPart];
#pragma unroll
    for (int j = 0; j < kPart; ++j) part[j] = dweight[i + j];
    store(to + i, part);
  }
}

// kRows rows at a time in a block, each with kThreads threads that hold kElements of it in
// registers.
template <class T, int N, int kThreads, int kElements, int kRows>
__global__ void __launch_bounds__(kThreads* kRows,
                                  resident_blocks(kThreads* kRows, kElements, sizeof(T)))
    rms_norm_bwd_kernel(const Backward<T> a) {
  static_assert(kRows == 1 || kThreads == kWarp, "several rows a block: a warp each, no barriers");
  static_assert(kElements % N == 0, "a thread holds whole vectors");
  constexpr int kItems = kElements / N;
  float dweight[kItems][N] = {};
  int turn = 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.y; row < a.rows;
       row += static_cast<int64_t>(gridDim.x) * kRows) {
    // Load.
    const T *dy_row = a.dy + row * a.dy_stride, *h_row = a.h + row * a.h_stride;
    Pack<T, N> dys[kItems] = {}, hs[kItems] = {};
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int o = (i * kThreads + threadIdx.x) * N;
      if (o >= a.dim) continue;
      dys[i] = load_once<N>(dy_row + o);
      hs[i] = load_once<N>(h_row + o);
    }
    const float rstd = a.rstd[row];

    // Reduce: how much of the gradient points along h.
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int o = (i * kThreads + threadIdx.x) * N;
      if (o < a.dim) sum += along(a, o, dys[i], hs[i]);
    }
    sum = shared_memory<BlockSum<kThreads>>()(sum, turn++);
    const float projection = sum * rstd * rstd * rstd / static_cast<float>(a.dim);

    // Write dx, keep dweight. Columns beyond the row are zeros.
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int o = (i * kThreads + threadIdx.x) * N;
      float dy[N], h[N];
      dys[i].unpack(dy);
      hs[i].unpack(h);
      if (o < a.dim) write_dx(a, row, o, rstd, projection, dy, h);
#pragma unroll
      for (int j = 0; j < N; ++j) dweight[i][j] += dy[j] * h[j] * rstd;
    }
  }
  if (!a.partials) return;

  // The block's share of dweight: its warps add theirs in order.
  float* partial = a.partials + static_cast<int64_t>(blockIdx.x) * a.dim;
  if constexpr (kRows > 1) {
    struct Columns {
      float sums[kThreads * kElements];
    };
    float* sums = shared_memory<Columns>().sums;
    for (unsigned warp = 0; warp < kRows; ++warp) {
      if (threadIdx.y == warp) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
#pragma unroll
          for (int j = 0; j < N; ++j) {
            float& sum = sums[(i * N + j) * kThreads + threadIdx.x];  // no two lanes in one bank
            dweight[i][j] += warp ? sum : 0.0f;
            sum = dweight[i][j];
          }
        }
      }
      __syncthreads();
    }
    if (threadIdx.y != kRows - 1) return;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int o = (i * kThreads + threadIdx.x) * N;
    if (o < a.dim) store_partial(partial + o, dweight[i]);
  }
}

// dx of rows that do not fit the registers of a block: they are read twice, then from L2.
template <class T, int N, int kThreads>
__global__ void __launch_bounds__(kThreads, resident(kThreads, 64))
    rms_norm_long_bwd_kernel(const Backward<T> a) {
  const int64_t row = blockIdx.x;
  const T *dy_row = a.dy + row * a.dy_stride, *h_row = a.h + row * a.h_stride;
  float sum = 0;
  for (int o = threadIdx.x * N; o < a.dim; o += kThreads * N) {
    sum += along(a, o, load_constant<N>(dy_row + o), load_constant<N>(h_row + o));
  }
  sum = shared_memory<BlockSum<kThreads>>()(sum, 0);
  const float rstd = a.rstd[row];
  const float projection = sum * rstd * rstd * rstd / static_cast<float>(a.dim);
  for (int o = threadIdx.x * N; o < a.dim; o += kThreads * N) {
    float dy[N], h[N];
    load_constant<N>(dy_row + o).unpack(dy);
    load_constant<N>(h_row + o).unpack(h);
    write_dx(a, row, o, rstd, projection, dy, h);
  }
}

// Their dweight: a thread takes N columns of every gridDim.y-th row.
template <class T, int N, int kThreads>
__global__ void __launch_bounds__(kThreads, resident(kThreads, 64))
    rms_norm_long_partials_kernel(const Backward<T> a) {
  const int64_t o = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (o >= a.dim) return;
  float dweight[N] = {};
  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
    float dy[N], h[N];
    load_once<N>(a.dy + row * a.dy_stride + o).unpack(dy);
    load_once<N>(a.h + row * a.h_stride + o).unpack(h);
    const float rstd = a.rstd[row];
#pragma unroll
    for (int j = 0; j < N; ++j) dweight[j] += dy[j] * h[j] * rstd;
  }
  store_partial(a.partials + static_cast<int64_t>(blockIdx.y) * a.dim + o, dweight);
}

// dweight[o] = sum of column o of partials: (rows, dim), by kSlices threads a column.
template <class W, int kSlices>
__global__ void __launch_bounds__(kWarp* kSlices, resident(kWarp* kSlices, 64))
    rms_norm_dweight_kernel(const float* partials, int64_t rows, int64_t dim, W* dweight) {
  struct Slices {
    float sums[kSlices][kWarp];
  };
  Slices& slices = shared_memory<Slices>();
  const int64_t o = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  float sum = 0;
  if (o < dim) {
    for (int64_t row = threadIdx.y; row < rows; row += kSlices) sum += partials[row * dim + o];
  }
  slices.sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || o >= dim) return;
#pragma unroll
  for (int slice = 1; slice < kSlices; ++slice) sum += slices.sums[slice][threadIdx.x];
  dweight[o] = from_float<W>(sum);
}

template <class T, int N, int kThreads, int kElements>
constexpr Variant<Backward<T>> in_registers() {
  constexpr int kRows = kThreads == kWarp ? kRowsOfWarps : 1;
  static_assert(kThreads != kWarp || kThreads * kElements <= kWarpRow,
                "rms_norm_bwd_rows counts groups of rows by their length");
  return {kThreads * kElements, dim3(kThreads, kRows),
          rms_norm_bwd_kernel<T, N, kThreads, kElements, kRows>};
}

// By the longest row, ascending. One element at a time is slow whatever the kernel, and not worth a
// build's time.
template <class T, int N>
std::span<const Variant<Backward<T>>> variants() {
  if constexpr (N == 1) {
    static const Variant<Backward<T>> one[] = {in_registers<T, N, 32, 8>()};
    return one;
  } else {
    static const Variant<Backward<T>> all[] = {
        in_registers<T, N, 32, 8>(), in_registers<T, N, 32, 32>(), in_registers<T, N, 128, 32>(),
        in_registers<T, N, 256, 32>()};
    return all;
  }
}

constexpr int kLongThreads = 512, kColumnThreads = 128;

template <class T, int N>
void run(const Backward<T>& a, unsigned blocks, uintptr_t stream) {
  for (const auto& variant : variants<T, N>()) {
    if (a.dim > variant.longest_row) continue;
    return launch(
        {.name = "rms_norm_bwd_kernel", .grid = blocks, .block = variant.block, .stream = stream},
        variant.kernel, a);
  }
  launch({.name = "rms_norm_long_bwd_kernel",
          .grid = static_cast<unsigned>(a.rows),
          .block = kLongThreads,
          .stream = stream},
         rms_norm_long_bwd_kernel<T, N, kLongThreads>, a);
  if (!a.partials) return;
  constexpr int kColumns = kColumnThreads * N;
  launch({.name = "rms_norm_long_partials_kernel",
          .grid = dim3((a.dim + kColumns - 1) / kColumns, blocks),
          .block = kColumnThreads,
          .stream = stream},
         rms_norm_long_partials_kernel<T, N, kColumnThreads>, a);
}

template <class T, int N>
void list(const std::string& type, Kernels& kernels) {
  list_variants("rms_norm_bwd_kernel", type, N, variants<T, N>(), kernels);
  add(kernels, "rms_norm_long_bwd_kernel", type, N, rms_norm_long_bwd_kernel<T, N, kLongThreads>,
      kLongThreads);
  add(kernels, "rms_norm_long_partials_kernel", type, N,
      rms_norm_long_partials_kernel<T, N, kColumnThreads>, kColumnThreads);
}

constexpr int kSlices = 16;

void add_partials(const Tensor& partials, const Tensor& dweight, uintptr_t stream) {
  const int64_t dim = dweight.shape[0];
  with_storage(dweight.dtype, [&](auto storage) {
    using W = decltype(storage);
    launch({.name = "rms_norm_dweight_kernel",
            .grid = static_cast<unsigned>((dim + kWarp - 1) / kWarp),
            .block = dim3(kWarp, kSlices),
            .stream = stream},
           rms_norm_dweight_kernel<W, kSlices>, partials.ptr<float>(), partials.shape[0], dim,
           dweight.ptr<W>());
  });
}

int64_t row_stride(const std::optional<Tensor>& t) { return t ? t->stride[0] : 0; }

}  // namespace

int64_t rms_norm_bwd_rows(const Tensor& h) {
  check_shape("h", h, {-1, -1});
  const OnDevice guard(launch_device("h", h));
  const int64_t dim = h.shape[1], rows_each = dim <= kWarpRow ? kRowsOfWarps : 1;
  const int64_t groups = (h.shape[0] + rows_each - 1) / rows_each;
  return std::min<int64_t>(groups, static_cast<int64_t>(multiprocessors()) * blocks_each(h));
}

void rms_norm_bwd(const Tensor& dy, const std::optional<Tensor>& dh, const Tensor& h,
                  const std::optional<Tensor>& weight, const Tensor& rstd, const Tensor& dx,
                  const std::optional<Tensor>& dweight, const std::optional<Tensor>& partials,
                  double weight_offset, uintptr_t stream) {
  check_matrix("h", h);
  check_like("dy", dy, h);
  if (dh) check_like("dh", *dh, h);
  if (weight) check_weight("weight", *weight, h);
  check_rstd(rstd, h);
  check_like("dx", dx, h);
  check_output("dx", dx, h.device);
  CEG_CHECK(partials || !dweight, "dweight needs partials, got None");
  const int64_t blocks = rms_norm_bwd_rows(h);
  if (dweight) {
    CEG_CHECK(weight, "dweight needs weight, got None");
    check_weight("dweight", *dweight, h);
    check_dtype("dweight", *dweight, {weight->dtype});
    check_output("dweight", *dweight, h.device);
    check_shape("partials", *partials, {blocks, h.shape[1]});
    check_dtype("partials", *partials, {DType::f32});
    check_output("partials", *partials, h.device);
    CEG_CHECK(partials->stride[0] == h.shape[1] || blocks <= 1,
              "partials must be contiguous, got row stride ", partials->stride[0]);
    CEG_CHECK(reinterpret_cast<uintptr_t>(partials->data) % 16 == 0,
              "partials must start at a multiple of 16 bytes, got ", partials->data);
  }
  const bool vectors = vectorizable(dy) && vectorizable(dh) && vectorizable(h) &&
                       vectorizable(weight) && vectorizable(dx);
  const OnDevice guard(h.device);
  with_storage(h.dtype, [&](auto storage) {
    using T = decltype(storage);
    const Backward<T> a{.dy = dy.ptr<T>(),
                        .dh = dh ? dh->ptr<T>() : nullptr,
                        .h = h.ptr<T>(),
                        .weight = weight_of<T>(weight, weight_offset),
                        .rstd = rstd.ptr<float>(),
                        .dx = dx.ptr<T>(),
                        .partials = dweight ? partials->ptr<float>() : nullptr,
                        .dy_stride = dy.stride[0],
                        .dh_stride = row_stride(dh),
                        .h_stride = h.stride[0],
                        .dx_stride = dx.stride[0],
                        .rows = h.shape[0],
                        .dim = static_cast<int>(h.shape[1])};
    const auto grid = static_cast<unsigned>(blocks);
    if (h.numel()) vectors ? run<T, kVector<T>>(a, grid, stream) : run<T, 1>(a, grid, stream);
  });
  if (dweight) add_partials(*partials, *dweight, stream);
}

void list_rms_norm_bwd(Kernels& kernels) {
  for_each_storage([&](auto storage, const char* type) {
    using T = decltype(storage);
    list<T, kVector<T>>(type, kernels);
    list<T, 1>(type, kernels);
    add(kernels, "rms_norm_dweight_kernel", type, 1, rms_norm_dweight_kernel<T, kSlices>,
        kWarp * kSlices);
  });
}

}  // namespace ceg::cuda
