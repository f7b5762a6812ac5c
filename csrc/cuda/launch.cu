#include "launch.h"

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

int multiprocessors() { return sim::device().multiprocessors; }
size_t shared_memory_limit() { return sim::device().shared_limit; }

#else

namespace {

constexpr size_t kSharedWithoutAsking = 48 << 10;

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would be blamed for it
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

Device launch_device(const char* name, const Tensor& t) {
  CEG_CHECK(t.device.type == kCuda, name, " must be on a GPU, got ", text(t.device));
  return t.device;
}

OnDevice::OnDevice(const Device& device) : before_(device.index) {
  check(cudaGetDevice(&before_), "cudaGetDevice");
  if (before_ != device.index) check(cudaSetDevice(device.index), "cudaSetDevice");
}
OnDevice::~OnDevice() {
  int now = before_;
  if (cudaGetDevice(&now) == cudaSuccess && now != before_) cudaSetDevice(before_);
}

int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }
size_t shared_memory_limit() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

void check_launch(const Launch& at, const void*, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would be blamed for it
  std::ostringstream text;
  text << at.name << " with grid (" << at.grid.x << ", " << at.grid.y << ", " << at.grid.z
       << "), block (" << at.block.x << ", " << at.block.y << ", " << at.block.z << ") and "
       << at.shared_bytes << " bytes of shared memory: " << cudaGetErrorString(status);
  throw std::runtime_error(text.str());
}

void allow_shared_memory(const Launch& at, const void* kernel) {
  if (at.shared_bytes <= kSharedWithoutAsking) return;
  check_launch(at, kernel,
               cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(at.shared_bytes)));
}

#endif

}  // namespace ceg
