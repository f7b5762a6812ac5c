// The softmax of the attention forward: masks, and the running maximum and sum of each row (Milakov
// and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135).
#pragma once

#include "attention_tile.h"

namespace ceg::cuda {

// A row's factor for acc and its natural log-sum-exp, which the sink joins as one more logit. `top`
// as OnlineSoftmax<kFused> keeps it.
template <bool kFused>
__device__ __forceinline__ void finish_row(float top, float sum, const Attention& p,
                                           const float* sink, float& factor, float& lse) {
  const bool blind = sum == 0;
  // Two terms for the way back to base e: one would lose half a digit of a large maximum.
  const ToNatural to_natural = kFused ? p.of_log2 : p.of_score;
  const float rest = fmaf(top, to_natural.low, kLn2 * log2f(sum));
  lse = blind ? -kInf : fmaf(top, to_natural.high, rest);
  factor = 1 / (blind ? 1 : sum);
  if (sink) {
    const float now = fmaxf(lse, *sink), base = now == -kInf ? 0 : now;
    const float own = exp2_fast((lse - base) * kLog2e);
    const float all = own + exp2_fast((*sink - base) * kLog2e);
    lse = all == 0 ? -kInf : fmaf(kLn2, log2f(all), base);
    factor *= own / (all == 0 ? 1 : all);
  }
}

// Online softmax of a warp's rows. kFused: one fma turns a score into its exponent, from a maximum
// that is kept times to_log2 and rounded. Where logits are in the thousands that leaves exp(0) off
// by 3e-4: too little for bf16 to see, one in the last place of fp16.
template <bool kFused, int kRows, int kBlocks>
struct OnlineSoftmax {
  float top[kRows][2], total[kRows][2];  // total: of this lane's columns

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < kRows; ++m) top[m][0] = top[m][1] = -kInf, total[m][0] = total[m][1] = 0;
  }

  // A row's scores become probabilities relative to the new maximum; what came before is worth the
  // result times as much.
  __device__ __forceinline__ float step(int m, int h, float (&s)[kRows][kBlocks][4],
                                        float to_log2) {
    float now = -kInf;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      now = fmaxf(now, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
    }
    now = fmaxf(now, __shfl_xor_sync(kFullWarp, now, 1));
    now = fmaxf(now, __shfl_xor_sync(kFullWarp, now, 2));
    now = fmaxf(top[m][h], kFused ? now * to_log2 : now);
    // Nothing visible yet: any finite number keeps exp2(-inf - base) at 0 instead of NaN.
    const float base = now == -kInf ? 0 : now;
    // Of maxima as they are kept, so that it is exactly 1 where the maximum stays.
    const float fall = top[m][h] - base;
    const float rescale = exp2_fast(kFused ? fall : fall * to_log2);
    top[m][h] = now;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int i = 2 * h; i < 2 * h + 2; ++i) {
        const float x = s[m][n][i];
        s[m][n][i] = exp2_fast(kFused ? fmaf(x, to_log2, -base) : (x - base) * to_log2);
        sum += s[m][n][i];
      }
    }
    total[m][h] = fmaf(total[m][h], rescale, sum);
    return rescale;
  }

  // All rows, and acc is rescaled.
  template <int kColumns>
  __device__ __forceinline__ void step(float (&s)[kRows][kBlocks][4],
                                       float (&acc)[kRows][kColumns][4], float to_log2) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float rescale = step(m, h, s, to_log2);
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          acc[m][n][2 * h] *= rescale;
          acc[m][n][2 * h + 1] *= rescale;
        }
      }
    }
  }

  // Of a row of this quad of lanes.
  __device__ __forceinline__ float total_of_quad(int m, int h) const {
    float sum = total[m][h];
    sum += __shfl_xor_sync(kFullWarp, sum, 1);
    sum += __shfl_xor_sync(kFullWarp, sum, 2);
    return sum;
  }

  __device__ __forceinline__ void finish(int m, int h, const Attention& p, const float* sink,
                                         float& factor, float& lse) {
    finish_row<kFused>(top[m][h], total_of_quad(m, h), p, sink, factor, lse);
  }
};

// Columns are keys from `first_key` on; beside the first row stands key `first_beside`.
template <bool kPlain, int kRows, int kBlocks>
__device__ __forceinline__ void mask(float (&s)[kRows][kBlocks][4], int first_beside, int first_key,
                                     int n_k, int left, int right, bool masked,
                                     const Logit& logit) {
  const int lane = thread_index() % kWarp;
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int beside = first_beside + row_of(lane, m, i);
      const int low = beside - left;
      const auto width = static_cast<unsigned>(most(least(beside + right + 1, n_k) - low, 0));
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        const int key = first_key + column_of(lane, n, i);
        float tanh;
        if constexpr (!kPlain) s[m][n][i] = logit.of(s[m][n][i], key - beside, tanh);
        if (masked && static_cast<unsigned>(key - low) >= width) s[m][n][i] = -kInf;
      }
    }
  }
}

}  // namespace ceg::cuda
