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

using Arguments = Sm90Arguments<AttentionBwd, 2>;

template <class T, int kD, bool kPlain>
using Consumer =
    std::conditional_t<(kD <= 128), NarrowConsumer<T, kD, kPlain>, WideConsumer<T, kPlain>>;

// lse and delta of a block of queries: each lane brings those that it has room for.
template <class Tile>
struct Statistics {
  static constexpr int kOfLane = Tile::kBlock / kWarp;
  float2 lse_delta[kOfLane];

  // Of queries below `stop`: others have no probability, of which a gradient would be 0.
  __device__ __forceinline__ Statistics(const AttentionBwd& args, const TileOf<Tile::kRows>& tile,
                                        int h, int block, int stop) {
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int query = block + thread_index() % kWarp + i * kWarp;
      const int64_t row = tile.at.first_q + query;
      lse_delta[i] = make_float2(kInf, 0);
      if (query < stop) {
        lse_delta[i].x = finite_or_blind(*rows_of<const float>(args.lse, tile.b, row, h));
        lse_delta[i].y = *rows_of<const float>(args.delta, tile.b, row, h);
      }
    }
  }

  __device__ __forceinline__ void write(SharedAddress to) const {
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      shared_pointer<float2>(to)[thread_index() % kWarp + i * kWarp] = lse_delta[i];
    }
    __syncwarp();  // before one thread says so for all
  }
};

template <class Tile>
__device__ __forceinline__ void produce(const Arguments& args, const SharedTiles<Tile>& shared) {
  const Attention& p = args.of.problem;
  Producer<Tile> producer{shared};
  const auto of_tile = [&](const TileOf<Tile::kRows>& tile, const Partners& queries, int) {
    const int batch = p.cu_q ? 0 : tile.b, first_head = tile.h * p.group();
    const auto load = [&](int h, int block) {
      const int row = tile.at.first_q + block;
      const Statistics<Tile> statistics(args.of, tile, h, block, queries.stop);
      producer.wait_for_room(kQueries);
      statistics.write(shared.beside(producer.place[kQueries].stage));
      producer.fill(kQueries, args.streamed[kQueries], row, h, batch);
      producer.stream(kDout, args.streamed[kDout], row, h, batch);
    };
    // Queries first: they find room while the tile before still keeps the place of K and V.
    const bool any = queries.start < queries.stop;
    if (any) load(first_head, queries.start);
    producer.hold(args.held, tile.at.first_k + tile.first, tile.h, batch);
    for (int h = first_head; any && h < first_head + p.group(); ++h) {
      const int start = queries.start + (h == first_head ? Tile::kBlock : 0);
      for (int block = start; block < queries.stop; block += Tile::kBlock) load(h, block);
    }
  };
  for_each_tile<Tile, Side::keys>(p, args.of.of_keys, of_tile);
}

template <class T, int kD, bool kPlain>
__global__ void __launch_bounds__(KeyTile<kD, kPlain>::kThreads, 1)
    attention_sm90_bwd_dkdv_kernel(const __grid_constant__ Arguments args) {
#if CEG_SM90A
  using Shared = SharedTiles<KeyTile<kD, kPlain>>;
  run_roles<KeyTile<kD, kPlain>>(
      args, [&](const Shared& shared) { produce(args, shared); },
      [&](const Shared& shared) { Consumer<T, kD, kPlain>(shared, args.of).run(); });
#endif
}

}  // namespace

void attention_sm90_dkdv(const AttentionBwd& args, DType dtype, uintptr_t stream) {
  with_tile(dtype, args.problem, [&](auto item, auto head, auto plain) {
    using T = decltype(item);
    constexpr int kD = decltype(head)::kWidth;
    using Tile = KeyTile<kD, plain.value>;
    const MappedRows rows(args);
    Arguments all = {args,
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
