// What a GPU can do at most, as kernels that do nothing else. Their caller has the clock.
#pragma once

#include <cstdint>

#include "../tensor.h"

namespace ceg::cuda {

// target = source, in vectors of 16 bytes that pass through the caches: one-dimensional, of one
// dtype, whole vectors.
void roofs_copy(const Tensor& source, const Tensor& target, uintptr_t stream);

// Both multiply from registers and return the FLOPs of the launch. `rounds` is a multiple of 16.
// out: (threads,), in each of which it leaves the sum of the thread's results, so that no
// compiler can drop them.

// Each of the chains of a thread starts at one of start: (16,), in fp32 or fp64, and becomes
// itself * factor + addend, rounds times.
double roofs_fma(const Tensor& start, const Tensor& out, double factor, double addend,
                 int64_t rounds, uintptr_t stream);

// Each warp computes rounds * a b by mma.sync. a: (16, 16), b: (16, 64), in bf16 or fp16; out in
// fp32, a sum over what the thread has of the fragments of the product.
double roofs_mma(const Tensor& a, const Tensor& b, const Tensor& out, int64_t rounds,
                 uintptr_t stream);

// Threads that fill the current GPU once: the size for out.
int64_t roofs_threads();

}  // namespace ceg::cuda
