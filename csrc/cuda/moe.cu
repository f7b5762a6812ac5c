#include "moe.h"

#include "../check.h"
#include "kernels.h"
#include "launch.h"
#include "reduce.h"
#include "vector.h"

namespace ceg::cuda {
namespace {

// A block has kWarps rows; a warp moves kItems vectors a lane of its row, blockIdx.y says which.
constexpr int kWarps = 4, kItems = 4;
constexpr int kResident = resident(kWarp * kWarps, 64);

struct Copy {
  const void* x;
  void* out;
  const int* sources;
  int64_t x_stride, out_stride;  // in units of the access
  int64_t rows, choices;
  int units;  // accesses a row
  int top_k;
};

// Bytes are copied as they are: a NaN's payload must come out unchanged.
template <class Raw>
__global__ void __launch_bounds__(kWarp* kWarps, kResident) moe_dispatch_kernel(const Copy a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (row >= a.rows) return;
  const int source = a.sources[row];
  const bool filled = source >= 0 && source < a.choices;
  const Raw* from = static_cast<const Raw*>(a.x) + (filled ? source / a.top_k : 0) * a.x_stride;
  Raw* to = static_cast<Raw*>(a.out) + row * a.out_stride;
  const int first = blockIdx.y * kItems * kWarp + threadIdx.x;
  Raw items[kItems] = {};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int o = first + i * kWarp;
    if (filled && o < a.units) items[i] = __ldg(from + o);
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int o = first + i * kWarp;
    if (o < a.units) __stwb(to + o, items[i]);
  }
}

template <class T>
struct Combine {
  const T *y = nullptr, *dout = nullptr;
  const int *slots = nullptr, *sources = nullptr;
  const float* weights = nullptr;  // null: ones
  T *out = nullptr, *dy = nullptr;
  float* dweights = nullptr;
  int64_t y_stride = 0, slots_stride = 0, weights_stride = 0, out_stride = 0;
  int64_t dout_stride = 0, dy_stride = 0, dweights_stride = 0;
  int64_t tokens, rows;
  int top_k, dim;
};

template <class T, int N>
__global__ void __launch_bounds__(kWarp* kWarps, kResident) moe_combine_kernel(const Combine<T> a) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  const int o = (blockIdx.y * kWarp + threadIdx.x) * N;
  if (n >= a.tokens || o >= a.dim) return;
  const int* slots = a.slots + n * a.slots_stride;
  float sum[N] = {};
  for (int start = 0; start < a.top_k; start += kItems) {
    // Load kItems choices at once, add them in order.
    Pack<T, N> rows[kItems] = {};
    float weights[kItems] = {};
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (start + i >= a.top_k) continue;
      const int slot = slots[start + i];
      if (slot < 0 || slot >= a.rows) continue;
      weights[i] = a.weights ? a.weights[n * a.weights_stride + start + i] : 1.0f;
      rows[i] = load_once<N>(a.y + slot * a.y_stride + o);
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      float y[N];
      rows[i].unpack(y);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] += y[j] * weights[i];
    }
  }
  store(a.out + n * a.out_stride + o, sum);
}

// A warp has one choice: its row of dy and its dweight; and, where the row of the same number is
// empty, that row's zeros.
template <class T, int N>
__global__ void __launch_bounds__(kWarp* kWarps, kResident)
    moe_combine_bwd_kernel(const Combine<T> a) {
  const int64_t choice = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (choice >= a.rows) return;
  if (a.sources[choice] < 0) {
    const float zeros[N] = {};
    T* dy = a.dy + choice * a.dy_stride;
    for (int o = threadIdx.x * N; o < a.dim; o += kWarp * N) store(dy + o, zeros);
  }
  const int64_t n = choice / a.top_k, k = choice - n * a.top_k;
  const int slot = a.slots[n * a.slots_stride + k];
  float along = 0;
  if (slot >= 0 && slot < a.rows) {
    const float weight = a.weights[n * a.weights_stride + k];
    const T *y = a.y + slot * a.y_stride, *dout = a.dout + n * a.dout_stride;
    T* dy = a.dy + slot * a.dy_stride;
#pragma unroll 4
    for (int o = threadIdx.x * N; o < a.dim; o += kWarp * N) {
      float upstream[N], row[N];
      load_constant<N>(dout + o).unpack(upstream);
      load_once<N>(y + o).unpack(row);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        along += upstream[j] * row[j];
        row[j] = upstream[j] * weight;
      }
      store(dy + o, row);
    }
  }
  along = warp_sum(along);
  if (threadIdx.x == 0) a.dweights[n * a.dweights_stride + k] = along;
}

