// Flash attention backward for sm_90a: dQ.
//
// A block of threads takes tile after tile of 128 queries of one head and visits the keys that they
// see. A consumer has 64 queries; gradients of scores become an operand of dQ without leaving
// registers. Blocks of K and V stream by.
#include "attention_backward.h"
#include "attention_sm90.h"
#include "attention_sm90_launch.h"

namespace ceg::cuda {
namespace {

enum : int { kQ, kDout };       // what is held
enum : int { kKeys, kValues };  // what streams by
using Arguments = Sm90Arguments<AttentionBwd, 2>;

// Chosen with the compiler's report, measured on no GPU.
template <int kD, bool kPlain>
using QueryTile = Sm90Tile<kD, kD <= 128 ? 128 : 64, 2, kD <= 64 ? 4 : 2, 0, kD <= 128 ? 0 : 1>;

// What a consumer does with its 64 queries of a tile.
template <class T, int kD, bool kPlain>
struct Consumer : Reader<QueryTile<kD, kPlain>> {
  using Tile = QueryTile<kD, kPlain>;
  using Base = Reader<Tile>;
  using Base::index, Base::warp_row, Base::held, Base::streamed;
  using Own = typename Tile::Own;
  using Block = typename Tile::Block;
  using Queries = TileOf<Tile::kRows>;
  static constexpr int kN = Tile::kBlock;
  using Dots = float[1][kN / 8][4];
  using Operand = uint32_t[1][kN / 16][4];
  using Gradient = float[1][kD / 8][4];

  const AttentionBwd& args;

  __device__ __forceinline__ Consumer(const SharedTiles<Tile>& shared, const AttentionBwd& args)
      : Base{shared}, args(args) {}

  // Of the thread's two rows.
  struct Statistics {
    float2 lse_delta[2];

    __device__ __forceinline__ Statistics(const AttentionBwd& args, const Queries& tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = tile.first + warp_row() + row_of(thread_index() % kWarp, 0, 2 * half);
        const int64_t row = tile.at.first_q + i;
        lse_delta[half] = make_float2(kInf, 0);
        if (i < tile.at.n_q) {
          lse_delta[half].x = finite_or_blind(*rows_of<const float>(args.lse, tile.b, row, tile.h));
          lse_delta[half].y = *rows_of<const float>(args.delta, tile.b, row, tile.h);
        }
      }
    }
  };

  // Scores and dout.v of the pairs become probabilities and gradients of scores.
  __device__ __forceinline__ void weigh(Dots& s, Dots& dp, const Queries& tile, int block,
                                        const Logit& logit, const Statistics& of_rows) const {
    const Meeting meeting = Meeting::of<Side::queries>(args.problem, tile.at);
    const int row = tile.first + warp_row(), last = least(row + 16, tile.at.n_q) - 1;
    const bool masked = meeting.partners<kN>(row, last).masked(block);
    differentiate<kPlain>(s, dp, meeting, row, block, masked, args.problem, logit,
                          [&](int, int, int i) { return of_rows.lse_delta[i / 2]; });
  }

  // dQ of all blocks of keys, of which there are some.
  __device__ __forceinline__ void visit(const Queries& tile, const Partners& keys, Gradient& dq) {
    const Statistics of_rows(args, tile);
    const Logit logit(args.problem, tile.b, tile.h);
    float lost[1][2] = {};
    Base::take_turn();
    for (int block = keys.start; block < keys.stop; block += kN) {
      if (block > keys.start) Base::release(kKeys);
      Base::wait_for(kKeys);
      Base::wait_for(kValues);
      const int there = tile.at.n_k - block;
      if (args.problem.cu_q && there < kN) Base::clear_rows(there, kKeys, kValues);
      Dots s, dp;
      wgmma_fence(s[0], dp[0]);
      issue_product_of_rows<T, Own, Block>(s[0], held(kQ), streamed(kKeys));
      issue_product_of_rows<T, Own, Block>(dp[0], held(kDout), streamed(kValues));
      wgmma_commit();
      Base::pass_turn();
      wgmma_wait<0>(s[0], dp[0]);
      Base::release(kValues);
      weigh(s, dp, tile, block, logit, of_rows);

      Operand ds;
      to_operand<T>(ds, dp);
      add_lost<T>(lost, dp, ds);
      Base::take_turn();  // for these products and the next block's
      wgmma_fence(dq[0], ds[0]);
      issue_product<T, Block>(dq[0], ds[0], streamed(kKeys));
      wgmma_commit();
      wgmma_wait<0>(dq[0], ds[0]);
    }

    // What rounding has lost, to the first key of the last block.
    uint32_t operand[1][1][4];
    to_operand_of_one<T>(operand, lost);
    wgmma_fence(dq[0], operand[0]);
    issue_product<T, Block>(dq[0], operand[0], streamed(kKeys));
    wgmma_commit();
    Base::pass_turn();
    wgmma_wait<0>(dq[0], operand[0]);
    Base::release(kKeys);
  }

