// What the consumers of the sm_90a one-pass backward do (attention_sm90_bwd.cu).
#pragma once

#include "attention_sm90_bwd_tile.h"

namespace ceg::cuda {

template <class T, int kD, bool kPlain>
struct OnePassConsumer : KeyReader<OnePassTile<kD>> {
  using Tile = OnePassTile<kD>;
  using Base = KeyReader<Tile>;
  using Base::args, Base::held, Base::streamed, Base::shared, Base::kM;
  using typename Base::Dots, typename Base::Operand, typename Base::Keys;
  using Own = typename Tile::Own;
  using Block = typename Tile::Block;
  using Scores = typename Tile::Scores;
  using OneKey = typename Tile::OneKey;
  using Gradient = float[1][kD / 8][4];
  static constexpr int kBothBarrier = 1 + 2 * Tile::kConsumers;  // beside the reader's

  ScoreRing<Tile> ring;

  __device__ __forceinline__ OnePassConsumer(const SharedTiles<Tile>& shared,
                                             const AttentionBwd& args)
      : Base(shared, args), ring{shared.base} {}

  // Where a block has one tile of sums the consumers add to it by turns. Always the same one for a
  // block, so that a thread reads back what it wrote itself: nobody waits for memory.
  static __device__ __forceinline__ bool adds(int block) {
    return kD > kSumColumns || block / kM % 2 == Base::index();
  }
  // All lanes write the same; a product or a __syncwarp stands between what they read and write.
  __device__ __forceinline__ Kept<Keys>& kept() const {
    return shared_pointer<Kept<Keys>>(shared.base + Tile::kKept)[thread_index() / kWarp - 4];
  }
  __device__ __forceinline__ float* sums_of(int h, int block) const {
    const int64_t tile = static_cast<int64_t>(block / kM) * args.problem.heads + h;
    return kept().slice + tile * (kM * kD);
  }
  // Vectors of this thread in such a tile, kWarpgroup from each other.
  static __device__ __forceinline__ float4* mine(float* sums) {
    const int panel = kD > kSumColumns ? Base::index() : 0;
    return reinterpret_cast<float4*>(sums) + panel * kSumVectors + thread_index() % kWarpgroup;
  }

  // Queries [first, stop) of all heads of the group have seen no key so far.
  __device__ __forceinline__ void clear_sums(const Keys& tile, int first, int stop) const {
    const int group = args.problem.group();
    for (int block = first; block < stop; block += kM) {
      for (int h = tile.h * group; adds(block) && h < (tile.h + 1) * group; ++h) {
        for (int n = 0; n < 8; ++n) {
          __stcg(mine(sums_of(h, block)) + n * kWarpgroup, make_float4(0, 0, 0, 0));
        }
      }
    }
  }

  // For dQ: the first key in each row of its tile, and zeros where this consumer's part of K
  // reaches into the next sequence, for a stranger's NaN times a gradient of 0 is NaN.
  __device__ __forceinline__ void prepare_keys(const Keys& tile) const {
    constexpr int kChunks = kD / 8;
#pragma unroll 1
    for (int i = thread_index() - kWarpgroup; i < OneKey::kRows * kChunks; i += 2 * kWarpgroup) {
      *shared_pointer<uint4>(shared.base + Tile::kOneKey +
                             OneKey::offset(i / kChunks, i % kChunks)) =
          *shared_pointer<const uint4>(shared.held(kK, 0) + Own::offset(0, i % kChunks));
    }
    const int own = tile.at.n_k - tile.first - 64 * Base::index();
    if (!args.problem.cu_k || own >= 64) return;
#pragma unroll 1
    for (int i = most(own, 0) * kChunks + thread_index() % kWarpgroup; i < 64 * kChunks;
         i += kWarpgroup) {
      *shared_pointer<uint4>(held(kK) + Own::offset(i / kChunks, i % kChunks)) =
          make_uint4(0, 0, 0, 0);
    }
    async_proxy_fence();
    Base::meet();
  }

