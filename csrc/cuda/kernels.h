// Which kernels there are, for whoever wants to know what the compiler made of them.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace ceg::cuda {

struct Kernel {
  std::string name;  // with what it is compiled for
  const void* address;
  int threads;              // a block
  size_t shared_bytes = 0;  // dynamic, the most that it is launched with
};
using Kernels = std::vector<Kernel>;

template <class... Parameters>
void add(Kernels& kernels, const char* kernel, const std::string& type, int vector,
         void (*address)(Parameters...), int threads, const std::string& more = "") {
  kernels.push_back({std::string(kernel) + " " + type + " x" + std::to_string(vector) + more,
                     reinterpret_cast<const void*>(address), threads});
}

// Each adds those of its op.
void list_attention_bwd_rows(Kernels& kernels);
void list_attention_decode(Kernels& kernels);
void list_attention_dkdv(Kernels& kernels);
void list_attention_dq(Kernels& kernels);
void list_attention_fwd(Kernels& kernels);
void list_attention_sm90_bwd(Kernels& kernels);
void list_attention_sm90_dkdv(Kernels& kernels);
void list_attention_sm90_dq(Kernels& kernels);
void list_attention_sm90_fwd(Kernels& kernels);
void list_moe(Kernels& kernels);
void list_moe_index(Kernels& kernels);
void list_moe_route(Kernels& kernels);
void list_rms_norm_fwd(Kernels& kernels);
void list_rms_norm_bwd(Kernels& kernels);
void list_roofs(Kernels& kernels);
void list_rope(Kernels& kernels);

// What the current GPU's image of a kernel needs, and how much of it fits a multiprocessor.
struct KernelAttributes {
  std::string name;
  int registers, threads;  // registers a thread, threads a block
  size_t spill_bytes;      // a thread: local memory, which also holds arrays with run-time indices
  size_t shared_bytes;     // a block, static and dynamic
  int blocks_per_multiprocessor;
  double occupancy;  // of the threads that a multiprocessor can hold
  int binary_arch;   // 90 is sm_90
};

// Throws std::runtime_error where there is no GPU.
std::vector<KernelAttributes> kernel_attributes();

}  // namespace ceg::cuda
