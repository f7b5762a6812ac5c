#include "block.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <new>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include "fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace ceg::sim {
namespace {

constexpr unsigned kLanes = 32;
constexpr size_t kAlign = 1024;  // of shared memory: what TMA's swizzles ask for

struct Thread {
  Fiber fiber;
  uint3 index;
  unsigned linear;
  // Where it waits; null while it can run.
  const char* what;
  bool (*ready)(const void*);
  const void* argument;
  std::map<const void*, std::shared_ptr<void>> state;
};

// Where the lanes of a mask meet. Two buffers: nobody can be two exchanges ahead of another lane,
// because each exchange waits for all.
struct Meeting {
  std::vector<char> buffers[2];
  const char* what = nullptr;
  size_t bytes = 0;
  unsigned arrived = 0;
  unsigned generation = 0;
};

struct Barrier {
  unsigned arrived = 0, expected = 0, generation = 0;
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};

struct Block {
  const char* name;
  size_t shared_bytes;  // dynamic
  size_t shared_most;   // static and dynamic
  size_t shared_used;
  const std::function<void()>* body;
  unsigned threads;
  std::map<const void*, std::unique_ptr<void, Free>> shared;
  std::map<const void*, std::shared_ptr<void>> state;
  std::vector<std::map<unsigned, Meeting>> warps;  // by mask
  Barrier barriers[kBarriers];
  std::exception_ptr error;
  bool stuck = false;  // no thread could go on
};

Block* block = nullptr;
Thread* thread = nullptr;

std::string text(uint3 i) {
  std::ostringstream out;
  out << '(' << i.x << ", " << i.y << ", " << i.z << ')';
  return out.str();
}

std::string place() { return std::string(block->name) + ", block " + text(blockIdx); }

// Fibers are kept from launch to launch: their stacks cost a system call each.
std::vector<std::unique_ptr<Thread>>& threads() {
  static std::vector<std::unique_ptr<Thread>> all;
  return all;
}

void thread_body(void*) {
  try {
    (*block->body)();
  } catch (...) {
    block->error = std::current_exception();
  }
}

[[noreturn]] void report_deadlock() {
  std::map<std::string, std::pair<unsigned, const Thread*>> waits;  // how many, and the first
  for (unsigned i = 0; i < block->threads; ++i) {
    const Thread& t = *threads()[i];
    auto& [count, first] = waits[t.fiber.done() ? "have exited" : "wait in " + std::string(t.what)];
    if (count++ == 0) first = &t;
  }
  std::ostringstream out;
  out << place() << ": no thread can go on";
  const char* separator = ": ";
  for (const auto& [what, who] : waits) {
    out << separator << who.first << ' ' << what << " (first: thread " << text(who.second->index)
        << ')';
    separator = ", ";
  }
  throw std::runtime_error(out.str());
}

// The permutation of 0..n-1 that a round over blocks or threads follows.
std::vector<unsigned> order_of(unsigned n, unsigned seed) {
  std::vector<unsigned> order(n);
  std::iota(order.begin(), order.end(), 0u);
  if (device().order == Order::reverse) return {order.rbegin(), order.rend()};
  if (device().order == Order::shuffled) {
    uint64_t state = seed * 2654435761u + 1;
    for (unsigned i = n; i > 1; --i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      std::swap(order[i - 1], order[(state >> 33) % i]);
    }
  }
  return order;
}

// Each of these threads goes on until it waits; false where none could.
bool run_round(const unsigned* first, const unsigned* end, unsigned& left) {
  bool progress = false;
  for (; first != end; ++first) {
    Thread& t = *threads()[*first];
    if (t.fiber.done() || (t.what && !t.ready(t.argument))) continue;
    t.what = nullptr;
    thread = &t;
    threadIdx = t.index;
    t.fiber.resume();
    if (block->error) std::rethrow_exception(block->error);
    left -= t.fiber.done();
    progress = true;
  }
  return progress;
}

void run_block(unsigned number) {
  const unsigned n = block->threads;
  block->warps.assign((n + kLanes - 1) / kLanes, {});
  for (unsigned i = 0; i < n; ++i) {
    Thread& t = *threads()[i];
    t.linear = i;
    t.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    t.what = nullptr;
    t.state.clear();
    t.fiber.start(thread_body, nullptr);
  }
  unsigned left = n;
  const std::vector<unsigned> order = order_of(n, number);
  // Warps run as far as they get before the next has its turn, so that a thread that overtakes
  // another where a barrier is missing does so by as much as it can. Shuffled threads take turns.
  const unsigned group = device().order == Order::shuffled ? n : kLanes;
  while (left) {
    bool progress = false;
    for (unsigned first = 0; first < n; first += group) {
      const unsigned end = std::min(first + group, n);
      while (run_round(&order[first], order.data() + end, left)) progress = true;
    }
    if (!progress && block->stuck) report_deadlock();
    block->stuck = !progress;
  }
  for (int id = 0; id < kBarriers; ++id) {
    if (const unsigned arrived = block->barriers[id].arrived) {
      throw std::runtime_error(place() + ": ends with " + std::to_string(arrived) +
                               " threads counted at barrier " + std::to_string(id));
    }
  }
}

void check_limits(const char* name, dim3 grid, dim3 dim, size_t shared_bytes) {
  std::ostringstream out;
  out << name << ": ";
  const uint64_t threads = uint64_t{dim.x} * dim.y * dim.z;
  if (threads == 0 || threads > 1024 || dim.z > 64) {
    out << "a block must have 1 to 1024 threads, got (" << dim.x << ", " << dim.y << ", " << dim.z
        << ')';
  } else if (grid.x > INT32_MAX || grid.y > UINT16_MAX || grid.z > UINT16_MAX) {
    out << "a grid must be at most (2^31 - 1, 65535, 65535), got (" << grid.x << ", " << grid.y
        << ", " << grid.z << ')';
  } else if (shared_bytes > device().shared_limit) {
    out << "needs " << shared_bytes << " bytes of shared memory a block, this GPU has "
        << device().shared_limit;
  } else {
    return;
  }
  throw std::runtime_error(out.str());
}

std::vector<std::string>& names() {
  static std::vector<std::string> of_launches;
  return of_launches;
}

// Ends with the launch, however it ends.
struct Running {
  explicit Running(Block& b) { block = &b; }
  ~Running() {
    for (unsigned i = 0; i < block->threads; ++i) threads()[i]->state.clear();
    block = nullptr;
    thread = nullptr;
  }
};

}  // namespace

