#pragma once

#include <string>

#include "../../tensor.h"

namespace ceg::sim {

// out: (96,) floats, which two blocks of the kernel write.
void selftest(const std::string& kernel, const Tensor& out, int shared_bytes);

// The simulator's own conversions there and back.
float through_16_bits(float value, const std::string& type);

}  // namespace ceg::sim
