// A warpgroup's asynchronous products: issued now, computed when no thread can go on without them
// or, with threads in reverse order, as soon as all have issued them. From issue to wait the
// accumulators are NaN, for whoever reads them early, and must not be written.
#pragma once

#include <cstdint>
#include <type_traits>

#include "half.h"

namespace ceg::sim {

// One thread's part of a product: `n` / 2 accumulators; A by its descriptor, or this thread's four
// registers of it; B dense in mn or in k.
struct WgmmaPart {
  float* c;
  int n;
  uint64_t a;
  const uint32_t* a_registers;  // null: by the descriptor
  bool a_is_dense_in_mn;        // where that reads it
  uint64_t b;
  bool b_is_dense_in_mn, accumulate, is_bf16;
};

void wgmma_issue(const WgmmaPart& mine);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups);

template <class T>
void wgmma_issue(float* c, int n, uint64_t a, const uint32_t* a_registers, bool a_is_dense_in_mn,
                 uint64_t b, bool b_is_dense_in_mn, bool accumulate) {
  wgmma_issue({c, n, a, a_registers, a_is_dense_in_mn, b, b_is_dense_in_mn, accumulate,
               std::is_same_v<T, __nv_bfloat16>});
}

}  // namespace ceg::sim
