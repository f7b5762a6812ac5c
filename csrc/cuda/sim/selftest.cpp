// Kernels with a known outcome, right and wrong, by which the tests judge the simulator itself.
#include "selftest.h"

#include "../../check.h"
#include "../launch.h"

namespace ceg::sim {
namespace {

constexpr unsigned kThreads = 96;

struct Tile {
  float values[kThreads];
};

// out[i] = sum over the block's threads of their own numbers.
__global__ void block_sum(float* out) {
  Tile& tile = ceg::shared_memory<Tile>();
  float sum = static_cast<float>(threadIdx.x);
  for (int bits = kWarp / 2; bits; bits /= 2) sum += __shfl_xor_sync(kFullWarp, sum, bits);
  if (threadIdx.x % kWarp == 0) tile.values[threadIdx.x / kWarp] = sum;
  __syncthreads();
  sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) sum += tile.values[warp];
  out[threadIdx.x] = sum;
}

// Reads what its neighbour may not have written yet.
__global__ void missing_barrier(float* out) {
  Tile& tile = ceg::shared_memory<Tile>();
  tile.values[threadIdx.x] = 1;
  out[threadIdx.x] = tile.values[kThreads - 1 - threadIdx.x];
}

__global__ void unwritten_shared(float* out) {
  out[threadIdx.x] = ceg::shared_memory<Tile>().values[threadIdx.x];
}

__global__ void divergent_barrier(float* out) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void too_few_at_a_barrier(float*) {
  if (threadIdx.x < kWarp) barrier_sync("bar.sync 1", 1, 2 * kWarp);
}

__global__ void nobody_waits(float*) { barrier_arrive("bar.arrive 2", 2, 2 * kThreads); }

__global__ void two_collectives(float* out) {
  if (threadIdx.x == 3) {
    __ballot_sync(kFullWarp, true);
  } else {
    out[threadIdx.x] = __shfl_sync(kFullWarp, 1.0f, 0);
  }
}

__global__ void misaligned(float* out) { __ldg(reinterpret_cast<const float4*>(out + 1)); }

// What AddressSanitizer is for.
__global__ void beyond_shared(float* out) {
  Tile& tile = ceg::shared_memory<Tile>();
  float* values = tile.values;
  values[threadIdx.x + 1] = 1;
  out[threadIdx.x] = 0;
}
__global__ void beyond_dynamic_shared(float* out) {
  reinterpret_cast<float*>(dynamic_shared_memory())[threadIdx.x + 1] = 1;
  out[threadIdx.x] = 0;
}
__global__ void beyond_the_output(float* out) { out[threadIdx.x + 1] = 0; }

struct Case {
  const char* name;
  void (*kernel)(float*);
};
constexpr Case kCases[] = {{"block_sum", block_sum},
                           {"missing_barrier", missing_barrier},
                           {"unwritten_shared", unwritten_shared},
                           {"divergent_barrier", divergent_barrier},
                           {"too_few_at_a_barrier", too_few_at_a_barrier},
                           {"nobody_waits", nobody_waits},
                           {"two_collectives", two_collectives},
                           {"misaligned", misaligned},
                           {"beyond_shared", beyond_shared},
                           {"beyond_dynamic_shared", beyond_dynamic_shared},
                           {"beyond_the_output", beyond_the_output}};

}  // namespace

void selftest(const std::string& kernel, const Tensor& out, int shared_bytes) {
  check_shape("out", out, {kThreads});
  check_dtype("out", out, {DType::f32});
  for (const Case& c : kCases) {
    if (c.name != kernel) continue;
    const Launch at{.name = c.name,
                    .grid = 2,
                    .block = kThreads,
                    .shared_bytes = static_cast<size_t>(shared_bytes)};
    return launch(at, c.kernel, out.ptr<float>());
  }
  ceg::fail("kernel must be one of those in selftest.cpp, got ", kernel);
}

float through_16_bits(float value, const std::string& type) {
  CEG_CHECK(type == "bfloat16" || type == "float16", "type must be bfloat16 or float16, got ",
            type);
  return type == "float16" ? __half2float(__float2half_rn(value))
                           : __bfloat162float(__float2bfloat16_rn(value));
}

}  // namespace ceg::sim