  // Through the place of this warpgroup's queries.
  __device__ __forceinline__ void write(const Queries& tile, const Gradient& dq) const {
    const Attention& p = args.problem;
    const auto [b, h, first, at] = tile;
    const int before = 64 * index(), rows = at.n_q - first - before;
    const float scale[1][2] = {{p.scale, p.scale}};
    Base::meet();  // all warps have read Q
    store_rows<T, kD, 1, kD>(dq, scale, held(kQ), Base::own_row(), 0,
                             rows_of<T>(args.dq, b, at.first_q + first + before, h), args.dq.row,
                             rows, p.head_dim);
  }

  __device__ __forceinline__ void run() {
    const auto of_tile = [&](const Queries& tile, const Partners& keys, int) {
      Gradient dq;
      clear(dq);
      Base::wait_for_held();
      if (keys.start < keys.stop) visit(tile, keys, dq);
      write(tile, dq);
      Base::release_held();
    };
    Base::in_turns(
        [&] { for_each_tile<Tile, Side::queries>(args.problem, args.of_queries, of_tile); });
  }
};

template <class Tile>
__device__ __forceinline__ void produce(const Arguments& args, const SharedTiles<Tile>& shared) {
  const Attention& p = args.of.problem;
  Producer<Tile> producer{shared};
  const auto of_tile = [&](const TileOf<Tile::kRows>& tile, const Partners& keys, int) {
    const int batch = p.cu_q ? 0 : tile.b, kv_head = tile.h / p.group();
    const auto load = [&](int block) {
      for (const int tensor : {kKeys, kValues}) {
        producer.stream(tensor, args.streamed[tensor], tile.at.first_k + block, kv_head, batch);
      }
    };
    // Keys first: they find room while the tile before still keeps the place of Q and dout.
    if (keys.start < keys.stop) load(keys.start);
    producer.hold(args.held, tile.at.first_q + tile.first, tile.h, batch);
    for (int block = keys.start + Tile::kBlock; block < keys.stop; block += Tile::kBlock) {
      load(block);
    }
  };
  for_each_tile<Tile, Side::queries>(p, args.of.of_queries, of_tile);
}

template <class T, int kD, bool kPlain>
__global__ void __launch_bounds__(QueryTile<kD, kPlain>::kThreads, 1)
    attention_sm90_bwd_dq_kernel(const __grid_constant__ Arguments args) {
#if CEG_SM90A
  using Shared = SharedTiles<QueryTile<kD, kPlain>>;
  run_roles<QueryTile<kD, kPlain>>(
      args, [&](const Shared& shared) { produce(args, shared); },
      [&](const Shared& shared) { Consumer<T, kD, kPlain>(shared, args.of).run(); });
#else
  __trap();  // code for another GPU must not leave the output as it was
#endif
}

}  // namespace

void attention_sm90_dq(const AttentionBwd& args, DType dtype, uintptr_t stream) {
  with_tile(dtype, args.problem, [&](auto item, auto head, auto plain) {
    using T = decltype(item);
    constexpr int kD = decltype(head)::kWidth;
    using Tile = QueryTile<kD, plain.value>;
    const MappedRows rows(args);
    Arguments all = {
        args,
        {tensor_map("q", dtype, rows.q, 64), tensor_map("dout", dtype, rows_of_dout(args), 64)},
        {tensor_map("k", dtype, rows.k, Tile::kBlock),
         tensor_map("v", dtype, rows.v, Tile::kBlock)}};
    launch_persistent<Tile>("attention_sm90_bwd_dq_kernel",
                            attention_sm90_bwd_dq_kernel<T, kD, plain.value>, all,
                            all.of.of_queries, args.problem.max_q, stream);
  });
}

void list_attention_sm90_dq(Kernels& kernels) {
  list_tiles<QueryTile>(
      kernels, "attention_sm90_bwd_dq_kernel", [](auto item, auto head, auto plain) {
        return attention_sm90_bwd_dq_kernel<decltype(item), decltype(head)::kWidth, plain.value>;
      });
}

}  // namespace ceg::cuda
