// RMSNorm over rows: x, y, residual, h, dy, dh, dx are (R, D); weight, dweight (D,); rstd (R,).
#pragma once

#include <optional>
#include <string>

#include "../tensor.h"

namespace ceg {

struct RmsNormFwdArgs {
  Tensor x;
  std::optional<Tensor> weight, residual;
  Tensor y;
  std::optional<Tensor> residual_out;
  Tensor rstd;
  double eps, weight_offset;
  int threads;
};

struct RmsNormBwdArgs {
  Tensor dy;
  std::optional<Tensor> dh;
  Tensor h;
  std::optional<Tensor> weight;
  Tensor rstd, dx;
  std::optional<Tensor> dweight;
  double weight_offset;
  int threads;
};

// h = x + residual; y = h * rstd * (weight + weight_offset); residual_out = h.
void rms_norm_fwd(const Tensor& x, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& residual, const Tensor& y,
                  const std::optional<Tensor>& residual_out, const Tensor& rstd, double eps,
                  double weight_offset, int threads, const std::string& isa);

// Gradients of y and, where it was asked for, of the sum h.
void rms_norm_bwd(const Tensor& dy, const std::optional<Tensor>& dh, const Tensor& h,
                  const std::optional<Tensor>& weight, const Tensor& rstd, const Tensor& dx,
                  const std::optional<Tensor>& dweight, double weight_offset, int threads,
                  const std::string& isa);

}  // namespace ceg
