// Bulk tensor copies, by the PTX manual's "Tensors" and the driver's "Tensor Map Object
// Management".
#pragma once

#include <array>
#include <cstdint>

namespace ceg::sim {

struct TensorMap {
  const unsigned char* data;
  int64_t size[4], stride[4];  // items, bytes; columns of 16 bits first
  int box[4];                  // items
};

// The box at these coordinates into shared memory with the 128-byte swizzle; its bytes complete on
// the barrier. Until then there is nothing to read.
void tma_load(uintptr_t to, const TensorMap& map, uintptr_t barrier, std::array<int, 4> start);

}  // namespace ceg::sim
