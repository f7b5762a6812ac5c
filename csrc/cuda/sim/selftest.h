#pragma once

#include <string>

#include "../../tensor.h"

namespace ceg::sim {

// out: (96,) floats, which two blocks of the kernel write.
void selftest(const std::string& kernel, const Tensor& out, int shared_bytes);

// x: (up to 128, up to 64) fp16, out: (64, 64) fp32, the product of x's halves.
void selftest_sm90(const std::string& fault, const Tensor& x, const Tensor& out);

// The simulator's own conversions there and back.
float through_16_bits(float value, const std::string& type);

}  // namespace ceg::sim
