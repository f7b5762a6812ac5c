// Flash attention backward for sm_90a: dK and dV.
//
// A block of threads takes tile after tile of keys of one key head and visits the queries that see
// them, of all heads of the group: no atomics, and the sums in one order. All is transposed: a
// consumer has 64 keys, and what of probabilities and their gradients becomes an operand of dV and
// dK does so without leaving registers. Blocks of Q and dout, with lse and delta beside them,
// stream by.
#include "attention_sm90_dkdv.h"

#include "attention_sm90_launch.h"

namespace ceg::cuda {
namespace {

template <class T, int kD, bool kPlain>
using Consumer =
    std::conditional_t<(kD <= 128), NarrowConsumer<T, kD, kPlain>, WideConsumer<T, kPlain>>;

template <class Tile>
__device__ __forceinline__ void produce(const KeyArguments& args, const SharedTiles<Tile>& shared) {
  Producer<Tile> producer{shared};
  for_each_tile<Tile, Side::keys>(
      args.of.problem, args.of.of_keys,
      [&](const TileOf<Tile::kRows>& tile, const Partners& queries, int) {
        produce_of_keys<Tile>(producer, args, tile, queries);
      });
}

template <class T, int kD, bool kPlain>
__global__ void __launch_bounds__(KeyTile<kD, kPlain>::kThreads, 1)
    attention_sm90_bwd_dkdv_kernel(const __grid_constant__ KeyArguments args) {
#if CEG_SM90A
  using Shared = SharedTiles<KeyTile<kD, kPlain>>;
  run_roles<KeyTile<kD, kPlain>>(
      args, [&](const Shared& shared) { produce(args, shared); },
      [&](const Shared& shared) { Consumer<T, kD, kPlain>(shared, args.of).run(); });
#else
  __trap();  // code for another GPU must not leave the output as it was
#endif
}

}  // namespace

void attention_sm90_dkdv(const AttentionBwd& args, DType dtype, uintptr_t stream) {
  with_tile(dtype, args.problem, [&](auto item, auto head, auto plain) {
    using T = decltype(item);
    constexpr int kD = decltype(head)::kWidth;
    using Tile = KeyTile<kD, plain.value>;
    const MappedRows rows(args);
    KeyArguments all = {args,
                        {tensor_map("k", dtype, rows.k, 64), tensor_map("v", dtype, rows.v, 64)},
                        {tensor_map("q", dtype, rows.q, Tile::kBlock),
                         tensor_map("dout", dtype, rows_of_dout(args), Tile::kBlock)}};
    launch_persistent<Tile>("attention_sm90_bwd_dkdv_kernel",
                            attention_sm90_bwd_dkdv_kernel<T, kD, plain.value>, all, all.of.of_keys,
                            args.problem.max_k, stream);
  });
}

void list_attention_sm90_dkdv(Kernels& kernels) {
  list_tiles<KeyTile>(
      kernels, "attention_sm90_bwd_dkdv_kernel", [](auto item, auto head, auto plain) {
        return attention_sm90_bwd_dkdv_kernel<decltype(item), decltype(head)::kWidth, plain.value>;
      });
}

}  // namespace ceg::cuda
