// Memory of a thread and views of rows, for the kernels of both directions.
#pragma once

#include <cstdlib>
#include <new>

#include "attention.h"
#include "attention_gemm.h"

namespace ceg::CEG_ISA {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Grows and never shrinks, one a thread: a fresh mmap for each call would cost its page faults.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { std::free(data_); }

  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = round_up(bytes, 4096);
      data_ = static_cast<char*>(std::aligned_alloc(4096, static_cast<size_t>(size_)));
      if (data_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  int64_t size_ = 0;
};

// Hands out consecutive cache-line aligned pieces; with a null base it only counts.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}

  template <class T>
  T* take(int64_t n) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += round_up(n * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Rows of one head in memory.
struct Rows {
  void* data;
  int64_t stride;  // items
  int64_t count;
  int64_t width;
};

// `count` rows of `width` items from `row` on, of one sequence and head.
inline Rows rows_of(const AttentionProblem& p, const AttentionView& view, int64_t batch,
                    int64_t row, int64_t head, int64_t count, int64_t width) {
  const int64_t first = batch * view.batch + row * view.row + head * view.head;
  return {static_cast<char*>(view.data) + first * item_size(p.dtype), view.row, count, width};
}

// Extents of the packed operands.
template <class E>
struct Sizes {
  static constexpr int64_t kLane = kLanes<typename E::Compute>;
  static constexpr int64_t kWidth = E::kAlign > kLane ? E::kAlign : kLane;

  int64_t q_steps, v_steps;  // of dot products over D and Dv
  int64_t q_width, v_width;  // D and Dv in whole vectors and multiples of kAlign

  explicit Sizes(const AttentionProblem& p)
      : q_steps(round_up(p.head_dim, E::kAlign) / E::kDepth),
        v_steps(round_up(p.value_dim, E::kAlign) / E::kDepth),
        q_width(round_up(p.head_dim, kWidth)),
        v_width(round_up(p.value_dim, kWidth)) {}
};

}  // namespace ceg::CEG_ISA
