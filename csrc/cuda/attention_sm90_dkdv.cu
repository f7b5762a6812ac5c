// Flash attention backward for sm_90a: dK and dV.
//
// A block of threads takes tile after tile of 128 keys of one key head and visits the queries that
// see them, of all heads of the group: no atomics, and the sums in one order. All is transposed: a
// consumer has 64 keys, and what of probabilities and their gradients becomes an operand of dV and
// dK does so without leaving registers. Blocks of Q and dout, with lse and delta beside them,
// stream by.
#include "attention_backward.h"
#include "attention_sm90.h"
#include "attention_sm90_launch.h"

namespace ceg::cuda {
namespace {

constexpr int kK = 0, kV = 1;           // what is held
constexpr int kQueries = 0, kDout = 1;  // what streams by
using Arguments = Sm90Arguments<AttentionBwd, 2>;

// Chosen with the compiler's report, measured on no GPU.
template <int kD, bool kPlain>
using KeyTile = Sm90Tile<kD, 64, 2, 4, sizeof(float2)>;

// What a consumer does with its 64 keys of a tile.
template <class T, int kD, bool kPlain>
struct Consumer : Reader<KeyTile<kD, kPlain>> {
  using Tile = KeyTile<kD, kPlain>;
  using Base = Reader<Tile>;
  using Base::index, Base::warp_row, Base::held, Base::streamed;
  using Keys = TileOf<Tile::kRows>;
  static constexpr int kM = Tile::kBlock;
  using Dots = float[1][kM / 8][4];
  using Operand = uint32_t[1][kM / 16][4];
  using Gradient = float[1][kD / 8][4];

  const AttentionBwd& args;

  __device__ __forceinline__ Consumer(const SharedTiles<Tile>& shared, const AttentionBwd& args)
      : Base{shared}, args(args) {}

  // Scores and dout.v of the pairs become probabilities and gradients of scores.
  __device__ __forceinline__ void weigh(Dots& s, Dots& dp, const Keys& tile, int block,
                                        const Logit& logit) const {
    const Meeting meeting = Meeting::of<Side::keys>(args.problem, tile.at);
    const int row = tile.first + warp_row(), last = least(row + 16, tile.at.n_k) - 1;
    const bool masked = meeting.partners<kM>(row, last).masked(block);
    const SharedAddress beside = Base::shared.beside(Base::place[kQueries].stage);
    const float2* const lse_delta = shared_pointer<const float2>(beside);
    const int lane = thread_index() % kWarp;
    differentiate<kPlain>(s, dp, meeting, row, block, masked, args.problem, logit,
                          [&](int, int n, int i) { return lse_delta[column_of(lane, n, i)]; });
  }

  // dV and dK of a block of queries; it is this consumer's turn.
  __device__ __forceinline__ void visit(const Keys& tile, int block, const Logit& logit,
                                        Gradient& dk, Gradient& dv) const {
    using Own = typename Tile::Own;
    using Block = typename Tile::Block;
    const int there = tile.at.n_q - block;
    if (args.problem.cu_q && there < kM) Base::clear_rows(there, kQueries, kDout);
    Dots s, dp;
    wgmma_fence(s[0], dp[0]);
    issue_product_of_rows<T, Own, Block>(s[0], held(kK), streamed(kQueries));
    issue_product_of_rows<T, Own, Block>(dp[0], held(kV), streamed(kDout));
    wgmma_commit();
    Base::pass_turn();
    wgmma_wait<0>(s[0], dp[0]);
    weigh(s, dp, tile, block, logit);

    Operand p, ds;
    to_operand<T>(p, s);
    to_operand<T>(ds, dp);
    Base::take_turn();  // for these products and the next block's
    wgmma_fence(dv[0], dk[0], p[0], ds[0]);
    issue_product<T, Block>(dv[0], p[0], streamed(kDout));
    issue_product<T, Block>(dk[0], ds[0], streamed(kQueries));
    wgmma_commit();
    wgmma_wait<0>(dv[0], dk[0], p[0], ds[0]);
  }

  // Through the places of this warpgroup's keys and values.
  __device__ __forceinline__ void write(const Keys& tile, const Gradient& dk,
                                        const Gradient& dv) const {
    const Attention& p = args.problem;
    const auto [b, h, first, at] = tile;
    const int before = 64 * index(), rows = at.n_k - first - before;
    const int first_row = at.first_k + first + before;
    const float scale[1][2] = {{p.scale, p.scale}}, one[1][2] = {{1, 1}};
    Base::meet();  // all warps have read K and V
    store_rows<T, kD, 1, kD>(dk, scale, held(kK), Base::own_row(), 0,
                             rows_of<T>(args.dk, b, first_row, h), args.dk.row, rows, p.head_dim);
    store_rows<T, kD, 1, kD>(dv, one, held(kV), Base::own_row(), 0,
                             rows_of<T>(args.dv, b, first_row, h), args.dv.row, rows, p.value_dim);
  }

  __device__ __forceinline__ void run() {
    const Attention& p = args.problem;
    const auto of_tile = [&](const Keys& tile, const Partners& queries, int block_of_threads) {
      Gradient dk, dv;
      clear(dk);
      clear(dv);
      Base::wait_for_held();
      const bool any = queries.start < queries.stop;
      if (any) Base::take_turn();
      for (int h = tile.h * p.group(); h < (tile.h + 1) * p.group(); ++h) {
        const Logit logit(p, tile.b, h);
        for (int block = queries.start; block < queries.stop; block += kM) {
          Base::place[kDout] = Base::place[kQueries];  // always; known, it takes fewer registers
          Base::wait_for(kQueries);
          Base::wait_for(kDout);
          visit(tile, block, logit, dk, dv);
          Base::release(kQueries);
          Base::release(kDout);
        }
      }
      if (any) Base::pass_turn();
      write(tile_of<Tile, Side::keys>(p, args.of_keys, again(block_of_threads)), dk, dv);
      Base::release_held();
    };
    Base::in_turns([&] { for_each_tile<Tile, Side::keys>(p, args.of_keys, of_tile); });
  }
};

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
  with_tile<kWidestSm90Bwd>(dtype, args.problem, [&](auto item, auto head, auto plain) {
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
  list_tiles<KeyTile, kWidestSm90Bwd>(
      kernels, "attention_sm90_bwd_dkdv_kernel", [](auto item, auto head, auto plain) {
        return attention_sm90_bwd_dkdv_kernel<decltype(item), decltype(head)::kWidth, plain.value>;
      });
}

}  // namespace ceg::cuda
