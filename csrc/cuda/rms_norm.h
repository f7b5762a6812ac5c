// RMSNorm over rows: x, y, residual, h, dy, dh, dx are (R, D); weight, dweight (D,); rstd (R,).
#pragma once

#include <optional>

#include "../tensor.h"

namespace ceg::cuda {

// h = x + residual; y = h * rstd * (weight + weight_offset); residual_out = h.
// weight in the dtype of x or fp32; rstd fp32.
void rms_norm_fwd(const Tensor& x, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& residual, const Tensor& y,
                  const std::optional<Tensor>& residual_out, const Tensor& rstd, double eps,
                  double weight_offset, uintptr_t stream);

// Gradients of y and, where it was asked for, of the sum h. dweight has weight's dtype and comes
// with partials: (rms_norm_bwd_rows(h), D) in fp32, whose contents are left undefined.
void rms_norm_bwd(const Tensor& dy, const std::optional<Tensor>& dh, const Tensor& h,
                  const std::optional<Tensor>& weight, const Tensor& rstd, const Tensor& dx,
                  const std::optional<Tensor>& dweight, const std::optional<Tensor>& partials,
                  double weight_offset, uintptr_t stream);

int64_t rms_norm_bwd_rows(const Tensor& h);

}  // namespace ceg::cuda
