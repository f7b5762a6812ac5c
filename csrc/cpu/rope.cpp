#include "rope.h"

#include "../check.h"
#include "isa.h"
#include "kernels.h"

namespace ceg {

void rope(const Tensor& q, const std::optional<Tensor>& k, const Tensor& cos, const Tensor& sin,
          const std::optional<Tensor>& positions, const Tensor& q_out,
          const std::optional<Tensor>& k_out, bool interleaved, bool inverse, int threads,
          const std::string& isa) {
  check_shape("q", q, {-1, -1, -1, -1});
  check_float("q", q);
  check_rows("q", q);
  check_like("q_out", q_out, q);
  check_output("q_out", q_out);
  CEG_CHECK(k.has_value() == k_out.has_value(), "k_out must come with k, got ",
            k ? "k alone" : "k_out alone");
  if (k) {
    check_shape("k", *k, {q.shape[0], q.shape[1], -1, q.shape[3]});
    check_dtype("k", *k, {q.dtype});
    check_rows("k", *k);
    check_like("k_out", *k_out, *k);
    check_output("k_out", *k_out);
  }

  check_shape("cos", cos, {-1, -1});
  check_dtype("cos", cos, {compute_type(q.dtype)});
  check_rows("cos", cos);
  check_like("sin", sin, cos);
  CEG_CHECK(2 * cos.shape[1] <= q.shape[3], "cos must have at most head_dim / 2 = ", q.shape[3] / 2,
            " columns, got ", cos.shape[1]);
  if (positions) {
    check_shape("positions", *positions, {q.shape[0], q.shape[1]});
    check_dtype("positions", *positions, {DType::i32, DType::i64});
    check_rows("positions", *positions);
    check_range("positions", *positions, 0, cos.shape[0]);
  } else {
    CEG_CHECK(cos.shape[0] >= q.shape[1], "cos must have a row for each of the ", q.shape[1],
              " positions, got ", cos.shape[0]);
  }

  const Kernels& table = kernels(isa);
  if (q.numel() == 0 && (!k || k->numel() == 0)) return;
  table.rope({.q = q,
              .k = k,
              .cos = cos,
              .sin = sin,
              .positions = positions,
              .q_out = q_out,
              .k_out = k_out,
              .interleaved = interleaved,
              .inverse = inverse,
              .threads = threads_for(q, threads)});
}

}  // namespace ceg
