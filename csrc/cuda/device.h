#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ceg {

struct CudaDevice {
  std::string name;
  int major, minor;  // compute capability
  int multiprocessors;
  int64_t memory_bytes;
  int driver_version, runtime_version;  // 13000 is 13.0
};

// Throws std::runtime_error with the driver's reason where there is no usable device.
std::vector<CudaDevice> cuda_devices();

}  // namespace ceg
