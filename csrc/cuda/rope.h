// Rotary position embedding of q and k in one launch.
#pragma once

#include <optional>

#include "../tensor.h"

namespace ceg::cuda {

// q: (B, T, H, D), k: (B, T, Hk, D); cos, sin: (table length, R / 2) in fp32 with R <= D;
// positions: (B, T), int32 or int64, else 0..T-1. Pairs are (i, i + R / 2), interleaved (2i, 2i +
// 1); inverse turns by the negative angle: the backward. Elements from R on are copied. A position
// that the table has not gives NaN. q_out may be q, and k_out may be k.
void rope(const Tensor& q, const std::optional<Tensor>& k, const Tensor& cos, const Tensor& sin,
          const std::optional<Tensor>& positions, const Tensor& q_out,
          const std::optional<Tensor>& k_out, bool interleaved, bool inverse, uintptr_t stream);

}  // namespace ceg::cuda
