#include <omp.h>

#include <algorithm>
#include <vector>

#include "../check.h"
#include "isa.h"
#include "moe.h"

namespace ceg {

// A counting sort: integers and scattered writes, which no ISA level does better than another.
void moe_index(const Tensor& expert_ids, const Tensor& slots, const Tensor& sources,
               const Tensor& offsets, int64_t capacity, int threads, const std::string& isa) {
  check_shape("expert_ids", expert_ids, {-1, -1});
  check_dtype("expert_ids", expert_ids, {DType::i32});
  check_rows("expert_ids", expert_ids);
  check_like("slots", slots, expert_ids);
  check_output("slots", slots);
  const int64_t tokens = expert_ids.shape[0], top_k = expert_ids.shape[1];
  const int64_t choices = tokens * top_k;
  check_shape("sources", sources, {choices});
  check_dtype("sources", sources, {DType::i32});
  check_output("sources", sources);
  check_shape("offsets", offsets, {-1});
  check_dtype("offsets", offsets, {DType::i32});
  check_output("offsets", offsets);
  CEG_CHECK(offsets.shape[0] > 0, "offsets must have shape (E + 1,), got (0,)");
  CEG_CHECK(capacity >= -1, "capacity must be >= 0, or -1 for none, got ", capacity);
  CEG_CHECK(choices <= INT32_MAX, "expert_ids must have at most 2^31 - 1 elements, got ", choices);
  const int64_t experts = offsets.shape[0] - 1;
  check_range("expert_ids", expert_ids, 0, experts);
  kernels(isa);  // refuses an unknown level here as everywhere

  const int64_t limit = capacity < 0 ? INT32_MAX : capacity;

  // Consecutive chunks of tokens, one a thread; any number of them gives the same order.
  const int64_t chunks = threads_for(expert_ids, threads);
  std::vector<int32_t> ranks(chunks * experts, 0);  // (chunk, expert)
  int32_t* const offset = offsets.ptr<int32_t>();
  int32_t* const source = sources.ptr<int32_t>();
  // visit(choices of token n, their slots, n)
  const auto for_tokens = [&](int64_t chunk, auto visit) {
    for (int64_t n = tokens * chunk / chunks; n < tokens * (chunk + 1) / chunks; ++n) {
      visit(expert_ids.ptr<int32_t>() + n * expert_ids.stride[0],
            slots.ptr<int32_t>() + n * slots.stride[0], n);
    }
  };

#pragma omp parallel num_threads(static_cast<int>(chunks))
  {
    // Count.
#pragma omp for schedule(static, 1)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      int32_t* count = ranks.data() + chunk * experts;
      for_tokens(chunk, [&](const int32_t* ids, int32_t*, int64_t) {
        for (int64_t k = 0; k < top_k; ++k) ++count[ids[k]];
      });
    }

    // Scan: counts become the number of choices of the same expert in the chunks before.
#pragma omp single
    {
      offset[0] = 0;
      for (int64_t e = 0; e < experts; ++e) {
        int32_t before = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const int32_t count = ranks[chunk * experts + e];
          ranks[chunk * experts + e] = before;
          before += count;
        }
        offset[e + 1] = offset[e] + static_cast<int32_t>(std::min<int64_t>(before, limit));
      }
    }

    // Place.
#pragma omp for schedule(static, 1) nowait
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      int32_t* rank = ranks.data() + chunk * experts;
      for_tokens(chunk, [&](const int32_t* ids, int32_t* slot, int64_t n) {
        for (int64_t k = 0; k < top_k; ++k) {
          const int32_t r = rank[ids[k]]++;
          slot[k] = r < limit ? offset[ids[k]] + r : -1;
          if (r < limit) source[slot[k]] = static_cast<int32_t>(n * top_k + k);
        }
      });
    }
#pragma omp for schedule(static)
    for (int64_t row = offset[experts]; row < choices; ++row) source[row] = -1;
  }
}

}  // namespace ceg
