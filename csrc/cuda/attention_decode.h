// Parts of a softmax over keys: what a warp or a chunk of keys leaves of a row of output, and what
// several of them are together.
//
// A part is a row of output that is not normalised yet, with (maximum, sum), the maximum as
// OnlineSoftmax keeps it. A sum of 0 says that nothing was visible, and that no output is there.
#pragma once

#include "attention_softmax.h"
#include "attention_split.h"
#include "vector.h"

namespace ceg::cuda {

struct AttentionDecode {
  AttentionFwd fwd;
  Split split;
  // The chunks' parts, [chunks][rows], or null where there is one chunk. A row is a position times
  // the heads plus a head, as out has them.
  float* outs;  // Dv each
  float2* stats;
  int64_t rows;  // of all positions and heads
};

// Eight columns of a row, of several parts together.
struct Merged {
  float top, total, out[8];
};

// In the order of the parts; they lie so many items apart.
template <bool kFused>
__device__ __forceinline__ Merged merge(const float* outs, int64_t outs_apart, const float2* stats,
                                        int64_t stats_apart, int parts, float to_log2) {
  Merged m = {-kInf, 0, {}};
#pragma unroll 4
  for (int i = 0; i < parts; ++i) m.top = fmaxf(m.top, stats[i * stats_apart].x);
  const float base = m.top == -kInf ? 0 : m.top;
#pragma unroll 4
  for (int i = 0; i < parts; ++i) {
    const float2 of_part = stats[i * stats_apart];
    // Nothing visible, nothing written.
    const bool some = of_part.y != 0;
    const auto* const from = reinterpret_cast<const float4*>(outs + i * outs_apart);
    const float4 zero = make_float4(0, 0, 0, 0);
    const float4 low = some ? from[0] : zero, high = some ? from[1] : zero;
    const float fall = of_part.x - base;
    const float weight = exp2_fast(kFused ? fall : fall * to_log2);
    m.total = fmaf(of_part.y, weight, m.total);
    const float out[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int j = 0; j < 8; ++j) m.out[j] = fmaf(out[j], weight, m.out[j]);
  }
  return m;
}

// Normalised, into out and lse.
template <class T>
__device__ __forceinline__ void write(const AttentionFwd& args, int b, int64_t t, int h, int column,
                                      Merged& m) {
  const Attention& p = args.problem;
  float factor, lse;
  finish_row<std::is_same_v<T, bf16>>(m.top, m.total, p,
                                      p.sink ? p.sink + h * p.sink_head : nullptr, factor, lse);
#pragma unroll
  for (int j = 0; j < 8; ++j) m.out[j] *= factor;
  store<8>(rows_of<T>(args.out, b, t, h) + column, m.out);
  if (column == 0) *rows_of<float>(args.lse, b, t, h) = lse;
}

}  // namespace ceg::cuda
