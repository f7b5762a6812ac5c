// What the attention backward needs of each row before the pairs, and the gradient of the sink.
#include "../check.h"
#include "attention.h"
#include "attention_tile.h"
#include "kernels.h"
#include "launch.h"
#include "vector.h"

namespace ceg::cuda {
namespace {

constexpr int kThreads = 256;

// A part of a warp takes a row, a lane 8 of its items at a time.
template <class T>
__global__ void __launch_bounds__(kThreads)
    attention_bwd_delta_kernel(const __grid_constant__ AttentionBwd args, int lanes, int64_t rows) {
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t index =
      static_cast<int64_t>(blockIdx.x) * (kThreads / lanes) + static_cast<int>(threadIdx.x) / lanes;
  // Heads vary fastest, as they do in memory. All lanes of a warp go on to the sums.
  const bool there = index < rows;
  const int64_t position = (there ? index : 0) / args.problem.heads;
  const int h = static_cast<int>((there ? index : 0) % args.problem.heads);
  const int b = static_cast<int>(position / args.q_rows);
  const int64_t t = position % args.q_rows;

  // Load and sum.
  const T* const dout = rows_of<const T>(args.dout, b, t, h);
  const T* const out = rows_of<const T>(args.out, b, t, h);
  // Products of 16-bit numbers are exact, and with this sum delta is, too, but for one rounding: dP
  // - delta, of which whole rows are to be 0, is left with the tensor cores' rounding only.
  double sum = 0;
  for (int i = lane * 8; there && i < args.problem.value_dim; i += lanes * 8) {
    float x[8], y[8];
    load_constant<8>(dout + i).unpack(x);
    load_constant<8>(out + i).unpack(y);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += x[j] * y[j];
  }
  for (int apart = lanes / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(kFullWarp, sum, apart);

  // Write.
  if (!there || lane != 0) return;
  if (args.dlse.data) sum -= *rows_of<const float>(args.dlse, b, t, h);
  *rows_of<float>(args.delta, b, t, h) = static_cast<float>(sum);
}

// dsink = -sum of exp(sink - lse) * delta over the rows of a head, in the same order every time.
__global__ void __launch_bounds__(kThreads)
    attention_bwd_dsink_kernel(const __grid_constant__ AttentionBwd args, int64_t positions) {
  const int h = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const float sink = args.problem.sink[h * args.problem.sink_head];
  float sum = 0;
  for (int64_t i = thread; i < positions; i += kThreads) {
    const int b = static_cast<int>(i / args.q_rows);
    const float lse = *rows_of<const float>(args.lse, b, i % args.q_rows, h);
    const float delta = *rows_of<const float>(args.delta, b, i % args.q_rows, h);
    sum -= exp2_fast((sink - lse) * kLog2e) * delta;
  }
  struct Sums {
    float of_thread[kThreads];
  };
  float (&sums)[kThreads] = shared_memory<Sums>().of_thread;
  sums[thread] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) sums[thread] += sums[thread + half];
  }
  if (thread == 0) args.dsink[h] = sums[0];
}

int64_t positions(const AttentionBwd& args) {
  return args.problem.cu_q ? args.q_rows : int64_t{args.problem.batch} * args.q_rows;
}

}  // namespace

void attention_delta(const AttentionBwd& args, DType dtype, uintptr_t stream) {
  int lanes = 1;
  while (lanes < kWarp && lanes * 8 < args.problem.value_dim) lanes *= 2;
  const int64_t rows = positions(args) * args.problem.heads;
  const int64_t blocks = (rows + kThreads / lanes - 1) / (kThreads / lanes);
  CEG_CHECK(blocks <= INT32_MAX, "lse must have at most 2^31 - 1 blocks of rows, got ", blocks);
  launch({"attention_bwd_delta_kernel", static_cast<unsigned>(blocks), kThreads, 0, stream},
         dtype == DType::bf16 ? attention_bwd_delta_kernel<bf16> : attention_bwd_delta_kernel<f16>,
         args, lanes, rows);
}

void attention_dsink(const AttentionBwd& args, uintptr_t stream) {
  launch({"attention_bwd_dsink_kernel", static_cast<unsigned>(args.problem.heads), kThreads, 0,
          stream},
         attention_bwd_dsink_kernel, args, positions(args));
}

void list_attention_bwd_rows(Kernels& kernels) {
  const auto list = [&](const char* name, const void* address) {
    kernels.push_back({name, address, kThreads});
  };
  list("attention_bwd_delta_kernel bf16",
       reinterpret_cast<const void*>(attention_bwd_delta_kernel<bf16>));
  list("attention_bwd_delta_kernel f16",
       reinterpret_cast<const void*>(attention_bwd_delta_kernel<f16>));
  list("attention_bwd_dsink_kernel", reinterpret_cast<const void*>(attention_bwd_dsink_kernel));
}

}  // namespace ceg::cuda
