// Tiles of keys of the sm_90a one-pass backward (attention_sm90_bwd.cu): who has which, and what
// the consumers share of them.
#pragma once

#include "attention_sm90_keys.h"

namespace ceg::cuda {

// Between the visits of a block of queries its sums of dQ lie in memory, in tiles of 64 queries and
// 64 columns, as a warpgroup has them in registers: of eight vectors of four floats of a thread,
// which are kWarpgroup vectors from each other, vector n is c[n] of wgmma.
constexpr int kSumColumns = 64, kSumVectors = 64 * kSumColumns / 4;

// Place in the schedule, which is a split of a head; which of its tiles; how many tiles this block
// of threads has had.
struct DealtPlace {
  int block, turn, count;
};

// What a warp would keep in registers if there were some, in shared memory.
template <class Keys>
struct Kept {
  Keys tile;
  Partners queries;
  DealtPlace at;
  int h;           // of queries
  float* slice;    // in the sums of the split: query 0 of head 0
  float* pending;  // what the last visit's dS' is added to, or null
  int seen;        // up to which query the split has sums
  int there;       // whether `pending` has some
};

// Chosen with the compiler's report, measured on no GPU. Behind the rings: dS' of a block of
// queries from both consumers, in two stages, and the tile's first key.
template <int kD>
struct OnePassTile : Sm90Tile<kD, 64, 2, kD <= 64 ? 4 : 3, sizeof(float2)> {
  using Rings = Sm90Tile<kD, 64, 2, kD <= 64 ? 4 : 3, sizeof(float2)>;
  // [keys, queries]; below the keys, what rounding took, in two rows for each warp.
  using Scores = Panels<Rings::kRows + 16, Rings::kBlock>;
  using OneKey = Panels<16, kD>;  // in each of its rows
  static_assert(Scores::kBytes % Scores::kAlignment == 0 && OneKey::kBytes % 1024 == 0);
  static constexpr int kScores = (Rings::kSharedBytes + 1023) / 1024 * 1024;
  static constexpr int kOneKey = kScores + 2 * Scores::kBytes;
  static constexpr int kScoreBarriers = kOneKey + OneKey::kBytes;
  static constexpr int kKept = kScoreBarriers + 4 * static_cast<int>(sizeof(Mbarrier));
  static constexpr int kSharedBytes =
      kKept + 2 * kWarpgroup / kWarp * static_cast<int>(sizeof(Kept<TileOf<Rings::kRows>>));
  static_assert(kSharedBytes <= 227 << 10, "sm_90 has no more");
  static_assert(kKept % alignof(Kept<TileOf<Rings::kRows>>) == 0, "pointers are aligned");
  static_assert(Rings::kConsumers == 2 && kD / kSumColumns <= 2, "a tile of sums for each or one");
};

// dS' on its way to dQ, visit after visit of a block of queries. A written barrier completes when
// both consumers have written theirs, a read one when those that add it to dQ have read it.
template <class Tile>
struct ScoreRing {
  SharedAddress base;
  int visit = 0;

  __device__ __forceinline__ SharedAddress scores() const {
    return base + Tile::kScores + visit % 2 * Tile::Scores::kBytes;
  }
  __device__ __forceinline__ SharedAddress written() const {
    return base + Tile::kScoreBarriers + visit % 2 * 2 * static_cast<int>(sizeof(Mbarrier));
  }
  __device__ __forceinline__ SharedAddress read() const {
    return written() + static_cast<int>(sizeof(Mbarrier));
  }
  __device__ __forceinline__ unsigned parity() const { return visit / 2 % 2; }

  __device__ __forceinline__ void init_barriers() const {
    constexpr int kWarps = kWarpgroup / kWarp;
    for (const int stage : {0, 1}) {
      const ScoreRing ring = {base, stage};
      mbarrier_init(ring.written(), Tile::kConsumers * kWarps);
      mbarrier_init(ring.read(), Tile::Block::kCount * kWarps);
    }
  }
};

// A split's tile of keys.
template <class Tile>
__device__ __forceinline__ TileOf<Tile::kRows> dealt_tile_at(const AttentionBwd& args,
                                                             const DealtPlace& at) {
  TileOf<Tile::kRows> tile =
      tile_of<Tile, Side::keys>(args.problem, args.of_splits, again(at.block));
  const int split = tile.first / Tile::kRows;
  tile.first = dealt_tile(split, at.turn, args.of_splits.tiles) * Tile::kRows;
  return tile;
}

// at = f(tile, queries, at) for each tile of keys of this block of threads.
template <class Tile, class F>
__device__ __forceinline__ void for_each_dealt_tile(const AttentionBwd& args, F f) {
  DealtPlace at = {block_index(), 0, 0};
  while (at.block < again(args.of_splits.tiles) * args.of_splits.heads) {
    const TileOf<Tile::kRows> tile = dealt_tile_at<Tile>(args, at);
    if (tile.first < tile.at.n_k) {
      const int last = least(tile.first + Tile::kRows, tile.at.n_k) - 1;
      const Meeting meeting = Meeting::of<Side::keys>(args.problem, tile.at);
      at = f(tile, meeting.template partners<Tile::kBlock>(tile.first, last), at);
      ++at.turn, ++at.count;
    } else {
      at = {at.block + static_cast<int>(gridDim.x), 0, at.count};
    }
  }
}

}  // namespace ceg::cuda
