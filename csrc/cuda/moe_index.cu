// A stable counting sort of choices by expert.
//
// A block has a chunk of consecutive choices, a warp of it a part of the chunk, 32 choices at a
// time. Lanes with the same expert find each other (__match_any_sync), so that each choice knows
// its rank among them, and the first of them alone counts for all: no atomics, and the order is
// that of the choices. Count by (warp, expert); sum the counts of the warps and blocks before;
// count again, and place. A single block needs one launch, more need two.
#include <algorithm>

#include "../check.h"
#include "kernels.h"
#include "launch.h"
#include "moe.h"
#include "reduce.h"

namespace ceg::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int64_t kAlone = 8192;  // choices that one block sorts faster than a second launch starts
constexpr int64_t kChunk = 2048;  // a block's choices beyond that, while there are few
constexpr int64_t kMostBlocks = 64;  // each block reads all counts

struct Index {
  const int* ids;  // (N, K), rows ids_stride apart
  int *slots, *sources, *offsets, *counts;
  int64_t ids_stride, slots_stride;
  int64_t choices, chunk;
  int top_k, experts, warps;  // warps that have a table in shared memory
  int limit;
};

// Shared memory: table (warps, E), then firsts (E).
__device__ __forceinline__ int* table_of(const Index& a, int warp) {
  return reinterpret_cast<int*>(dynamic_shared_memory()) + warp * a.experts;
}

__device__ __forceinline__ int64_t at(const Index& a, int64_t choice, int64_t stride) {
  const int64_t n = choice / a.top_k;
  return n * stride + (choice - n * a.top_k);
}

// Calls visit(choice, expert, rank, same) for each choice of the calling warp in order; `rank` is
// that among the same expert's choices of this warp's table, which counts them.
template <class Visit>
__device__ __forceinline__ void for_each_choice(const Index& a, Visit visit) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (warp >= a.warps) return;
  int* table = table_of(a, warp);
  const int64_t part = (a.chunk + a.warps * kWarp - 1) / (a.warps * kWarp) * kWarp;
  const int64_t chunk_end = (blockIdx.x + int64_t{1}) * a.chunk;
  const int64_t first = blockIdx.x * a.chunk + warp * part;
  const int64_t stop = first + part < chunk_end ? first + part : chunk_end;
  const int64_t end = stop < a.choices ? stop : a.choices;
  for (int64_t start = first; start < end; start += kWarp) {
    const int64_t choice = start + lane;
    int expert = choice < end ? a.ids[at(a, choice, a.ids_stride)] : -1;
    if (expert >= a.experts) expert = -1;
    const unsigned same = __match_any_sync(kFullWarp, expert);
    const int before = __popc(same & ((1u << lane) - 1));
    const int rank = expert < 0 ? 0 : table[expert] + before;
    __syncwarp();
    if (expert >= 0 && before == 0) table[expert] += __popc(same);
    __syncwarp();
    if (choice < end) visit(choice, expert, rank);
  }
}

__device__ __forceinline__ void count(const Index& a) {
  for (int i = threadIdx.x; i < a.warps * a.experts; i += kThreads) table_of(a, 0)[i] = 0;
  __syncthreads();
  for_each_choice(a, [](int64_t, int, int) {});
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads, resident(kThreads, 64))
    moe_index_count_kernel(const Index a) {
  count(a);
  for (int expert = threadIdx.x; expert < a.experts; expert += kThreads) {
    int sum = 0;
    for (int warp = 0; warp < a.warps; ++warp) sum += table_of(a, warp)[expert];
    a.counts[static_cast<int64_t>(blockIdx.x) * a.experts + expert] = sum;
  }
}

struct Scan {
  int warps[2][kThreads / kWarp];
  int carried;
};

// The sum of `value` over the threads before the calling one; `total` over all. `turn` as in
// BlockSum.
__device__ __forceinline__ int exclusive_scan(Scan& scan, int turn, int value, int& total) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int sum = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(kFullWarp, sum, step);
    if (lane >= step) sum += other;
  }
  int* warps = scan.warps[turn & 1];
  if (lane == kWarp - 1) warps[warp] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kThreads / kWarp; ++w) {
    if (w < warp) before += warps[w];
    total += warps[w];
  }
  return before + sum - value;
}