  // Rows past the last key are zeros, or a stranger's: their weight need not be finite.
  __device__ __forceinline__ void drop_rows(Dots& dp, int rows) const {
    const int lane = thread_index() % kWarp;
#pragma unroll
    for (int n = 0; n < kM / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (row_of(lane, 0, i) >= rows) dp[0][n][i] = 0;
      }
    }
  }

  // What rounding has taken from this thread's two keys, of query j of a pair.
  static __device__ __forceinline__ float lost(const Dots& exact, const Operand& rounded, int n,
                                               int j) {
    float sum = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 kept = unpack<T>(rounded[0][n / 2][n % 2 * 2 + half]);
      sum += exact[0][n][2 * half + j] - (j == 0 ? kept.x : kept.y);
    }
    return sum;
  }

  // Of lanes kApart from each other the lower one gets the sum of both `low`, the upper of `high`.
  template <int kApart>
  static __device__ __forceinline__ float shared_out(float low, float high) {
    const bool upper = thread_index() & kApart;
    return (upper ? high : low) + __shfl_xor_sync(kFullWarp, upper ? low : high, kApart);
  }

  // dS' to where both consumers read it, and what rounding has lost of each query (add_lost()): the
  // tile's first key is given that.
  __device__ __forceinline__ void hand_over(const Dots& exact, const Operand& rounded) const {
    float of_quarter[kM / 16][2], of_eighth[kM / 32][2];
#pragma unroll
    for (int n = 0; n < kM / 16; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        of_quarter[n][j] =
            shared_out<16>(lost(exact, rounded, n, j), lost(exact, rounded, n + kM / 16, j));
      }
    }
#pragma unroll
    for (int n = 0; n < kM / 32; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        of_eighth[n][j] = shared_out<8>(of_quarter[n][j], of_quarter[n + kM / 32][j]);
      }
    }

    using Layout = Swizzle<kM>;
    const int lane = thread_index() % kWarp, pair = lane % 4 * 4;
    mbarrier_wait(ring.read(), ring.parity() ^ 1);
    const SharedAddress at = ring.scores() + Layout::offset(Base::warp_row() + lane / 4, 0) + pair;
#pragma unroll
    for (int n = 0; n < kM / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        *shared_pointer<uint32_t>(Layout::moved(at, 8 * half, n)) =
            rounded[0][n / 2][n % 2 * 2 + half];
      }
    }
    const int row = Tile::kRows + Base::warp_row() / 8 + lane / 4 % 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      *shared_pointer<uint32_t>(ring.scores() + Layout::offset(row, lane / 8 * 2 + i) + pair) =
          pack<T>(of_eighth[i][0], of_eighth[i][1]);
    }
    async_proxy_fence();
    Base::give_back(ring.written());
  }

  // dQ of the visit before.
  __device__ __forceinline__ void add_pending() const {
    const ScoreRing<Tile> last = {ring.base, ring.visit - 1};
    float4* const sums = mine(kept().pending);
    const bool there = kept().there;
    float dq[8][4];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float4 x = there ? __ldcg(sums + n * kWarpgroup) : make_float4(0, 0, 0, 0);
      dq[n][0] = x.x, dq[n][1] = x.y, dq[n][2] = x.z, dq[n][3] = x.w;
    }
    mbarrier_wait(last.written(), last.parity());

    const int panel = kD > kSumColumns ? Base::index() : 0;
    const uint64_t a = operand_of_columns<Scores>(descriptor_address(last.scores()));
    const uint64_t b =
        operand_of_columns<Own>(descriptor_address(shared.held(kK, 0) + panel * Own::kPanelBytes));
    const uint64_t one = operand_of_columns<OneKey>(
        descriptor_address(shared.base + Tile::kOneKey + panel * OneKey::kPanelBytes));
    wgmma_fence(dq);
