// What the kernels of the attention backward share: from scores to gradients of scores.
#pragma once

#include "attention_tile.h"

namespace ceg::cuda {

// A row that sees nothing has -inf, where +inf makes its probabilities 0 instead of NaN.
__device__ __forceinline__ float finite_or_blind(float lse) { return lse == -kInf ? kInf : lse; }

// How the rows of a tile meet the columns: see partners().
struct Meeting {
  int offset, before, after, count;
};

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

}  // namespace ceg::cuda
