// Warp collectives: the CUDA C++ Programming Guide's "Warp Shuffle, Vote, Reduce Functions".
#pragma once

#include "block.h"

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  ceg::sim::warp_exchange("__syncwarp", mask, '\0');
}

// `width` parts the warp into segments of as many lanes; a source outside of the own segment (or
// outside of the mask, which CUDA leaves undefined and is an error here) is the lane itself.
template <class T, class Source>
T ceg_sim_shuffle(const char* what, unsigned mask, T value, Source source) {
  const T* values = ceg::sim::warp_exchange(what, mask, value);
  const int from = source(ceg::sim::lane());
  if (!(mask >> from & 1)) ceg::sim::fail(std::string(what) + ": reads a lane outside of its mask");
  return values[from];
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return ceg_sim_shuffle("__shfl_sync", mask, value,
                         [=](int lane) { return lane / width * width + (source & (width - 1)); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return ceg_sim_shuffle("__shfl_xor_sync", mask, value, [=](int lane) {
    const int from = lane ^ bits;
    return from / width <= lane / width ? from : lane;
  });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return ceg_sim_shuffle("__shfl_up_sync", mask, value, [=](int lane) {
    const int from = lane - static_cast<int>(delta);
    return from < lane / width * width ? lane : from;
  });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return ceg_sim_shuffle("__shfl_down_sync", mask, value, [=](int lane) {
    const int from = lane + static_cast<int>(delta);
    return from >= (lane / width + 1) * width ? lane : from;
  });
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  const bool* votes = ceg::sim::warp_exchange("__ballot_sync", mask, predicate);
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1 && votes[lane]) ballot |= 1u << lane;
  }
  return ballot;
}
inline bool __any_sync(unsigned mask, bool predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate) {
  return __ballot_sync(mask, predicate) == mask;
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  const T* values = ceg::sim::warp_exchange("__match_any_sync", mask, value);
  unsigned same = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1 && values[lane] == value) same |= 1u << lane;
  }
  return same;
}

template <class Join>
int ceg_sim_reduce(const char* what, unsigned mask, int value, Join join) {
  const int* values = ceg::sim::warp_exchange(what, mask, value);
  int result = value;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1 && lane != ceg::sim::lane()) result = join(result, values[lane]);
  }
  return result;
}
inline int __reduce_add_sync(unsigned mask, int value) {
  return ceg_sim_reduce("__reduce_add_sync", mask, value, [](int a, int b) { return a + b; });
}
inline int __reduce_max_sync(unsigned mask, int value) {
  return ceg_sim_reduce("__reduce_max_sync", mask, value,
                        [](int a, int b) { return a > b ? a : b; });
}
inline int __reduce_min_sync(unsigned mask, int value) {
  return ceg_sim_reduce("__reduce_min_sync", mask, value,
                        [](int a, int b) { return a < b ? a : b; });
}
