#include "attention_inputs.h"

#include <algorithm>
#include <cmath>

#include "check.h"

namespace ceg {
namespace {

void check_device(const char* name, const Tensor& t, const Device& where) {
  CEG_CHECK(t.device == where, name, " must be on ", text(where), ", got ", text(t.device));
}

}  // namespace

void AttentionInputs::check(const Device& where, std::initializer_list<DType> dtypes) const {
  const int ndim = varlen() ? 3 : 4;
  CEG_CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(),
            "cu_seqlens_q and cu_seqlens_k must be given together, got only one");
  for (const auto& [name, t] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}}) {
    CEG_CHECK(t->ndim == ndim, name, " must have ", ndim, " dimensions, got shape ",
              shape_text(*t));
    check_rows(name, *t, where);
    check_dtype(name, *t, dtypes);
    CEG_CHECK(t->dtype == q.dtype, name, " must have the dtype of q, ", ceg::name(q.dtype),
              ", got ", ceg::name(t->dtype));
    CEG_CHECK(t->shape[ndim - 1] >= 1 && t->shape[ndim - 1] <= kMaxHeadDim, name,
              " must have head_dim in [1, ", kMaxHeadDim, "], got ", t->shape[ndim - 1]);
  }
  CEG_CHECK(kv_heads() > 0 && heads() % kv_heads() == 0, "k must have a number of heads that ",
            "divides q's ", heads(), ", got ", kv_heads());
  if (varlen()) {
    check_shape("k", k, {-1, -1, head_dim()});
    check_shape("v", v, {k.shape[0], k.shape[1], -1});
    for (const auto& [name, cu] :
         {std::pair{"cu_seqlens_q", &*cu_seqlens_q}, {"cu_seqlens_k", &*cu_seqlens_k}}) {
      CEG_CHECK(cu->ndim == 1 && cu->shape[0] >= 1, name, " must have shape (B + 1,), got ",
                shape_text(*cu));
      check_rows(name, *cu, where);
      check_dtype(name, *cu, {DType::i32});
    }
    check_shape("cu_seqlens_k", *cu_seqlens_k, {cu_seqlens_q->shape[0]});
  } else {
    check_shape("k", k, {q.shape[0], -1, -1, head_dim()});
    check_shape("v", v, {k.shape[0], k.shape[1], k.shape[2], -1});
  }
  CEG_CHECK(std::isfinite(softmax_scale), "softmax_scale must be finite, got ", softmax_scale);
  CEG_CHECK(std::isfinite(softcap) && softcap >= 0, "softcap must be finite and not negative, got ",
            softcap);
  const DType compute = compute_type(q.dtype);
  if (alibi_slopes) {
    if (alibi_slopes->ndim == 2) {
      check_shape("alibi_slopes", *alibi_slopes, {batch(), heads()});
    } else {
      check_shape("alibi_slopes", *alibi_slopes, {heads()});
    }
    check_dtype("alibi_slopes", *alibi_slopes, {compute});
    check_device("alibi_slopes", *alibi_slopes, where);
  }
  if (sink) {
    check_shape("sink", *sink, {heads()});
    check_dtype("sink", *sink, {compute});
    check_device("sink", *sink, where);
  }
}

void AttentionInputs::check_out_like(const char* name, const Tensor& t) const {
  check_dtype(name, t, {q.dtype});
  const int last = q.ndim - 1;
  const bool same = t.ndim == q.ndim && t.shape[last] == value_dim() &&
                    std::equal(t.shape, t.shape + last, q.shape);
  CEG_CHECK(same, name, " must have the shape of q ", shape_text(q), " with the head_dim of v ",
            value_dim(), ", got ", shape_text(t));
  check_rows(name, t, q.device);
}

void AttentionInputs::check_row_stat(const char* name, const Tensor& t) const {
  check_dtype(name, t, {compute_type(q.dtype)});
  check_device(name, t, q.device);
  if (varlen()) {
    check_shape(name, t, {heads(), q.shape[0]});
  } else {
    check_shape(name, t, {q.shape[0], heads(), q.shape[1]});
  }
}

void AttentionInputs::check_gradient(const char* name, const Tensor& t, const char* of_name,
                                     const Tensor& of) const {
  check_dtype(name, t, {of.dtype});
  const bool same = t.ndim == of.ndim && std::equal(t.shape, t.shape + t.ndim, of.shape);
  CEG_CHECK(same, name, " must have the shape of ", of_name, " ", shape_text(of), ", got ",
            shape_text(t));
  check_output(name, t, q.device);
}

}  // namespace ceg
