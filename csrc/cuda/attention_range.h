// Which blocks of keys or queries a tile meets, and which tile a block of threads takes.
#pragma once

#include <cstdint>

#ifndef __CUDACC__
#define CEG_HOST_DEVICE
#else
#define CEG_HOST_DEVICE __host__ __device__
#endif

namespace ceg::cuda {

// Positions and windows add up in 32 bits: no sequence is longer, no window wider.
constexpr int kUnbounded = 1 << 29;

CEG_HOST_DEVICE constexpr int least(int a, int b) { return a < b ? a : b; }
CEG_HOST_DEVICE constexpr int most(int a, int b) { return a > b ? a : b; }

// Blocks of the other side that a tile has a pair with: they start at `start`, `start` + block, ...
// below `stop`. Those from `whole` to `rest` need no mask: each row of the tile has all of them.
struct Partners {
  int start, whole, rest, stop;

  CEG_HOST_DEVICE constexpr bool masked(int block) const { return block < whole || block >= rest; }
};

// For rows [first, last] of which row r has the pairs r + offset - before ... r + offset + after of
// [0, count). For queries offset = Tk - Tq, before and after are the window's left and right; for
// keys all are mirrored.
template <int kBlock>
CEG_HOST_DEVICE constexpr Partners partners(int first, int last, int offset, int before, int after,
                                            int count) {
  static_assert((kBlock & (kBlock - 1)) == 0, "rounding down is one instruction");
  constexpr int kMask = ~(kBlock - 1);
  const int start = most(first + offset - before, 0) & kMask;
  const int whole = (most(last + offset - before, 0) + kBlock - 1) & kMask;
  const int stop = least(last + offset + after + 1, count);
  const int rest = most(least(first + offset + after + 1, count), 0) & kMask;
  return {start, whole, rest, stop};
}

// Blocks of threads start in the order of their index. Heads are taken in sections whose keys and
// values fit in L2 together; in a section all heads of the tile with most work come first (the
// last queries, the first keys under a causal mask), so that short ones fill the GPU at the end.
struct Schedule {
  int tiles, heads, section;  // of a head; of all sequences; of a section

  struct Place {
    int tile, head;
  };

  CEG_HOST_DEVICE constexpr int64_t blocks() const { return int64_t{tiles} * heads; }

  CEG_HOST_DEVICE constexpr Place place(int block, bool last_tile_first) const {
    const int of_section = block / (tiles * section);
    const int before = of_section * section;  // heads
    const int width = least(section, heads - before);
    const int inside = block - before * tiles;
    const int tile = inside / width;
    return {last_tile_first ? tiles - 1 - tile : tile, before + inside % width};
  }
};

// Tiles are dealt to and fro among `splits`, so that under a causal mask each has as much to do;
// those of one rise.
CEG_HOST_DEVICE constexpr int dealt_tile(int split, int turn, int splits) {
  return turn * splits + (turn % 2 ? splits - 1 - split : split);
}
// The last of `tiles` that a split has, of which the first is `split`.
CEG_HOST_DEVICE constexpr int last_dealt_tile(int split, int tiles, int splits) {
  const int turn = (tiles - 1) / splits;
  const int tile = dealt_tile(split, turn, splits);
  return tile < tiles ? tile : dealt_tile(split, turn - 1, splits);
}

// The fewest splits of the tiles of each head with which so many multiprocessors are done first.
constexpr int splits_of(int64_t heads, int tiles, int multiprocessors) {
  int best = 1;
  int64_t fewest = INT64_MAX;  // tiles that a multiprocessor takes one after another
  for (int splits = 1; splits <= least(tiles, multiprocessors); ++splits) {
    const int64_t rounds = (heads * splits + multiprocessors - 1) / multiprocessors;
    const int64_t taken = rounds * ((tiles + splits - 1) / splits);
    if (taken < fewest) fewest = taken, best = splits;
  }
  return best;
}

// Heads whose keys and values, `bytes` for a head of them, share L2. From the shape alone.
CEG_HOST_DEVICE constexpr int section_of(int heads, int64_t bytes) {
  // Half of what a GA102, the smallest GPU we know of, has.
  constexpr int64_t kShare = int64_t{3} << 20;
  const int64_t fit = kShare / (bytes > 0 ? bytes : 1);
  return fit < 1 ? 1 : fit > heads ? most(heads, 1) : static_cast<int>(fit);
}

}  // namespace ceg::cuda
