// Kernel launches, on a GPU and in the simulator alike. Failures are exceptions that name the
// kernel, its grid and the reason.
#pragma once

#include <tuple>
#include <utility>

#include "../tensor.h"
#include "gpu.h"

namespace ceg {

struct Launch {
  const char* name;  // of the kernel
  dim3 grid, block;
  size_t shared_bytes = 0;  // dynamic
  uintptr_t stream = 0;     // a cudaStream_t, of the current device
};

// Where the arrays beside `t` have to be; an error where that is not a GPU.
Device launch_device(const char* name, const Tensor& t);

// Makes a device the current one for as long as it lives, and its context the calling thread's: the
// driver's own calls (tensor maps) need one and, unlike the runtime's, make none.
class OnDevice {
 public:
  explicit OnDevice(const Device& device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_;
};

// Zeros on the current device, in the order of the stream. `name` is for errors.
void clear(const char* name, void* data, size_t bytes, uintptr_t stream);

// Of the current device.
int multiprocessors();
int compute_capability();      // 90 is sm_90
size_t shared_memory_limit();  // bytes that a block may ask for

#ifndef CEG_CUDA_SIM
void check_call(cudaError_t status, const char* call);
int device_attribute(cudaDeviceAttr which);  // of the current device
void check_launch(const Launch& at, cudaError_t status);
void allow_shared_memory(const Launch& at, const void* kernel);
#endif

// A block has 48 KiB of shared memory, static and dynamic; a kernel that wants more has to be
// allowed its dynamic part first. So is one that may come near, as its static part is known to nvcc
// alone.
constexpr size_t kSharedBytes = 48 << 10;
constexpr size_t kDynamicWithoutAsking = 32 << 10;

// kernel<<<grid, block>>>(arguments...); an empty grid launches nothing.
template <class... Parameters, class... Arguments>
void launch(const Launch& at, void (*kernel)(Parameters...), Arguments&&... arguments) {
  if (at.grid.x == 0 || at.grid.y == 0 || at.grid.z == 0) return;
#ifdef CEG_CUDA_SIM
  const std::tuple<std::remove_cv_t<Parameters>...> given(std::forward<Arguments>(arguments)...);
  const bool asks = at.shared_bytes > kDynamicWithoutAsking;
  sim::run_grid(at.name, at.grid, at.block, at.shared_bytes,
                asks ? shared_memory_limit() : kSharedBytes, [&] { std::apply(kernel, given); });
#else
  allow_shared_memory(at, reinterpret_cast<const void*>(kernel));
  cudaLaunchConfig_t config{};
  config.gridDim = at.grid;
  config.blockDim = at.block;
  config.dynamicSmemBytes = at.shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(at.stream);
  check_launch(at, cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
#endif
}

}  // namespace ceg
