// What the consumers of the sm_90a dK and dV kernel do (attention_sm90_dkdv.cu).
#pragma once

#include <type_traits>

#include "attention_sm90_keys.h"

namespace ceg::cuda {

// Heads of up to 128: a consumer has 64 keys, K and V and both sums. Chosen with the compiler's
// report, measured on no GPU.
template <int kD>
using NarrowKeyTile = Sm90Tile<kD, 64, 2, 4, sizeof(float2)>;

// Wider ones, whose sums are more registers than a consumer has: both share 64 keys. The first has
// K and the sums of dV, the second V and those of dK. S' = K Q' and dV += P' dout are as many
// products as dP' = V dout' and dK += dS' Q. For dS a thread of the first hands P, in fp32, to that
// of the second with the same pairs.
struct WideKeyTile : Sm90Tile<256, 64, 2, 2, sizeof(float2), 0, 64> {
  static constexpr int kHanded = Sm90Tile::kSharedBytes;
  static_assert(kHanded % sizeof(float4) == 0, "vectors are aligned");
  static constexpr int kSharedBytes = kHanded + kRows * kBlock * static_cast<int>(sizeof(float));
  static_assert(kSharedBytes <= 227 << 10, "sm_90 has no more");
  static_assert(kConsumers == 2 && kHeld == 2, "one has K and dV, the other V and dK");
};

template <int kD, bool kPlain>
using KeyTile = std::conditional_t<(kD <= 128), NarrowKeyTile<kD>, WideKeyTile>;

template <class T, int kD, bool kPlain>
struct NarrowConsumer : KeyReader<NarrowKeyTile<kD>> {
  using Base = KeyReader<NarrowKeyTile<kD>>;
  using Base::args, Base::held, Base::streamed;
  using typename Base::Dots, typename Base::Operand, typename Base::Keys;
  using Block = typename Base::Tile::Block;
  using Gradient = float[1][kD / 8][4];
  using Base::Base;

  // dV and dK of a block of queries; it is this consumer's turn.
  __device__ __forceinline__ void visit(const Keys& tile, int block, const Logit& logit,
                                        Gradient& dk, Gradient& dv) const {
    Dots s, dp;
    Base::template score<T>(s, dp);
    const float2* const lse_delta = Base::lse_delta();
    Base::template weigh<kPlain>(s, dp, tile, Base::warp_row(), block, logit,
                                 [&](int query) { return lse_delta[query]; });

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

  __device__ __forceinline__ void run() {
    const Attention& p = args.problem;
    const auto of_tile = [&](const Keys& tile, const Partners& queries, int block_of_threads) {
      Gradient dk, dv;
      clear(dk);
      clear(dv);
      Base::wait_for_held();
      const bool any = queries.start < queries.stop;
      if (any) Base::take_turn();
      Base::for_each_block(
          tile, queries, [&](int block, const Logit& logit) { visit(tile, block, logit, dk, dv); });
      if (any) Base::pass_turn();
      const Keys same =
          tile_of<typename Base::Tile, Side::keys>(p, args.of_keys, again(block_of_threads));
      const int before = 64 * Base::index();
      Base::meet();  // all warps have read K and V
      Base::template store<T, kD>(dk, p.scale, held(kK), args.dk, p.head_dim, same, before);
      Base::template store<T, kD>(dv, 1, held(kV), args.dv, p.value_dim, same, before);
      Base::release_held();
    };
    Base::in_turns(
        [&] { for_each_tile<typename Base::Tile, Side::keys>(p, args.of_keys, of_tile); });
  }
};

// A turn is at the place through which probabilities are handed.
template <class T, bool kPlain>
struct WideConsumer : KeyReader<WideKeyTile> {
  using Base = KeyReader<WideKeyTile>;
  using Own = Tile::Own;
  using Block = Tile::Block;
  static constexpr int kD = 256;
  using Gradient = float[1][kD / 8][4];
  using Base::Base;

  // The first four pairs of this thread; the next four are kWarpgroup vectors further.
  __device__ __forceinline__ float4* handed() const {
    return shared_pointer<float4>(shared.base + Tile::kHanded) + thread_index() % kWarpgroup;
  }

  // Scores become probabilities; these, times the softcap's derivative, are handed over.
  __device__ __forceinline__ void weigh_and_hand(Dots& s, const Keys& tile, int block,
                                                 const Logit& logit) const {
    Dots slope;
#pragma unroll
    for (int n = 0; n < kM / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) slope[0][n][i] = 1;
    }
    const float2* const of_query = lse_delta();
    Base::template weigh<kPlain>(s, slope, tile, own_row(), block, logit,
                                 [&](int query) { return make_float2(of_query[query].x, 0); });
    take_turn();
#pragma unroll
    for (int n = 0; n < kM / 8; ++n) {
      const float (&x)[4] = slope[0][n];
      handed()[n * kWarpgroup] = make_float4(x[0], x[1], x[2], x[3]);
    }
    pass_turn();
  }

  // dout.v becomes gradients of scores.
  __device__ __forceinline__ void weigh_by_handed(Dots& dp) const {
    const int lane = thread_index() % kWarp;
    const float2* const of_query = lse_delta();
    take_turn();
#pragma unroll
    for (int n = 0; n < kM / 8; ++n) {
      const float4 x = handed()[n * kWarpgroup];
      const float slope[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        dp[0][n][i] = slope[i] * (dp[0][n][i] - of_query[column_of(lane, n, i)].y);
      }
    }
    pass_turn();
  }

  // dV or dK of a block of queries.
  __device__ __forceinline__ void visit(const Keys& tile, int block, const Logit& logit,
                                        Gradient& sums) const {
    // One stage for both, not streamed(mine): `place` at an index that is known only at run time
    // would be on the stack.
    const int mine = index() == 0 ? kQueries : kDout, stage = place[kQueries].stage;
    Dots dots;
    wgmma_fence(dots[0]);
    issue_product_of_rows<T, Own, Block>(dots[0], shared.held(index(), 0),
                                         shared.streamed(mine, stage));
    wgmma_commit();
    wgmma_wait<0>(dots[0]);
    if (mine == kQueries) {
      weigh_and_hand(dots, tile, block, logit);
    } else {
      weigh_by_handed(dots);
    }

    Operand operand;
    to_operand<T>(operand, dots);
    wgmma_fence(sums[0], operand[0]);
    issue_product<T, Block>(sums[0], operand[0], shared.streamed(1 - mine, stage));
    wgmma_commit();
    wgmma_wait<0>(sums[0], operand[0]);
  }

  __device__ __forceinline__ void run() {
    const Attention& p = args.problem;
    const auto of_tile = [&](const Keys& tile, const Partners& queries, int) {
      Gradient sums;
      clear(sums);
      wait_for_held();
      for_each_block(tile, queries,
                     [&](int block, const Logit& logit) { visit(tile, block, logit, sums); });
      const bool of_v = index() == 0;
      meet();  // all of its warps have read K, or V
      store<T, kD>(sums, of_v ? 1 : p.scale, shared.held(index(), 0), of_v ? args.dv : args.dk,
                   of_v ? p.value_dim : p.head_dim, tile, 0);
      release_held();
    };
    in_turns([&] { for_each_tile<Tile, Side::keys>(p, args.of_keys, of_tile); });
  }
};

}  // namespace ceg::cuda
