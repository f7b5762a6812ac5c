// The module _sim: the CUDA launchers of _C, run by the simulator on arrays of the CPU.
#include "../bindings.h"

#include "block.h"
#include "selftest.h"

namespace py = pybind11;
using py::arg;

namespace {

void set_device(int multiprocessors, size_t shared_limit, const std::string& order) {
  using ceg::sim::Order;
  const Order orders[] = {Order::forward, Order::reverse, Order::shuffled};
  const char* names[] = {"forward", "reverse", "shuffled"};
  for (int i = 0; i < 3; ++i) {
    if (order != names[i]) continue;
    ceg::sim::device() = {multiprocessors, shared_limit, orders[i]};
    return;
  }
  throw py::value_error("order must be forward, reverse or shuffled, got " + order);
}

}  // namespace

PYBIND11_MODULE(CEG_MODULE, m) {
  const ceg::sim::Device standard;
  m.def("set_device", set_device, arg("multiprocessors") = standard.multiprocessors,
        arg("shared_limit") = standard.shared_limit, arg("order") = "forward");
  m.def("selftest", ceg::sim::selftest, arg("kernel"), arg("out"), arg("shared_bytes") = 0);
  m.def("through_16_bits", ceg::sim::through_16_bits, arg("value"), arg("type"));
  ceg::cuda::bind_launchers(m);
}
