// A product of two matrices by TMA and wgmma, right and with faults, by which the tests judge the
// simulation of asynchronous units.
#include "../../check.h"
#include "../launch.h"
#include "../tma.h"
#include "../wgmma.h"
#include "selftest.h"

namespace ceg {
namespace {

enum class Fault {
  none,
  no_barrier_wait,
  no_wgmma_wait,
  no_wgmma_fence,
  writes_accumulators,
  overwrites_operand,
  barrier_not_initialised,
  arrives_twice,
  expects_too_much
};

using Tile = Panels<64, 64>;

struct Arguments {
  TensorMap x;
  float* out;
};

// out = A B^T of the first and the last 64 rows of x.
template <Fault kFault>
__global__ void product(const __grid_constant__ Arguments args) {
  const SharedAddress a = shared_address(dynamic_shared_memory());
  const SharedAddress b = a + Tile::kBytes, barrier = b + Tile::kBytes;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    if (kFault != Fault::barrier_not_initialised) mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect_tx(barrier, (kFault == Fault::expects_too_much ? 3 : 2) * Tile::kBytes);
    if (kFault == Fault::arrives_twice) mbarrier_arrive(barrier);
    tma_load(a, args.x, barrier, 0, 0, 0, 0);
    tma_load(b, args.x, barrier, 0, 64, 0, 0);
  }
  __syncthreads();
  if (kFault != Fault::no_barrier_wait) mbarrier_wait(barrier, 0);
  float c[8][4];
  if (kFault != Fault::no_wgmma_fence) wgmma_fence(c);
  const uint64_t left = operand_of_rows<Tile>(descriptor_address(a));
  const uint64_t right = operand_of_rows<Tile>(descriptor_address(b));
  for (int step = 0; step < 4; ++step) {
    wgmma<f16>(c, step_of_rows<Tile>(left, step), step_of_rows<Tile>(right, step), step > 0);
  }
  wgmma_commit();
  if (kFault == Fault::writes_accumulators) c[0][0] = 0;
  if (kFault == Fault::overwrites_operand) {
    __syncthreads();
    *shared_pointer<float>(a + 4 * thread) = 0;
  }
  if (kFault != Fault::no_wgmma_wait) wgmma_wait<0>(c);
  for (int n = 0; n < 8; ++n) {
    for (int i = 0; i < 4; ++i) {
      const Position p = mma_c_position(thread % kWarp, i);
      args.out[(thread / kWarp * 16 + p.row) * 64 + 8 * n + p.column] = c[n][i];
    }
  }
}

struct Case {
  const char* name;
  void (*kernel)(Arguments);
};
constexpr Case kCases[] = {{"none", product<Fault::none>},
                           {"no_barrier_wait", product<Fault::no_barrier_wait>},
                           {"no_wgmma_wait", product<Fault::no_wgmma_wait>},
                           {"no_wgmma_fence", product<Fault::no_wgmma_fence>},
                           {"writes_accumulators", product<Fault::writes_accumulators>},
                           {"overwrites_operand", product<Fault::overwrites_operand>},
                           {"barrier_not_initialised", product<Fault::barrier_not_initialised>},
                           {"arrives_twice", product<Fault::arrives_twice>},
                           {"expects_too_much", product<Fault::expects_too_much>}};

}  // namespace

void sim::selftest_sm90(const std::string& fault, const Tensor& x, const Tensor& out) {
  check_dtype("x", x, {DType::f16});
  check_dtype("out", out, {DType::f32});
  check_shape("out", out, {64, 64});
  CEG_CHECK(x.ndim == 2, "x must have 2 dimensions, got ", x.ndim);
  const TensorOfRows rows = {x.data, x.shape[1], x.shape[0], 1, 1, x.stride[0], 0, 0};
  for (const Case& c : kCases) {
    if (c.name != fault) continue;
    const Arguments args = {tensor_map("x", x.dtype, rows, Tile::kRows), out.ptr<float>()};
    const Launch at{.name = c.name,
                    .grid = 1,
                    .block = kWarpgroup,
                    .shared_bytes = 2 * Tile::kBytes + sizeof(Mbarrier)};
    return launch(at, c.kernel, args);
  }
  ceg::fail("fault must be one of those in selftest_sm90.cpp, got ", fault);
}

}  // namespace ceg