#pragma unroll
    for (int step = 0; step < Tile::kRows / 16; ++step) {
      const uint64_t part = moved_descriptor(b, step / 4 * Own::kBytes);
      wgmma<T, Major::mn>(dq, step_of_columns<Scores>(a, step),
                          step_of_columns<Own>(part, step % 4), true);
    }
    wgmma<T, Major::mn>(dq, step_of_columns<Scores>(a, Tile::kRows / 16), one, true);
    wgmma_commit();
    wgmma_wait<0>(dq);
    Base::give_back(last.read());
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      __stcg(sums + n * kWarpgroup, make_float4(dq[n][0], dq[n][1], dq[n][2], dq[n][3]));
    }
  }

  // dV and dK of a block of queries, and dQ of the one before: the other consumer's dS' of that is
  // there by now. It is this consumer's turn.
  __device__ __forceinline__ void visit(const Keys& tile, int block, const Logit& logit,
                                        Gradient& dk, Gradient& dv) const {
    Dots s, dp;
    Base::template score<T>(s, dp);
    // Volatile, or ptxas reads them all at once, into registers that nobody has.
    using Bits = unsigned long long;
    const volatile Bits* const lse_delta = reinterpret_cast<const Bits*>(Base::lse_delta());
    const auto statistics = [&](int query) {
      const Bits bits = lse_delta[query];
      return make_float2(__uint_as_float(static_cast<unsigned>(bits)),
                         __uint_as_float(static_cast<unsigned>(bits >> 32)));
    };
    Base::template weigh<kPlain>(s, dp, tile, Base::warp_row(), block, logit, statistics);
    const int rows = tile.at.n_k - tile.first - Base::warp_row();
    if (rows < 16) drop_rows(dp, rows);

    Operand p, ds;
    to_operand<T>(p, s);
    to_operand<T>(ds, dp);
    hand_over(dp, ds);
    Base::take_turn();  // for these products and the next block's
    wgmma_fence(dv[0], dk[0], p[0], ds[0]);
    issue_product<T, Block>(dv[0], p[0], streamed(kDout));
    issue_product<T, Block>(dk[0], ds[0], streamed(kQueries));
    wgmma_commit();
    if (kept().pending) add_pending();
    wgmma_wait<0>(dv[0], dk[0], p[0], ds[0]);
  }

  __device__ __forceinline__ void run() {
    const Attention& p = args.problem;
    kept().pending = nullptr;
    const auto of_tile = [&](const Keys& now, const Partners& of_now, DealtPlace at) {
      kept().tile = now;
      kept().queries = of_now;
      kept().at = at;
      kept().h = now.h * p.group();
      __syncwarp();
      const Keys& tile = kept().tile;
      const Partners& queries = kept().queries;
      const bool any = queries.start < queries.stop;
      const auto past_last = [&] { return (queries.stop + kM - 1) & ~(kM - 1); };
      if (at.turn == 0) {
        kept().seen = queries.start;
        kept().slice = args.sums_of(tile.first / Tile::kRows, tile.b, tile.at.first_q, kD);
      }
      clear_sums(tile, kept().seen, any ? queries.start : past_last());
      Gradient dk, dv;
      clear(dk);
      clear(dv);
      Base::held_place = {0, at.count % 2u};
      Base::wait_for_held();
      prepare_keys(tile);
      if (any) {
        Base::take_turn();
        while (true) {
          Base::for_each_block_of(kept().h, tile, queries, [&](int block, const Logit& logit) {
            visit(tile, block, logit, dk, dv);
            kept().pending = adds(block) ? sums_of(kept().h, block) : nullptr;
            kept().there = block < kept().seen;
            ++ring.visit;
          });
          const int next = kept().h + 1;
          if (next == (tile.h + 1) * p.group()) break;
          __syncwarp();
          kept().h = next;
          __syncwarp();
        }
        Base::pass_turn();
      }
      if (kept().pending) add_pending();
      kept().pending = nullptr;
      kept().seen = most(kept().seen, past_last());

      named_barrier_sync(kBothBarrier, Tile::kConsumers * kWarpgroup);  // both have read all of K
      const int before = 64 * Base::index();
      Base::template store<T, kD>(dk, p.scale, held(kK), args.dk, p.head_dim, tile, before);
      Base::template store<T, kD>(dv, 1, held(kV), args.dv, p.value_dim, tile, before);
      at = kept().at;
      Base::release_held();
      return at;
    };
    Base::in_turns([&] { for_each_dealt_tile<Tile>(args, of_tile); });
  }
};

}  // namespace ceg::cuda
