#include "tma.h"

#include <cstring>

#include "../swizzle.h"
#include "block.h"
#include "mbarrier.h"

namespace ceg::sim {
namespace {

constexpr int kItemBytes = 2;

bool inside(const TensorMap& map, int dim, int64_t at) { return at >= 0 && at < map.size[dim]; }

// Rows of the box one behind the other, zeros where it leaves the array.
void write_box(uintptr_t to, const TensorMap& map, const std::array<int, 4>& start) {
  for (int64_t i = 0; i < int64_t{map.box[1]} * map.box[2] * map.box[3]; ++i) {
    const int64_t row = start[1] + i % map.box[1];
    const int64_t head = start[2] + i / map.box[1] % map.box[2];
    const int64_t batch = start[3] + i / map.box[1] / map.box[2];
    const bool there = inside(map, 1, row) && inside(map, 2, head) && inside(map, 3, batch);
    const unsigned char* const from =
        map.data + row * map.stride[1] + head * map.stride[2] + batch * map.stride[3];
    for (int column = 0; column < map.box[0]; ++column) {
      const int64_t at = start[0] + int64_t{column};
      uint16_t item = 0;
      if (there && inside(map, 0, at)) std::memcpy(&item, from + at * kItemBytes, kItemBytes);
      const uintptr_t linear = to + (i * map.box[0] + column) * kItemBytes;
      std::memcpy(reinterpret_cast<void*>(swizzle_128(linear)), &item, kItemBytes);
    }
  }
}

}  // namespace

void tma_load(uintptr_t to, const TensorMap& map, uintptr_t barrier, std::array<int, 4> start) {
  check_aligned(reinterpret_cast<const void*>(to), 1024);  // where the swizzle's pattern starts
  const size_t bytes = size_t{1} * map.box[0] * map.box[1] * map.box[2] * map.box[3] * kItemBytes;
  std::memset(reinterpret_cast<void*>(to), 0xff, bytes);
  // The map by value: it may lie on the stack of a thread that is gone by then.
  complete_on(barrier, static_cast<unsigned>(bytes), [=] { write_box(to, map, start); });
}

}  // namespace ceg::sim
