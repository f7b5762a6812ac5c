// Rotary position embedding of q and k in one pass.
#pragma once

#include <optional>
#include <string>

#include "../tensor.h"

namespace ceg {

struct RopeArgs {
  Tensor q;                         // (B, T, H, D)
  std::optional<Tensor> k;          // (B, T, Hk, D)
  Tensor cos, sin;                  // (table length, R / 2) with R <= D
  std::optional<Tensor> positions;  // (B, T), int32 or int64
  Tensor q_out;
  std::optional<Tensor> k_out;
  bool interleaved;  // pairs (2i, 2i + 1), else (i, i + R / 2)
  bool inverse;      // by the negative angle: the backward
  int threads;
};

// Elements from R on are copied. q_out may be q, and k_out may be k.
void rope(const Tensor& q, const std::optional<Tensor>& k, const Tensor& cos, const Tensor& sin,
          const std::optional<Tensor>& positions, const Tensor& q_out,
          const std::optional<Tensor>& k_out, bool interleaved, bool inverse, int threads,
          const std::string& isa);

}  // namespace ceg
