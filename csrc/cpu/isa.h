// Kernel sources are compiled once per level of the instruction set; this picks the level.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../tensor.h"

namespace ceg {

struct Kernels;  // kernels.h

// The kernels of a level by name, or the best that this machine runs for "".
// Throws std::invalid_argument for a level that is unknown, not built or not supported here.
const Kernels& kernels(const std::string& isa);

std::vector<std::string> built_isa_levels();
std::vector<std::string> available_isa_levels();  // lowest first
std::string default_isa_level();                  // what "" means

// The OpenMP default for threads <= 0.
int thread_count(int threads);

// thread_count, but no more than pay for their start on a pass over t.
int threads_for(const Tensor& t, int threads);

// Outputs above this bypass the caches: they would be gone before anyone reads them again.
int64_t cache_bytes();

}  // namespace ceg
