// One CUDA thread of the simulator: a stack of its own, and a switch to it and back.
#pragma once

#include <cstddef>

namespace ceg::sim {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() calls body(argument), which must not throw. What ran here before is
  // forgotten: nothing of it is destroyed.
  void start(void (*body)(void*), void* argument);
  // Called by the scheduler: runs until the fiber suspends or its body returns.
  void resume();
  // Called in the fiber: back to the scheduler.
  void suspend();
  bool done() const { return done_; }

 private:
  static void enter();
  void run();

  char* stack_;  // the lowest page is not accessible
  void* stack_pointer_ = nullptr;
  void* scheduler_pointer_ = nullptr;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  bool done_ = true;
  // For AddressSanitizer.
  void* fake_stack_ = nullptr;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_bottom_ = nullptr;
  size_t scheduler_size_ = 0;
};

}  // namespace ceg::sim
