#pragma once

namespace ceg {

struct BuildInfo {
  const char* compiler;
  const char* source_hash;
  const char* cuda_archs;    // "" without CUDA
  const char* cuda_why_not;  // "" with CUDA
};

BuildInfo build_info();

}  // namespace ceg
