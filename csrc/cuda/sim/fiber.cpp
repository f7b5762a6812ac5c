#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#error "the simulator switches stacks in x86-64 assembly"
#endif

// (save, load): pushes what a callee must keep, stores the stack pointer at *save, continues at
// load. ucontext does the same through a system call that takes 100 times as long.
asm(R"(
.text
.type ceg_sim_switch, @function
ceg_sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ceg_sim_switch, . - ceg_sim_switch
)");
extern "C" void ceg_sim_switch(void** save, void* load) __asm__("ceg_sim_switch");

namespace ceg::sim {
namespace {

constexpr size_t kPage = 4096;
// The largest tile that a thread keeps in "registers", times what -O1 and ASan make of it.
constexpr size_t kStack = 256 * 1024;

Fiber* entering = nullptr;

#if defined(__SANITIZE_ADDRESS__)
void leave(void** fake, const void* bottom, size_t size) {
  __sanitizer_start_switch_fiber(fake, bottom, size);
}
void arrive(void* fake, const void** bottom, size_t* size) {
  __sanitizer_finish_switch_fiber(fake, bottom, size);
}
void forget(const void* stack, size_t size) { __asan_unpoison_memory_region(stack, size); }
#else
void leave(void**, const void*, size_t) {}
void arrive(void*, const void**, size_t*) {}
void forget(const void*, size_t) {}
#endif

}  // namespace

Fiber::Fiber() {
  void* memory = mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) throw std::bad_alloc();
  stack_ = static_cast<char*>(memory);
}

Fiber::~Fiber() { munmap(stack_, kPage + kStack); }

void Fiber::start(void (*body)(void*), void* argument) {
  body_ = body;
  argument_ = argument;
  done_ = false;
  fake_stack_ = nullptr;
  forget(stack_ + kPage, kStack);
  // What ceg_sim_switch pops: six registers and an address to return to. A function begins with
  // the stack pointer 8 below a multiple of 16, as after a call.
  void** top = reinterpret_cast<void**>(stack_ + kPage + kStack);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&Fiber::enter);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
}

void Fiber::enter() { entering->run(); }

void Fiber::run() {
  arrive(nullptr, &scheduler_bottom_, &scheduler_size_);
  body_(argument_);
  done_ = true;
  leave(nullptr, scheduler_bottom_, scheduler_size_);
  ceg_sim_switch(&stack_pointer_, scheduler_pointer_);
  __builtin_unreachable();
}

void Fiber::resume() {
  entering = this;
  leave(&scheduler_fake_stack_, stack_ + kPage, kStack);
  ceg_sim_switch(&scheduler_pointer_, stack_pointer_);
  arrive(scheduler_fake_stack_, nullptr, nullptr);
}

void Fiber::suspend() {
  leave(&fake_stack_, scheduler_bottom_, scheduler_size_);
  ceg_sim_switch(&stack_pointer_, scheduler_pointer_);
  arrive(fake_stack_, &scheduler_bottom_, &scheduler_size_);
}

}  // namespace ceg::sim
