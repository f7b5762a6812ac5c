// The module: one line per launcher, no logic.
#include <pybind11/stl.h>

#include "build_info.h"
#include "cpu/attention.h"
#include "cpu/isa.h"
#include "cpu/moe.h"
#include "cpu/rms_norm.h"
#include "cpu/roofs.h"
#include "cpu/rope.h"
#include "python_tensor.h"
#ifdef CEG_HAS_CUDA
#include "cuda/bindings.h"
#include "cuda/device.h"
#include "cuda/kernels.h"
#endif

namespace py = pybind11;
using py::arg;
using namespace ceg;

namespace {

py::dict build_info_dict() {
  const BuildInfo info = build_info();
  return py::dict(arg("compiler") = info.compiler, arg("source_hash") = info.source_hash,
                  arg("cuda_archs") = info.cuda_archs, arg("cuda_why_not") = info.cuda_why_not);
}

py::dict isa_levels() {
  return py::dict(arg("built") = built_isa_levels(), arg("available") = available_isa_levels(),
                  arg("default") = default_isa_level());
}

py::object cuda_device_list() {
#ifdef CEG_HAS_CUDA
  py::list devices;
  for (const CudaDevice& d : cuda_devices()) {
    devices.append(py::dict(
        arg("name") = d.name, arg("capability") = py::make_tuple(d.major, d.minor),
        arg("multiprocessors") = d.multiprocessors, arg("memory_bytes") = d.memory_bytes,
        arg("driver_version") = d.driver_version, arg("runtime_version") = d.runtime_version));
  }
  return devices;
#else
  return py::none();
#endif
}

#ifdef CEG_HAS_CUDA
py::list kernel_attributes_list() {
  py::list kernels;
  for (const cuda::KernelAttributes& k : cuda::kernel_attributes()) {
    kernels.append(py::dict(arg("kernel") = k.name, arg("registers") = k.registers,
                            arg("threads") = k.threads, arg("spill_bytes") = k.spill_bytes,
                            arg("shared_bytes") = k.shared_bytes,
                            arg("blocks_per_multiprocessor") = k.blocks_per_multiprocessor,
                            arg("occupancy") = k.occupancy, arg("binary_arch") = k.binary_arch));
  }
  return kernels;
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  using release_gil = py::call_guard<py::gil_scoped_release>;
  m.doc() = "CPU launchers on arrays of NumPy, torch or anything else that speaks DLPack";

  m.def("build_info", build_info_dict);
  m.def("kernel_hashes", kernel_hashes);
  m.def("isa_levels", isa_levels);
  m.def("cuda_devices", cuda_device_list);
#ifdef CEG_HAS_CUDA
  py::module_ on_gpu = m.def_submodule("cuda", "launchers on arrays of a GPU");
  cuda::bind_launchers(on_gpu);
  on_gpu.def("kernel_attributes", kernel_attributes_list);
#endif

  m.def("fma_flops", fma_flops, release_gil(), arg("dtype"), arg("threads") = 0,
        arg("seconds") = 0.2, arg("isa") = "");
  m.def("copy_bandwidth", copy_bandwidth, release_gil(), arg("bytes"), arg("threads") = 0,
        arg("seconds") = 0.2, arg("isa") = "");

  m.def("attention_fwd", attention_fwd, release_gil(), arg("q"), arg("k"), arg("v"),
        arg("cu_seqlens_q"), arg("cu_seqlens_k"), arg("max_seqlen_q"), arg("max_seqlen_k"),
        arg("alibi_slopes"), arg("sink"), arg("out"), arg("lse"), arg("softmax_scale"),
        arg("causal") = false, arg("window_left") = -1, arg("window_right") = -1,
        arg("softcap") = 0.0, arg("threads") = 0, arg("isa") = "");
  m.def("attention_bwd", attention_bwd, release_gil(), arg("dout"), arg("dlse"), arg("q"), arg("k"),
        arg("v"), arg("out"), arg("lse"), arg("cu_seqlens_q"), arg("cu_seqlens_k"),
        arg("max_seqlen_q"), arg("max_seqlen_k"), arg("alibi_slopes"), arg("sink"), arg("dq"),
        arg("dk"), arg("dv"), arg("dsink"), arg("softmax_scale"), arg("causal") = false,
        arg("window_left") = -1, arg("window_right") = -1, arg("softcap") = 0.0, arg("threads") = 0,
        arg("isa") = "");

  m.def("rms_norm_fwd", rms_norm_fwd, release_gil(), arg("x"), arg("weight"), arg("residual"),
        arg("y"), arg("residual_out"), arg("rstd"), arg("eps"), arg("weight_offset") = 0.0,
        arg("threads") = 0, arg("isa") = "");
  m.def("rms_norm_bwd", rms_norm_bwd, release_gil(), arg("dy"), arg("dh"), arg("h"), arg("weight"),
        arg("rstd"), arg("dx"), arg("dweight"), arg("weight_offset") = 0.0, arg("threads") = 0,
        arg("isa") = "");
  m.def("rope", rope, release_gil(), arg("q"), arg("k"), arg("cos"), arg("sin"), arg("positions"),
        arg("q_out"), arg("k_out"), arg("interleaved") = false, arg("inverse") = false,
        arg("threads") = 0, arg("isa") = "");

  m.def("moe_route", moe_route, release_gil(), arg("logits"), arg("bias"), arg("weights"),
        arg("expert_ids"), arg("tokens_per_expert"), arg("score"), arg("renormalize"),
        arg("threads") = 0, arg("isa") = "");
  m.def("moe_route_bwd", moe_route_bwd, release_gil(), arg("dweights"), arg("logits"),
        arg("expert_ids"), arg("dlogits"), arg("score"), arg("renormalize"), arg("threads") = 0,
        arg("isa") = "");
  m.def("moe_index", moe_index, release_gil(), arg("expert_ids"), arg("slots"), arg("sources"),
        arg("offsets"), arg("capacity") = -1, arg("threads") = 0, arg("isa") = "");
  m.def("moe_dispatch", moe_dispatch, release_gil(), arg("x"), arg("sources"), arg("top_k"),
        arg("out"), arg("threads") = 0, arg("isa") = "");
  m.def("moe_combine", moe_combine, release_gil(), arg("y"), arg("slots"), arg("weights"),
        arg("out"), arg("threads") = 0, arg("isa") = "");
  m.def("moe_combine_bwd", moe_combine_bwd, release_gil(), arg("dout"), arg("y"), arg("sources"),
        arg("slots"), arg("weights"), arg("dy"), arg("dweights"), arg("threads") = 0,
        arg("isa") = "");
}
