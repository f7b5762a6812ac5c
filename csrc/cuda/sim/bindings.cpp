// The module _sim, with AddressSanitizer in the file _sim_asan: the CUDA launchers of _C, run by
// the simulator on arrays of the CPU.
#include "../bindings.h"

#include "../attention_split.h"
#include "../wgmma.h"
#include "block.h"
#include "layouts.h"
#include "selftest.h"

namespace py = pybind11;
using py::arg;

namespace {

void set_device(int multiprocessors, size_t shared_limit, const std::string& order,
                int capability) {
  using ceg::sim::Order;
  const Order orders[] = {Order::forward, Order::reverse, Order::shuffled};
  const char* names[] = {"forward", "reverse", "shuffled"};
  for (int i = 0; i < 3; ++i) {
    if (order != names[i]) continue;
    ceg::sim::device() = {multiprocessors, shared_limit, orders[i], capability};
    return;
  }
  throw py::value_error("order must be forward, reverse or shuffled, got " + order);
}

}  // namespace

PYBIND11_MODULE(_sim, m) {
  const ceg::sim::Device standard;
  m.def("set_device", set_device, arg("multiprocessors") = standard.multiprocessors,
        arg("shared_limit") = standard.shared_limit, arg("order") = "forward",
        arg("capability") = standard.capability);
  m.def("launched", ceg::sim::launched);
  m.def("selftest", ceg::sim::selftest, arg("kernel"), arg("out"), arg("shared_bytes") = 0);
  m.def("selftest_sm90", ceg::sim::selftest_sm90, arg("fault"), arg("x"), arg("out"));
  m.def("through_16_bits", ceg::sim::through_16_bits, arg("value"), arg("type"));
  m.def("fragment", ceg::sim::fragment, arg("operand"), arg("lane"));
  m.def("swizzle_offset", ceg::sim::swizzle_offset, arg("columns"), arg("row"), arg("chunk"));
  m.def("swizzle_moved", ceg::sim::swizzle_moved, arg("columns"), arg("start"), arg("rows"),
        arg("chunks"));
  m.def("panels_offset", ceg::sim::panels_offset, arg("rows"), arg("columns"), arg("row"),
        arg("chunk"));
  m.def("matrix_descriptor", ceg::matrix_descriptor, arg("start"), arg("leading"), arg("stride"));
  m.def("operand_address", ceg::sim::operand_address, arg("rows"), arg("columns"), arg("start"),
        arg("dense_in_k"), arg("step"), arg("mn"), arg("k"));
  m.def("partners", ceg::sim::partners, arg("first"), arg("last"), arg("offset"), arg("before"),
        arg("after"), arg("count"));
  m.def("ring", ceg::sim::ring, arg("stages"), arg("steps"));
  m.def("section_of", ceg::cuda::section_of, arg("heads"), arg("bytes"));
  m.def("dealt_tile", ceg::cuda::dealt_tile, arg("split"), arg("turn"), arg("splits"));
  m.def("last_dealt_tile", ceg::cuda::last_dealt_tile, arg("split"), arg("tiles"), arg("splits"));
  m.def("splits_of", ceg::cuda::splits_of, arg("heads"), arg("tiles"), arg("multiprocessors"));
  m.def("places", ceg::sim::places, arg("tiles"), arg("heads"), arg("section"),
        arg("last_tile_first"));
  m.def("is_decoding", ceg::cuda::is_decoding, arg("max_q"), arg("group"));
  m.def("most_seen", ceg::cuda::most_seen, arg("max_q"), arg("max_k"), arg("left"));
  m.def("split_of", ceg::sim::split_of, arg("rows"), arg("heads"), arg("keys"),
        arg("multiprocessors"));
  m.def("split_places", ceg::sim::split_places, arg("tiles"), arg("chunks"), arg("heads"));
  m.def("split_keys", ceg::sim::split_keys, arg("chunks"), arg("keys"), arg("first_seen"),
        arg("n_k"));
  ceg::cuda::bind_launchers(m);
}
