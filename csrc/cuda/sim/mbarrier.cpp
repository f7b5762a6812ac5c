#include "mbarrier.h"

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "block.h"

namespace ceg::sim {
namespace {

constexpr unsigned kLive = 1;                     // memory that nobody wrote says 3
constexpr int64_t kMostArrivals = (1 << 20) - 1;  // and bytes: the manual's range of both counts

struct Object {
  uint64_t expected : 20, pending : 20, phase : 1, live : 2;
  int64_t bytes : 21;
};
static_assert(sizeof(Object) == 8, "an mbarrier object has 64 bits");

struct Copy {
  unsigned bytes;
  std::function<void()> run;
};
using Copies = std::map<uintptr_t, std::vector<Copy>>;  // by barrier

Object load(uintptr_t at) {
  check_aligned(reinterpret_cast<const void*>(at), 8);
  Object object;
  std::memcpy(&object, reinterpret_cast<const void*>(at), sizeof(object));
  if (object.live != kLive) fail("mbarrier: used before mbarrier.init");
  return object;
}

void store(uintptr_t at, Object object) {
  if (object.pending == 0 && object.bytes == 0) {
    object.phase ^= 1;
    object.pending = object.expected;
  }
  std::memcpy(reinterpret_cast<void*>(at), &object, sizeof(object));
}

void run(uintptr_t at, const Copy& copy) {
  copy.run();
  Object object = load(at);
  object.bytes -= copy.bytes;
  store(at, object);
}

// A phase that lacks nothing but bytes gets them.
void land(uintptr_t at) {
  const auto found = block_state<Copies>().find(at);
  if (found == block_state<Copies>().end() || load(at).pending || !last_moment()) return;
  const std::vector<Copy> copies = std::move(found->second);
  block_state<Copies>().erase(found);
  for (const Copy& copy : copies) run(at, copy);
}

}  // namespace

void mbarrier_init(uintptr_t at, unsigned arrivals) {
  if (arrivals == 0 || arrivals > kMostArrivals) {
    fail("mbarrier.init: must expect 1 to 2^20 - 1 arrivals, got " + std::to_string(arrivals));
  }
  check_aligned(reinterpret_cast<const void*>(at), 8);
  store(at, {.expected = arrivals, .pending = arrivals, .phase = 0, .live = kLive, .bytes = 0});
}

void mbarrier_arrive(uintptr_t at, unsigned bytes) {
  Object object = load(at);
  if (object.pending == 0) fail("mbarrier.arrive: all that the phase expects have arrived");
  if (object.bytes + int64_t{bytes} > kMostArrivals) fail("mbarrier.expect_tx: beyond 2^20 - 1");
  object.bytes += bytes;
  object.pending -= 1;
  store(at, object);
}

void mbarrier_wait(uintptr_t at, unsigned parity) {
  load(at);
  wait_until("mbarrier.try_wait", [=] {
    if (load(at).phase == parity) land(at);
    return load(at).phase != parity;
  });
}

void complete_on(uintptr_t at, unsigned bytes, std::function<void()> copy) {
  load(at);
  if (device().order == Order::reverse) {
    run(at, {bytes, std::move(copy)});
  } else {
    block_state<Copies>()[at].push_back({bytes, std::move(copy)});
  }
}

}  // namespace ceg::sim