unsigned blocks_of(int64_t rows) { return static_cast<unsigned>((rows + kWarps - 1) / kWarps); }
unsigned tiles_of(int64_t units, int64_t each) {
  return static_cast<unsigned>((units + each - 1) / each);
}

template <class Raw>
void copy(const Tensor& x, const Tensor& sources, int64_t top_k, const Tensor& out,
          uintptr_t stream) {
  // Strides count in accesses: in vectors all of them are multiples.
  const int64_t items = sizeof(Raw) / item_size(x.dtype);
  const Copy a{.x = x.data,
               .out = out.data,
               .sources = sources.ptr<int>(),
               .x_stride = x.stride[0] / items,
               .out_stride = out.stride[0] / items,
               .rows = out.shape[0],
               .choices = x.shape[0] * top_k,
               .units = static_cast<int>(x.shape[1] / items),
               .top_k = static_cast<int>(top_k)};
  launch({.name = "moe_dispatch_kernel",
          .grid = dim3(blocks_of(a.rows), tiles_of(a.units, kItems * kWarp)),
          .block = dim3(kWarp, kWarps),
          .stream = stream},
         moe_dispatch_kernel<Raw>, a);
}

void check_index(const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
                 const Tensor& rows) {
  check_shape(name, t, shape);
  check_dtype(name, t, {DType::i32});
  check_rows(name, t, rows.device);
}

void check_matrix(const char* name, const Tensor& t) {
  check_shape(name, t, {-1, -1});
  check_dtype(name, t, {DType::f32, DType::bf16, DType::f16});
  check_rows(name, t, launch_device(name, t));
  constexpr int64_t kWidest = 1 << 20;  // the grid's second dimension has 65535 tiles of 32
  CEG_CHECK(t.shape[0] <= INT32_MAX && t.shape[1] <= kWidest, name,
            " must have at most 2^31 - 1 rows of at most 2^20 elements, got ", shape_text(t));
}

void check_weights(const char* name, const Tensor& t, const Tensor& slots, const Tensor& rows) {
  check_shape(name, t, {slots.shape[0], slots.shape[1]});
  check_dtype(name, t, {DType::f32});
  check_rows(name, t, rows.device);
}

}  // namespace

void moe_dispatch(const Tensor& x, const Tensor& sources, int64_t top_k, const Tensor& out,
                  uintptr_t stream) {
  check_matrix("x", x);
  CEG_CHECK(top_k > 0 && top_k <= INT32_MAX, "top_k must be positive, got ", top_k);
  check_index("sources", sources, {-1}, x);
  check_shape("out", out, {sources.shape[0], x.shape[1]});
  check_dtype("out", out, {x.dtype});
  check_output("out", out, x.device);
  if (out.numel() == 0) return;
  const OnDevice guard(x.device);
  if (vectorizable(x) && vectorizable(out)) return copy<uint4>(x, sources, top_k, out, stream);
  if (item_size(x.dtype) == 4) return copy<unsigned>(x, sources, top_k, out, stream);
  copy<unsigned short>(x, sources, top_k, out, stream);
}

