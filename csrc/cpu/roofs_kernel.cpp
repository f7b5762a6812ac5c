#include <cstring>

#include "isa.h"
#include "roofs.h"
#include "rows.h"
#include "tiles.h"

namespace ceg::CEG_ISA {
namespace {

// Two units with a latency of four cycles need eight chains; more would spill where there are
// only sixteen registers.
constexpr int kChains = 12;

// Keeps a value in a register and its computation in the program.
template <class V>
inline void keep(V& v) {
#if defined(__x86_64__)
  asm volatile("" : "+v"(v));
#else
  asm volatile("" : "+w"(v));
#endif
}

template <class C>
double multiply_add(int64_t rounds) {
  Vec<C> acc[kChains] = {};
  Vec<C> a = broadcast(C(0.5)), b = broadcast(C(1));
  keep(a);
  keep(b);
  for (int64_t r = 0; r < rounds; ++r) {
    for (int c = 0; c < kChains; ++c) acc[c] = fma(acc[c], a, b);
    for (int c = 0; c < kChains; ++c) keep(acc[c]);
  }
  return 2.0 * kLanes<C> * kChains * static_cast<double>(rounds);
}

#if defined(__AMX_BF16__)
// Four accumulators: a tile of 16 x 16 x 32 takes 16 cycles and is there after 52.
double dot_bf16(int64_t rounds) {
  const TileRegisters tiles;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  const int64_t fewer = rounds / 16 + 1;  // than of a vector's instructions, which take less time
  for (int64_t r = 0; r < fewer; ++r) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 5);
  }
  return 2.0 * kTile * kTile * 32 * 4 * static_cast<double>(fewer);
}
#elif defined(__AVX512BF16__)
double dot_bf16(int64_t rounds) {
  __m512 acc[kChains] = {};
  __m512bh a = {};
  keep(a);
  for (int64_t r = 0; r < rounds; ++r) {
    for (int c = 0; c < kChains; ++c) acc[c] = _mm512_dpbf16_ps(acc[c], a, a);
    for (int c = 0; c < kChains; ++c) keep(acc[c]);
  }
  return 2.0 * 32 * kChains * static_cast<double>(rounds);
}
#else
double dot_bf16(int64_t) { return 0; }
#endif

}  // namespace

void roofs_fma_kernel(const RoofsFmaArgs& a) {
  double flops = 0;
#pragma omp parallel num_threads(a.threads) reduction(+ : flops)
  flops += a.bf16_dot ? dot_bf16(a.rounds)
           : a.f64    ? multiply_add<double>(a.rounds)
                      : multiply_add<float>(a.rounds);
  *a.flops = flops;
}

void roofs_copy_kernel(const RoofsCopyArgs& a) {
  constexpr int64_t kPage = 4096;
  const bool streaming = a.bytes > cache_bytes();
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int64_t page = 0; page < a.bytes / kPage; ++page) {
      const auto* source = reinterpret_cast<const float*>(a.source + page * kPage);
      auto* target = reinterpret_cast<float*>(a.target + page * kPage);
      for (int64_t i = 0; i < kPage / 4; i += kLanes<float>) {
        put(target + i, load<float>(source + i), kLanes<float>, streaming);
      }
    }
    stream_fence();
  }
}

}  // namespace ceg::CEG_ISA
