// What the kernels of the attention backward share: from scores to gradients of scores.
#pragma once

#include "attention_tile.h"

namespace ceg::cuda {

// A row that sees nothing has -inf, where +inf makes its probabilities 0 instead of NaN.
__device__ __forceinline__ float finite_or_blind(float lse) { return lse == -kInf ? kInf : lse; }

// Scores s become probabilities, dp (dout.v) gradients of scores: p (dp - delta). `statistics(m, n,
// i)` are lse and delta of an element's query. A warp's rows start at first_row, columns at
// first_column.
template <bool kPlain, int kRows, int kBlocks, class Statistics>
__device__ __forceinline__ void differentiate(float (&s)[kRows][kBlocks][4],
                                              float (&dp)[kRows][kBlocks][4],
                                              const Meeting& meeting, int first_row,
                                              int first_column, bool masked, const Attention& p,
                                              const Logit& logit, const Statistics& statistics) {
  const int lane = thread_index() % kWarp;
  // Columns outermost: of the statistics that change with them, few are held at a time.
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int column = first_column + column_of(lane, n, j);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
#pragma unroll
        for (int i = j; i < 4; i += 2) {
          const int beside = first_row + row_of(lane, m, i) + meeting.offset;
          const float2 lse_delta = statistics(m, n, i);
          // The difference is rounded, not the logit: in base 2 a large lse would be, too.
          float tanh = 0, exponent;
          if constexpr (kPlain) {
            exponent = fmaf(s[m][n][i], p.scale, -lse_delta.x);
          } else {
            exponent = logit.of(s[m][n][i], column - beside, tanh) - lse_delta.x;
          }
          float weight = exp2_fast(exponent * kLog2e);
          if (masked) {
            const int low = beside - meeting.before;
            const int stop = least(beside + meeting.after + 1, meeting.count);
            if (column < low || column >= stop) weight = 0;
          }
          s[m][n][i] = weight;
          dp[m][n][i] = weight * (dp[m][n][i] - lse_delta.y);
          if constexpr (!kPlain) dp[m][n][i] *= 1 - tanh * tanh;
        }
      }
    }
  }
}

// A row of dS sums to 0 and a rounded one does not: in dQ, what all keys have in common would come
// back times the difference. So one key is given what rounding has lost of each row.
template <class T, int kRows, int kBlocks>
__device__ __forceinline__ void add_lost(float (&lost)[kRows][2],
                                         const float (&exact)[kRows][kBlocks][4],
                                         const uint32_t (&rounded)[kRows][kBlocks / 2][4]) {
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 kept = unpack<T>(rounded[m][n / 2][n % 2 * 2 + half]);
        lost[m][half] += (exact[m][n][2 * half] - kept.x) + (exact[m][n][2 * half + 1] - kept.y);
      }
    }
  }
}

// As an operand with 16 keys, of which it is the first.
template <class T, int kRows>
__device__ __forceinline__ void to_operand_of_one(uint32_t (&operand)[kRows][1][4],
                                                  const float (&lost)[kRows][2]) {
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    operand[m][0][2] = operand[m][0][3] = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float all = lost[m][half];
      all += __shfl_xor_sync(kFullWarp, all, 1);
      all += __shfl_xor_sync(kFullWarp, all, 2);
      operand[m][0][half] = thread_index() % 4 == 0 ? pack<T>(all, 0) : 0;
    }
  }
}

}  // namespace ceg::cuda
