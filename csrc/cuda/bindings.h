// The CUDA launchers as Python sees them, in _C.cuda and, for tests without a GPU, in _sim: those
// of the CPU with a stream instead of threads and isa. One line per launcher, no logic.
#pragma once

#include <pybind11/stl.h>

#include "../python_tensor.h"
#include "attention.h"
#include "moe.h"
#include "rms_norm.h"
#include "roofs.h"
#include "rope.h"

namespace ceg::cuda {

inline void bind_launchers(pybind11::module_& m) {
  using pybind11::arg;
  using release_gil = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("attention_fwd", attention_fwd, release_gil(), arg("q"), arg("k"), arg("v"),
        arg("cu_seqlens_q"), arg("cu_seqlens_k"), arg("max_seqlen_q"), arg("max_seqlen_k"),
        arg("alibi_slopes"), arg("sink"), arg("out"), arg("lse"), arg("parts"),
        arg("softmax_scale"), arg("causal") = false, arg("window_left") = -1,
        arg("window_right") = -1, arg("softcap") = 0.0, arg("stream") = 0);
  m.def("attention_fwd_rows", attention_fwd_rows, arg("q"), arg("k"), arg("v"), arg("cu_seqlens_q"),
        arg("cu_seqlens_k"), arg("max_seqlen_q"), arg("max_seqlen_k"), arg("window_left") = -1);
  m.def("attention_fwd_sm90_why_not", attention_fwd_sm90_why_not, arg("q"), arg("k"), arg("v"),
        arg("cu_seqlens_q"), arg("cu_seqlens_k"), arg("max_seqlen_q"), arg("max_seqlen_k"));
  m.def("attention_bwd", attention_bwd, release_gil(), arg("dout"), arg("dlse"), arg("q"), arg("k"),
        arg("v"), arg("out"), arg("lse"), arg("cu_seqlens_q"), arg("cu_seqlens_k"),
        arg("max_seqlen_q"), arg("max_seqlen_k"), arg("alibi_slopes"), arg("sink"), arg("dq"),
        arg("dk"), arg("dv"), arg("dsink"), arg("delta"), arg("sums"), arg("softmax_scale"),
        arg("causal") = false, arg("window_left") = -1, arg("window_right") = -1,
        arg("softcap") = 0.0, arg("stream") = 0);
  m.def("attention_bwd_rows", attention_bwd_rows, arg("dout"), arg("q"), arg("k"), arg("v"),
        arg("cu_seqlens_q"), arg("cu_seqlens_k"), arg("max_seqlen_q"), arg("max_seqlen_k"));
  m.def("attention_bwd_one_pass_why_not", attention_bwd_one_pass_why_not, arg("dout"), arg("q"),
        arg("k"), arg("v"), arg("cu_seqlens_q"), arg("cu_seqlens_k"), arg("max_seqlen_q"),
        arg("max_seqlen_k"));
  m.def("attention_bwd_sm90_why_not", attention_bwd_sm90_why_not, arg("dout"), arg("q"), arg("k"),
        arg("v"), arg("cu_seqlens_q"), arg("cu_seqlens_k"), arg("max_seqlen_q"),
        arg("max_seqlen_k"));
  m.def("rms_norm_fwd", rms_norm_fwd, release_gil(), arg("x"), arg("weight"), arg("residual"),
        arg("y"), arg("residual_out"), arg("rstd"), arg("eps"), arg("weight_offset") = 0.0,
        arg("stream") = 0);
  m.def("rms_norm_bwd", rms_norm_bwd, release_gil(), arg("dy"), arg("dh"), arg("h"), arg("weight"),
        arg("rstd"), arg("dx"), arg("dweight"), arg("partials"), arg("weight_offset") = 0.0,
        arg("stream") = 0);
  m.def("rms_norm_bwd_rows", rms_norm_bwd_rows, arg("h"));
  m.def("rope", rope, release_gil(), arg("q"), arg("k"), arg("cos"), arg("sin"), arg("positions"),
        arg("q_out"), arg("k_out"), arg("interleaved") = false, arg("inverse") = false,
        arg("stream") = 0);

  m.def("moe_route", moe_route, release_gil(), arg("logits"), arg("bias"), arg("weights"),
        arg("expert_ids"), arg("tokens_per_expert"), arg("score"), arg("renormalize"),
        arg("stream") = 0);
  m.def("moe_route_bwd", moe_route_bwd, release_gil(), arg("dweights"), arg("logits"),
        arg("expert_ids"), arg("dlogits"), arg("score"), arg("renormalize"), arg("stream") = 0);
  m.def("moe_index", moe_index, release_gil(), arg("expert_ids"), arg("slots"), arg("sources"),
        arg("offsets"), arg("counts"), arg("capacity") = -1, arg("stream") = 0);
  m.def("moe_index_rows", moe_index_rows, arg("expert_ids"));
  m.def("moe_dispatch", moe_dispatch, release_gil(), arg("x"), arg("sources"), arg("top_k"),
        arg("out"), arg("stream") = 0);
  m.def("moe_combine", moe_combine, release_gil(), arg("y"), arg("slots"), arg("weights"),
        arg("out"), arg("stream") = 0);
  m.def("moe_combine_bwd", moe_combine_bwd, release_gil(), arg("dout"), arg("y"), arg("sources"),
        arg("slots"), arg("weights"), arg("dy"), arg("dweights"), arg("stream") = 0);

  m.def("roofs_copy", roofs_copy, release_gil(), arg("source"), arg("target"), arg("stream") = 0);
  m.def("roofs_fma", roofs_fma, release_gil(), arg("start"), arg("out"), arg("factor"),
        arg("addend"), arg("rounds"), arg("stream") = 0);
  m.def("roofs_mma", roofs_mma, release_gil(), arg("a"), arg("b"), arg("out"), arg("rounds"),
        arg("stream") = 0);
  m.def("roofs_threads", roofs_threads);
}

}  // namespace ceg::cuda
