// Decoding, a few queries and all the keys before them: when the forward takes the kernels for it
// (attention_decode.cu), and which rows and keys a block of threads has there.
#pragma once

#include "attention_range.h"

namespace ceg::cuda {

// Row r of a group of heads that share keys is query r / group, head r % group of the group: one
// tile has all of them, so that keys are read once.
constexpr int kTileRows = 16;  // what mma has; more would be empty for the usual group of 8 or less

// The rule, the same on every GPU. Up to 16 queries are at most a tile for each head of their
// group, so that keys are never read more often than by the other kernels, which do so for each
// head, and once where the rows fit one tile. Those kernels have tiles of 64 to 128 queries, nearly
// empty here, and one block for a tile, however many keys it has and multiprocessors wait. From 17
// queries on their tiles read less. Few keys are no exception: they are one chunk, which needs no
// second kernel.
constexpr int kFewQueries = kTileRows;

CEG_HOST_DEVICE constexpr bool is_decoding(int max_q, int group) {
  return max_q <= kFewQueries && int64_t{max_q} * group <= kUnbounded;  // rows are 32 bits
}

// The most keys that the queries of a sequence see together: the last one stands beside the last
// key, whatever is visible to its right.
CEG_HOST_DEVICE constexpr int most_seen(int max_q, int max_k, int left) {
  return least(max_k, left + max_q);
}

// Keys of a sequence in chunks, counted from the first that any of its queries sees, so that a
// window leaves no chunk without work.
struct Split {
  int tiles, chunks, keys;  // of a group; of a sequence; of a chunk

  struct Place {
    int tile, chunk, head;
  };
  struct Keys {
    int start, stop;
  };

  CEG_HOST_DEVICE constexpr int64_t blocks(int64_t heads) const {
    return int64_t{tiles} * chunks * heads;
  }

  // Tiles that read the same keys start one behind the other, so that L2 has them.
  CEG_HOST_DEVICE constexpr Place place(int block) const {
    const int part = block / tiles;
    return {block % tiles, part % chunks, part / chunks};
  }

  // The last chunk has what is left, however long the sequence is. stop <= start: nothing.
  CEG_HOST_DEVICE constexpr Keys keys_of(int chunk, int first_seen, int n_k) const {
    const int start = first_seen + chunk * keys;
    return {start, chunk == chunks - 1 ? n_k : least(start + keys, n_k)};
  }
};

// For `rows` rows of a group, `heads` heads of keys in all and `keys` keys a sequence. No more
// blocks than run at the same time, so that none is left for a second round; and no chunk so short
// that its result weighs much: a tile's, written and read in fp32, is 32 keys' worth of bytes.
CEG_HOST_DEVICE constexpr Split split_of(int rows, int64_t heads, int keys, int multiprocessors) {
  constexpr int kBlocksPerSm = 2;  // what fits everywhere up to head_dim 64, nearly so beyond
  constexpr int kLeastKeys = 256;
  constexpr int kTurn = 64;  // keys that the warps of a block take at once
  const int tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t blocks = tiles * heads;
  const int64_t fit = int64_t{kBlocksPerSm} * multiprocessors / (blocks > 0 ? blocks : 1);
  const int wanted = most(static_cast<int>(fit), 1);
  const int share = keys / wanted + (keys % wanted != 0);
  const int size = most((share + kTurn - 1) / kTurn * kTurn, kLeastKeys);
  return {tiles, most((keys + size - 1) / size, 1), size};
}

}  // namespace ceg::cuda
