#include "kernels.h"

#include <cuda_runtime.h>

#include "launch.h"

namespace ceg::cuda {
namespace {

KernelAttributes attributes_of(const Kernel& kernel) {
  cudaFuncAttributes found{};
  check_call(cudaFuncGetAttributes(&found, kernel.address), kernel.name.c_str());
  allow_shared_memory({.name = kernel.name.c_str(), .shared_bytes = kernel.shared_bytes},
                      kernel.address);
  int blocks = 0;
  check_call(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel.address, kernel.threads,
                                                           kernel.shared_bytes),
             kernel.name.c_str());
  const int resident = device_attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  return {.name = kernel.name,
          .registers = found.numRegs,
          .threads = kernel.threads,
          .spill_bytes = found.localSizeBytes,
          .shared_bytes = found.sharedSizeBytes + kernel.shared_bytes,
          .blocks_per_multiprocessor = blocks,
          .occupancy = static_cast<double>(blocks) * kernel.threads / resident,
          .binary_arch = found.binaryVersion};
}

}  // namespace

std::vector<KernelAttributes> kernel_attributes() {
  Kernels kernels;
  list_attention_bwd_rows(kernels);
  list_attention_decode(kernels);
  list_attention_dkdv(kernels);
  list_attention_dq(kernels);
  list_attention_fwd(kernels);
  list_attention_sm90_bwd(kernels);
  list_attention_sm90_dkdv(kernels);
  list_attention_sm90_dq(kernels);
  list_attention_sm90_fwd(kernels);
  list_moe(kernels);
  list_moe_index(kernels);
  list_moe_route(kernels);
  list_rms_norm_fwd(kernels);
  list_rms_norm_bwd(kernels);
  list_roofs(kernels);
  list_rope(kernels);
  std::vector<KernelAttributes> attributes;
  for (const Kernel& kernel : kernels) attributes.push_back(attributes_of(kernel));
  return attributes;
}

}  // namespace ceg::cuda