Device& device() {
  static Device the;
  return the;
}

std::vector<std::string> launched() { return std::exchange(names(), {}); }
void launching(const char* name) { names().push_back(name); }

void run_grid(const char* name, dim3 grid, dim3 dim, size_t shared_bytes, size_t shared_most,
              const std::function<void()>& body) {
  static std::mutex one_launch;
  const std::lock_guard lock(one_launch);
  launching(name);
  check_limits(name, grid, dim, shared_bytes);
  Block running{};
  running.name = name;
  running.shared_bytes = shared_bytes;
  running.shared_most = shared_most;
  running.body = &body;
  running.threads = dim.x * dim.y * dim.z;
  while (threads().size() < running.threads) threads().push_back(std::make_unique<Thread>());
  const Running guard(running);
  gridDim = grid;
  blockDim = dim;
  for (unsigned i : order_of(grid.x * grid.y * grid.z, 0)) {
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    running.shared.clear();
    running.shared_used = 0;
    running.state.clear();
    for (Barrier& barrier : running.barriers) barrier = {};
    run_block(i);
  }
}

void* shared_memory(const void* key, size_t bytes) {
  auto& memory = block->shared[key];
  if (!memory) {
    // What is dynamic starts at a multiple of kAlign, and so does all the rest here.
    block->shared_used = (block->shared_used + kAlign - 1) / kAlign * kAlign + bytes;
    if (block->shared_used > block->shared_most) {
      fail("static and dynamic shared memory of " + std::to_string(block->shared_used) +
           " bytes, where the launch was allowed " + std::to_string(block->shared_most));
    }
    void* made = nullptr;
    if (posix_memalign(&made, kAlign, bytes) != 0) throw std::bad_alloc();
    std::memset(made, 0xff, bytes);
    memory.reset(made);
  }
  return memory.get();
}

void* dynamic_shared_memory() {
  if (!block->shared_bytes) fail("the launch asked for no dynamic shared memory");
  static const char key = 0;
  return shared_memory(&key, block->shared_bytes);
}

size_t dynamic_shared_bytes() { return block->shared_bytes; }

void suspend_until(const char* what, bool (*ready)(const void*), const void* argument) {
  Thread& self = *thread;
  self.what = what;
  self.ready = ready;
  self.argument = argument;
  self.fiber.suspend();
}

bool last_moment() { return std::exchange(block->stuck, false); }

void barrier_arrive(const char* what, int id, unsigned expected) {
  if (id < 0 || id >= kBarriers) fail(std::string(what) + ": no barrier " + std::to_string(id));
  Barrier& barrier = block->barriers[id];
  if (expected == 0) expected = block->threads;
  if (expected % kLanes && expected != block->threads) {
    fail(std::string(what) + ": must be for whole warps, got " + std::to_string(expected));
  }
  if (barrier.arrived && barrier.expected != expected) {
    fail(std::string(what) + ": threads expect " + std::to_string(barrier.expected) + " and " +
         std::to_string(expected) + " at barrier " + std::to_string(id));
  }
  barrier.expected = expected;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
}

void barrier_sync(const char* what, int id, unsigned expected) {
  const unsigned before = id >= 0 && id < kBarriers ? block->barriers[id].generation : 0;
  barrier_arrive(what, id, expected);
  const Barrier& barrier = block->barriers[id];
  wait_until(what, [&] { return barrier.generation != before; });
}

int lane() { return static_cast<int>(thread->linear % kLanes); }

const void* warp_exchange_bytes(const char* what, unsigned mask, const void* mine, size_t bytes) {
  const unsigned self = thread->linear % kLanes;
  if (!(mask >> self & 1)) fail(std::string(what) + ": the mask must hold the calling lane");
  Meeting& meeting = block->warps[thread->linear / kLanes][mask];
  if (meeting.arrived == 0) {
    meeting.what = what;
    meeting.bytes = bytes;
  } else if (std::strcmp(meeting.what, what) != 0 || meeting.bytes != bytes) {
    fail("lanes of a warp meet in " + std::string(meeting.what) + " and in " + what);
  }
  const unsigned generation = meeting.generation;
  std::vector<char>& buffer = meeting.buffers[generation % 2];
  // At most 32 lanes of a few registers; the address must not change while lanes read.
  if (meeting.arrived == 0) buffer.assign(kLanes * bytes, static_cast<char>(0xff));
  std::memcpy(buffer.data() + self * bytes, mine, bytes);
  meeting.arrived |= 1u << self;
  if (meeting.arrived == mask) {
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    wait_until(what, [&] { return meeting.generation != generation; });
  }
  return buffer.data();
}

std::shared_ptr<void>& thread_state(const void* key) { return thread->state[key]; }
std::shared_ptr<void>& block_state(const void* key) { return block->state[key]; }

void fail(const std::string& what) {
  throw std::runtime_error(place() + ", thread " + text(thread->index) + ": " + what);
}

}  // namespace ceg::sim
