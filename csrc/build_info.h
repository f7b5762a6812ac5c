#pragma once

namespace ceg {

struct BuildInfo {
  const char* compiler;
  const char* source_hash;
  const char* cuda_archs;    // "" without CUDA
  const char* cuda_why_not;  // "" with CUDA
};

BuildInfo build_info();

// "family=hash ..." of what the CUDA kernels of each family of ops are made of, with CUDA or not.
const char* kernel_hashes();

}  // namespace ceg
