#include "moe.h"

#include "../check.h"
#include "isa.h"
#include "kernels.h"

namespace ceg {
namespace {

void check_index(const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
                 int64_t end) {
  check_shape(name, t, shape);
  check_dtype(name, t, {DType::i32});
  check_rows(name, t);
  check_range(name, t, -1, end);
}

void check_matrix(const char* name, const Tensor& t) {
  check_shape(name, t, {-1, -1});
  check_float(name, t);
  check_rows(name, t);
}

void check_weights(const char* name, const Tensor& t, const Tensor& slots, const Tensor& rows) {
  check_shape(name, t, {slots.shape[0], slots.shape[1]});
  check_dtype(name, t, {compute_type(rows.dtype)});
  check_rows(name, t);
}

}  // namespace

void moe_dispatch(const Tensor& x, const Tensor& sources, int64_t top_k, const Tensor& out,
                  int threads, const std::string& isa) {
  check_matrix("x", x);
  CEG_CHECK(top_k > 0, "top_k must be positive, got ", top_k);
  check_index("sources", sources, {-1}, x.shape[0] * top_k);
  check_shape("out", out, {sources.shape[0], x.shape[1]});
  check_dtype("out", out, {x.dtype});
  check_output("out", out);
  kernels(isa).moe_dispatch({.x = x,
                             .sources = sources,
                             .top_k = top_k,
                             .out = out,
                             .threads = threads_for(out, threads)});
}

void moe_combine(const Tensor& y, const Tensor& slots, const std::optional<Tensor>& weights,
                 const Tensor& out, int threads, const std::string& isa) {
  check_matrix("y", y);
  check_index("slots", slots, {-1, -1}, y.shape[0]);
  if (weights) check_weights("weights", *weights, slots, y);
  check_shape("out", out, {slots.shape[0], y.shape[1]});
  check_dtype("out", out, {y.dtype});
  check_output("out", out);
  kernels(isa).moe_combine(
      {.y = y, .slots = slots, .weights = weights, .out = out, .threads = threads_for(y, threads)});
}

void moe_combine_bwd(const Tensor& dout, const Tensor& y, const Tensor& sources,
                     const Tensor& slots, const Tensor& weights, const Tensor& dy,
                     const Tensor& dweights, int threads, const std::string& isa) {
  check_matrix("y", y);
  check_index("slots", slots, {-1, -1}, y.shape[0]);
  check_index("sources", sources, {y.shape[0]}, slots.numel());
  check_shape("dout", dout, {slots.shape[0], y.shape[1]});
  check_dtype("dout", dout, {y.dtype});
  check_rows("dout", dout);
  check_weights("weights", weights, slots, y);
  check_like("dy", dy, y);
  check_output("dy", dy);
  check_weights("dweights", dweights, slots, y);
  check_output("dweights", dweights);
  kernels(isa).moe_combine_bwd({.dout = dout,
                                .y = y,
                                .sources = sources,
                                .slots = slots,
                                .weights = weights,
                                .dy = dy,
                                .dweights = dweights,
                                .threads = threads_for(y, threads)});
}

}  // namespace ceg
