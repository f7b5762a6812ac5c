#include "build_info.h"

namespace ceg {

BuildInfo build_info() {
  return {.compiler = CEG_CXX,
          .source_hash = CEG_SOURCE_HASH,
          .cuda_archs = CEG_CUDA_ARCHS,
          .cuda_why_not = CEG_CUDA_STATUS};
}

const char* kernel_hashes() { return CEG_KERNEL_HASHES; }

}  // namespace ceg