void moe_combine(const Tensor& y, const Tensor& slots, const std::optional<Tensor>& weights,
                 const Tensor& out, uintptr_t stream) {
  check_matrix("y", y);
  check_index("slots", slots, {-1, -1}, y);
  if (weights) check_weights("weights", *weights, slots, y);
  check_shape("out", out, {slots.shape[0], y.shape[1]});
  check_dtype("out", out, {y.dtype});
  check_output("out", out, y.device);
  if (out.numel() == 0) return;
  const OnDevice guard(y.device);
  with_storage(y.dtype, [&](auto storage) {
    using T = decltype(storage);
    const Combine<T> a{.y = y.ptr<T>(),
                       .slots = slots.ptr<int>(),
                       .weights = weights ? weights->ptr<float>() : nullptr,
                       .out = out.ptr<T>(),
                       .y_stride = y.stride[0],
                       .slots_stride = slots.stride[0],
                       .weights_stride = weights ? weights->stride[0] : 0,
                       .out_stride = out.stride[0],
                       .tokens = slots.shape[0],
                       .rows = y.shape[0],
                       .top_k = static_cast<int>(slots.shape[1]),
                       .dim = static_cast<int>(y.shape[1])};
    const bool vectors = vectorizable(y) && vectorizable(out);
    const int64_t n = vectors ? kVector<T> : 1;
    launch({.name = "moe_combine_kernel",
            .grid = dim3(blocks_of(a.tokens), tiles_of(a.dim, kWarp * n)),
            .block = dim3(kWarp, kWarps),
            .stream = stream},
           vectors ? moe_combine_kernel<T, kVector<T>> : moe_combine_kernel<T, 1>, a);
  });
}

void moe_combine_bwd(const Tensor& dout, const Tensor& y, const Tensor& sources,
                     const Tensor& slots, const Tensor& weights, const Tensor& dy,
                     const Tensor& dweights, uintptr_t stream) {
  check_matrix("y", y);
  check_index("slots", slots, {-1, -1}, y);
  CEG_CHECK(slots.numel() == y.shape[0], "y must have a row for each of the ", slots.numel(),
            " choices, got ", y.shape[0]);
  check_index("sources", sources, {y.shape[0]}, y);
  check_shape("dout", dout, {slots.shape[0], y.shape[1]});
  check_dtype("dout", dout, {y.dtype});
  check_rows("dout", dout, y.device);
  check_weights("weights", weights, slots, y);
  check_like("dy", dy, y);
  check_output("dy", dy, y.device);
  check_weights("dweights", dweights, slots, y);
  check_output("dweights", dweights, y.device);
  const OnDevice guard(y.device);
  with_storage(y.dtype, [&](auto storage) {
    using T = decltype(storage);
    const Combine<T> a{.y = y.ptr<T>(),
                       .dout = dout.ptr<T>(),
                       .slots = slots.ptr<int>(),
                       .sources = sources.ptr<int>(),
                       .weights = weights.ptr<float>(),
                       .dy = dy.ptr<T>(),
                       .dweights = dweights.ptr<float>(),
                       .y_stride = y.stride[0],
                       .slots_stride = slots.stride[0],
                       .weights_stride = weights.stride[0],
                       .dout_stride = dout.stride[0],
                       .dy_stride = dy.stride[0],
                       .dweights_stride = dweights.stride[0],
                       .tokens = slots.shape[0],
                       .rows = y.shape[0],
                       .top_k = static_cast<int>(slots.shape[1]),
                       .dim = static_cast<int>(y.shape[1])};
    const bool vectors = vectorizable(y) && vectorizable(dout) && vectorizable(dy);
    launch({.name = "moe_combine_bwd_kernel",
            .grid = blocks_of(a.rows),
            .block = dim3(kWarp, kWarps),
            .stream = stream},
           vectors ? moe_combine_bwd_kernel<T, kVector<T>> : moe_combine_bwd_kernel<T, 1>, a);
  });
}

void list_moe(Kernels& kernels) {
  constexpr int kThreads = kWarp * kWarps;
  add(kernels, "moe_dispatch_kernel", "16 bytes", 1, moe_dispatch_kernel<uint4>, kThreads);
  add(kernels, "moe_dispatch_kernel", "4 bytes", 1, moe_dispatch_kernel<unsigned>, kThreads);
  add(kernels, "moe_dispatch_kernel", "2 bytes", 1, moe_dispatch_kernel<unsigned short>, kThreads);
  for_each_storage([&](auto storage, const char* type) {
    using T = decltype(storage);
    constexpr int N = kVector<T>;
    add(kernels, "moe_combine_kernel", type, N, moe_combine_kernel<T, N>, kThreads);
    add(kernels, "moe_combine_kernel", type, 1, moe_combine_kernel<T, 1>, kThreads);
    add(kernels, "moe_combine_bwd_kernel", type, N, moe_combine_bwd_kernel<T, N>, kThreads);
    add(kernels, "moe_combine_bwd_kernel", type, 1, moe_combine_bwd_kernel<T, 1>, kThreads);
  });
}

}  // namespace ceg::cuda
