// PTX's mbarrier objects, and the bulk copies that complete on them.
#pragma once

#include <cstdint>
#include <functional>

namespace ceg::sim {

void mbarrier_init(uintptr_t at, unsigned arrivals);
// Expects `bytes` more, then arrives.
void mbarrier_arrive(uintptr_t at, unsigned bytes);
void mbarrier_wait(uintptr_t at, unsigned parity);

// Runs `copy`, which writes `bytes`, and completes them on the barrier. It may run at any time
// until the barrier is waited for: at once with threads in reverse order, which shows who still
// reads what it overwrites; else as late as possible, which shows who reads too early.
void complete_on(uintptr_t at, unsigned bytes, std::function<void()> copy);

}  // namespace ceg::sim
