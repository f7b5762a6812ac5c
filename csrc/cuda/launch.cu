#include "launch.h"

#include <cstring>
#include <sstream>
#include <stdexcept>

#include "../check.h"

namespace ceg {

#ifdef CEG_CUDA_SIM

Device launch_device(const char* name, const Tensor& t) {
  CEG_CHECK(t.device.type == kCpu, name, " must be on cpu, got ", text(t.device));
  return t.device;
}

OnDevice::OnDevice(const Device&) : before_(0) {}
OnDevice::~OnDevice() = default;

void clear(const char*, void* data, size_t bytes, uintptr_t) {
  sim::launching("memset");
  std::memset(data, 0, bytes);
}

int multiprocessors() { return sim::device().multiprocessors; }
size_t shared_memory_limit() { return sim::device().shared_limit; }
int compute_capability() { return sim::device().capability; }

#else

void check_call(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would be blamed for it
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
}

int device_attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check_call(cudaGetDevice(&device), "cudaGetDevice");
  check_call(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

Device launch_device(const char* name, const Tensor& t) {
  CEG_CHECK(t.device.type == kCuda, name, " must be on a GPU, got ", text(t.device));
  return t.device;
}

OnDevice::OnDevice(const Device& device) : before_(device.index) {
  check_call(cudaGetDevice(&before_), "cudaGetDevice");
  check_call(cudaSetDevice(device.index), "cudaSetDevice");
}
OnDevice::~OnDevice() {
  int now = before_;
  if (cudaGetDevice(&now) == cudaSuccess && now != before_) cudaSetDevice(before_);
}

void clear(const char* name, void* data, size_t bytes, uintptr_t stream) {
  check_call(cudaMemsetAsync(data, 0, bytes, reinterpret_cast<cudaStream_t>(stream)), name);
}

int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
size_t shared_memory_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
int compute_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
         device_attribute(cudaDevAttrComputeCapabilityMinor);
}

void check_launch(const Launch& at, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would be blamed for it
  std::ostringstream text;
  text << at.name << " with grid (" << at.grid.x << ", " << at.grid.y << ", " << at.grid.z
       << "), block (" << at.block.x << ", " << at.block.y << ", " << at.block.z << ") and "
       << at.shared_bytes << " bytes of shared memory: " << cudaGetErrorString(status);
  throw std::runtime_error(text.str());
}

void allow_shared_memory(const Launch& at, const void* kernel) {
  if (at.shared_bytes <= kDynamicWithoutAsking) return;
  check_launch(at, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(at.shared_bytes)));
}

#endif

}  // namespace ceg
