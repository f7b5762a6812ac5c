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
  const int64_t choices = expert_ids.numel(), top_k = expert_ids.shape[1];
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
  const auto id = [&](int64_t choice) {
    return expert_ids.ptr<int32_t>()[choice / top_k * expert_ids.stride[0] + choice % top_k];
  };
  const auto slot = [&](int64_t choice) -> int32_t& {
    return slots.ptr<int32_t>()[choice / top_k * slots.stride[0] + choice % top_k];
  };

  // Consecutive chunks of choices, one a thread; any number of them gives the same order.
  const int64_t chunks = threads_for(expert_ids, threads);
  std::vector<int32_t> ranks(chunks * experts, 0);  // (chunk, expert)
  int32_t* offset = offsets.ptr<int32_t>();
  const auto chunk_start = [&](int64_t chunk) { return choices * chunk / chunks; };

#pragma omp parallel num_threads(static_cast<int>(chunks))
  {
    // Count.
#pragma omp for schedule(static, 1)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      int32_t* count = ranks.data() + chunk * experts;
      for (int64_t c = chunk_start(chunk); c < chunk_start(chunk + 1); ++c) ++count[id(c)];
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
      for (int64_t c = chunk_start(chunk); c < chunk_start(chunk + 1); ++c) {
        const int32_t expert = id(c), r = rank[expert]++;
        slot(c) = r < limit ? offset[expert] + r : -1;
        if (r < limit) sources.ptr<int32_t>()[slot(c)] = static_cast<int32_t>(c);
      }
    }
#pragma omp for schedule(static)
    for (int64_t row = offset[experts]; row < choices; ++row) sources.ptr<int32_t>()[row] = -1;
  }
}

}  // namespace ceg
