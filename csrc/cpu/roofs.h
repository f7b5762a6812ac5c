// This machine's own roofs, measured: multiply-add rate and copy bandwidth.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace ceg {

struct RoofsFmaArgs {
  bool bf16_dot, f64;  // neither: fp32
  int threads;
  int64_t rounds;
  double* flops;  // executed by all threads; 0 where the level has no such instruction
};

struct RoofsCopyArgs {
  const char* source;
  char* target;
  int64_t bytes;
  int threads;
};

// FLOP/s of multiply-adds from registers, tiles in bfloat16 where the level has them, the best of
// many short runs within `seconds`. None where the instruction set computes in another type
// (float16), or not at all (bfloat16 without AVX512-BF16).
std::optional<double> fma_flops(const std::string& dtype, int threads, double seconds,
                                const std::string& isa);

// Bytes read + written per second by a copy of `bytes` bytes with the level's best stores.
double copy_bandwidth(int64_t bytes, int threads, double seconds, const std::string& isa);

}  // namespace ceg
