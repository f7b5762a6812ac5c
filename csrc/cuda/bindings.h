// The CUDA launchers as Python sees them, in _C and, for tests without a GPU, in _sim.
#pragma once

#include <pybind11/stl.h>

#include "../python_tensor.h"
#include "attention.h"

namespace ceg {

inline void bind_cuda_launchers(pybind11::module_& m) {
  using pybind11::arg;
  using release_gil = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("cuda_attention_fwd", cuda_attention_fwd, release_gil(), arg("q"), arg("k"), arg("v"),
        arg("cu_seqlens_q"), arg("cu_seqlens_k"), arg("max_seqlen_q"), arg("max_seqlen_k"),
        arg("alibi_slopes"), arg("sink"), arg("out"), arg("lse"), arg("softmax_scale"),
        arg("causal"), arg("window_left"), arg("window_right"), arg("softcap"), arg("stream") = 0);
}

}  // namespace ceg
