// Barriers in shared memory that count arrivals of threads and bytes of asynchronous copies (PTX
// ISA, "Parallel Synchronization and Communication Instructions: mbarrier").
//   A phase is complete when all expected arrivals and all expected bytes are there; the next one
//   begins at once. The first phase has parity 0, and waiting for parity 1 of a new barrier
//   returns.
#pragma once

#include "shared_address.h"

#ifdef CEG_CUDA_SIM
#include "sim/mbarrier.h"
#endif

namespace ceg {

using Mbarrier = uint64_t;  // opaque, in shared memory

// Which of the buffers in a ring has its turn, and the parity that its barriers complete next.
struct RingPlace {
  int stage = 0;
  unsigned parity = 0;

  __host__ __device__ __forceinline__ constexpr void advance(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

#ifdef CEG_CUDA_SIM

inline void mbarrier_init(SharedAddress at, unsigned arrivals) { sim::mbarrier_init(at, arrivals); }
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(SharedAddress at) { sim::mbarrier_arrive(at, 0); }
inline void mbarrier_arrive_expect_tx(SharedAddress at, unsigned bytes) {
  sim::mbarrier_arrive(at, bytes);
}
inline void mbarrier_wait(SharedAddress at, unsigned parity) { sim::mbarrier_wait(at, parity); }

#else

// "mbarrier.init": by one thread, before anybody uses it.
__device__ __forceinline__ void mbarrier_init(SharedAddress at, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}

// "membar / fence": what this thread has initialised is there for the copy engine too.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// "mbarrier.arrive": what this thread did before is done for those who wait.
__device__ __forceinline__ void mbarrier_arrive(SharedAddress at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}

// "mbarrier.arrive.expect_tx": the phase also waits for so many more bytes.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(SharedAddress at, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
               : "memory");
}

// "mbarrier.try_wait": until the phase of this parity is complete. It must be the current one or
// the one before it.
__device__ __forceinline__ void mbarrier_wait(SharedAddress at, unsigned parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(at), "r"(parity)
        : "memory");
  } while (!done);
}

#endif

}  // namespace ceg