// kOne: the only block, which has counted for itself alone.
template <bool kOne>
__global__ void __launch_bounds__(kThreads, resident(kThreads, 64))
    moe_index_place_kernel(const Index a) {
  count(a);
  int* firsts = table_of(a, a.warps);

  // Scan: the tables become ranks before this warp, firsts the first row of each expert.
  int filled = 0, turn = 0;
  for (int start = 0; start < a.experts; start += kThreads) {
    const int expert = start + static_cast<int>(threadIdx.x);
    int all = 0, before = 0;
    if (expert < a.experts) {
      if (!kOne) {
        for (unsigned block = 0; block < gridDim.x; ++block) {
          const int here = a.counts[static_cast<int64_t>(block) * a.experts + expert];
          if (block < blockIdx.x) before += here;
          all += here;
        }
      }
      for (int warp = 0; warp < a.warps; ++warp) {
        int& entry = table_of(a, warp)[expert];
        const int here = entry;
        entry = before;
        before += here;
      }
      if (kOne) all = before;
    }
    int total = 0;
    const int kept = all < a.limit ? all : a.limit;
    const int first = filled + exclusive_scan(shared_memory<Scan>(), turn++, kept, total);
    if (expert < a.experts) {
      firsts[expert] = first;
      if (blockIdx.x == 0) a.offsets[expert] = first;
    }
    filled += total;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) a.offsets[a.experts] = filled;
  __syncthreads();

  // Place. Rows behind the last expert's are nobody's slot.
  for_each_choice(a, [&](int64_t choice, int expert, int rank) {
    const bool kept = expert >= 0 && rank < a.limit;
    const int slot = kept ? firsts[expert] + rank : -1;
    a.slots[at(a, choice, a.slots_stride)] = slot;
    if (kept) a.sources[slot] = static_cast<int>(choice);
    if (choice >= filled) a.sources[choice] = -1;
  });
}

int64_t blocks_of(int64_t choices) {
  return choices <= kAlone ? 1 : std::min((choices + kChunk - 1) / kChunk, kMostBlocks);
}

}  // namespace

int64_t moe_index_rows(const Tensor& expert_ids) { return blocks_of(expert_ids.numel()); }

void moe_index(const Tensor& expert_ids, const Tensor& slots, const Tensor& sources,
               const Tensor& offsets, const Tensor& counts, int64_t capacity, uintptr_t stream) {
  check_shape("expert_ids", expert_ids, {-1, -1});
  check_dtype("expert_ids", expert_ids, {DType::i32});
  check_rows("expert_ids", expert_ids, launch_device("expert_ids", expert_ids));
  check_like("slots", slots, expert_ids);
  check_output("slots", slots, expert_ids.device);
  const int64_t choices = expert_ids.numel(), blocks = blocks_of(choices);
  check_shape("sources", sources, {choices});
  check_dtype("sources", sources, {DType::i32});
  check_output("sources", sources, expert_ids.device);
  check_shape("offsets", offsets, {-1});
  check_dtype("offsets", offsets, {DType::i32});
  check_output("offsets", offsets, expert_ids.device);
  const int64_t experts = offsets.shape[0] - 1;
  CEG_CHECK(experts >= 0 && experts <= kMostExperts,
            "offsets must have shape (E + 1,) with E in [0, ", kMostExperts, "], got ",
            shape_text(offsets));
  check_shape("counts", counts, {blocks, experts});
  check_dtype("counts", counts, {DType::i32});
  check_output("counts", counts, expert_ids.device);
  CEG_CHECK(counts.stride[0] == experts || blocks <= 1,
            "counts must be contiguous, got row stride ", counts.stride[0]);
  CEG_CHECK(capacity >= -1, "capacity must be >= 0, or -1 for none, got ", capacity);
  CEG_CHECK(choices <= INT32_MAX, "expert_ids must have at most 2^31 - 1 elements, got ", choices);

  constexpr int64_t kTables = 32 << 10;  // bytes; with firsts of 4096 experts 48 KiB
  const int64_t table = std::max<int64_t>(experts, 1) * static_cast<int64_t>(sizeof(int));
  const int64_t warps = std::clamp<int64_t>(kTables / table, 1, kThreads / kWarp);
  const Index a{
      .ids = expert_ids.ptr<int>(),
      .slots = slots.ptr<int>(),
      .sources = sources.ptr<int>(),
      .offsets = offsets.ptr<int>(),
      .counts = counts.ptr<int>(),
      .ids_stride = expert_ids.stride[0],
      .slots_stride = slots.stride[0],
      .choices = choices,
      .chunk = (choices + blocks - 1) / blocks,
      .top_k = static_cast<int>(std::max<int64_t>(expert_ids.shape[1], 1)),
      .experts = static_cast<int>(experts),
      .warps = static_cast<int>(warps),
      .limit = static_cast<int>(capacity < 0 ? INT32_MAX : std::min<int64_t>(capacity, INT32_MAX))};
  const OnDevice guard(expert_ids.device);
  Launch at{.name = "moe_index_place_kernel",
            .grid = static_cast<unsigned>(blocks),
            .block = kThreads,
            .shared_bytes = static_cast<size_t>((warps + 1) * table),
            .stream = stream};
  if (blocks == 1) return launch(at, moe_index_place_kernel<true>, a);
  at.name = "moe_index_count_kernel";
  launch(at, moe_index_count_kernel, a);
  at.name = "moe_index_place_kernel";
  launch(at, moe_index_place_kernel<false>, a);
}

void list_moe_index(Kernels& kernels) {
  add(kernels, "moe_index_count_kernel", "int32", 1, moe_index_count_kernel, kThreads);
  add(kernels, "moe_index_place_kernel", "int32", 1, moe_index_place_kernel<false>, kThreads);
  add(kernels, "moe_index_place_kernel", "int32", 1, moe_index_place_kernel<true>, kThreads,
      " alone");
}

}  // namespace ceg::cuda
