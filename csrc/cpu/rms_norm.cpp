#include "rms_norm.h"

#include "../check.h"
#include "isa.h"
#include "kernels.h"

namespace ceg {
namespace {

// A vector in compute type that is contiguous.
void check_vector(const char* name, const Tensor& t, int64_t size, DType dtype) {
  check_shape(name, t, {size});
  check_dtype(name, t, {dtype});
  check_rows(name, t);
}

}  // namespace

void rms_norm_fwd(const Tensor& x, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& residual, const Tensor& y,
                  const std::optional<Tensor>& residual_out, const Tensor& rstd, double eps,
                  double weight_offset, int threads, const std::string& isa) {
  check_shape("x", x, {-1, -1});
  check_float("x", x);
  check_rows("x", x);
  const DType compute = compute_type(x.dtype);
  if (weight) check_vector("weight", *weight, x.shape[1], compute);
  if (residual) check_like("residual", *residual, x);
  CEG_CHECK(!residual_out || residual, "residual_out needs residual, got None");
  check_like("y", y, x);
  check_output("y", y);
  if (residual_out) {
    check_like("residual_out", *residual_out, x);
    check_output("residual_out", *residual_out);
  }
  check_vector("rstd", rstd, x.shape[0], compute);
  check_output("rstd", rstd);
  const Kernels& table = kernels(isa);
  if (x.numel() == 0) return;
  table.rms_norm_fwd({.x = x,
                      .weight = weight,
                      .residual = residual,
                      .y = y,
                      .residual_out = residual_out,
                      .rstd = rstd,
                      .eps = eps,
                      .weight_offset = weight_offset,
                      .threads = threads_for(x, threads)});
}

void rms_norm_bwd(const Tensor& dy, const std::optional<Tensor>& dh, const Tensor& h,
                  const std::optional<Tensor>& weight, const Tensor& rstd, const Tensor& dx,
                  const std::optional<Tensor>& dweight, double weight_offset, int threads,
                  const std::string& isa) {
  check_shape("h", h, {-1, -1});
  check_float("h", h);
  check_rows("h", h);
  const DType compute = compute_type(h.dtype);
  check_like("dy", dy, h);
  if (dh) check_like("dh", *dh, h);
  if (weight) check_vector("weight", *weight, h.shape[1], compute);
  check_vector("rstd", rstd, h.shape[0], compute);
  check_like("dx", dx, h);
  check_output("dx", dx);
  if (dweight) {
    check_vector("dweight", *dweight, h.shape[1], compute);
    check_output("dweight", *dweight);
  }
  kernels(isa).rms_norm_bwd({.dy = dy,
                             .dh = dh,
                             .h = h,
                             .weight = weight,
                             .rstd = rstd,
                             .dx = dx,
                             .dweight = dweight,
                             .weight_offset = weight_offset,
                             .threads = threads_for(h, threads)});
}

}  // namespace ceg
