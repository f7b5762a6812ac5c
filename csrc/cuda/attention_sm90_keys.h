// What the sm_90a kernels share whose tiles are of keys: the producer, and what a consumer reads.
//   All is transposed: a consumer has rows of keys, and what of probabilities and their gradients
//   becomes an operand of dV and dK does so without leaving registers. Blocks of Q and dout stream
//   by, with lse and delta beside them.
#pragma once

#include "attention_backward.h"
#include "attention_sm90.h"

namespace ceg::cuda {

constexpr int kK = 0, kV = 1;           // what is held
constexpr int kQueries = 0, kDout = 1;  // what streams by
using KeyArguments = Sm90Arguments<AttentionBwd, 2>;

template <class OfKeys>
struct KeyReader : Reader<OfKeys> {
  using Tile = OfKeys;
  using Base = Reader<Tile>;
  using Keys = TileOf<Tile::kRows>;
  static constexpr int kM = Tile::kBlock;
  using Dots = float[1][kM / 8][4];
  using Operand = uint32_t[1][kM / 16][4];

  const AttentionBwd& args;

  __device__ __forceinline__ KeyReader(const SharedTiles<Tile>& shared, const AttentionBwd& args)
      : Base{shared}, args(args) {}

  // Of the queries of the block that is read.
  __device__ __forceinline__ const float2* lse_delta() const {
    return shared_pointer<const float2>(Base::shared.beside(Base::place[kQueries].stage));
  }

  // f(block, logit) for each block of queries of a head, once it is there.
  template <class F>
  __device__ __forceinline__ void for_each_block_of(int h, const Keys& tile,
                                                    const Partners& queries, F f) {
    const Attention& p = args.problem;
    const Logit logit(p, tile.b, h);
    // again(): a register less than what the compiler makes of its steps.
    for (int block = queries.start; block < queries.stop; block = again(block + kM)) {
      Base::place[kDout] = Base::place[kQueries];  // always; known, it takes fewer registers
      Base::wait_for(kQueries);
      Base::wait_for(kDout);
      const int there = tile.at.n_q - block;
      if (p.cu_q && there < kM) Base::clear_rows(there, kQueries, kDout);
      f(block, logit);
      Base::release(kQueries);
      Base::release(kDout);
    }
  }
  // Of each head of the group.
  template <class F>
  __device__ __forceinline__ void for_each_block(const Keys& tile, const Partners& queries, F f) {
    const int group = args.problem.group();
    for (int h = tile.h * group; h < (tile.h + 1) * group; ++h) {
      for_each_block_of(h, tile, queries, f);
    }
  }

  // Scores s of the block that is read, and dp, by a consumer that has both K and V and whose turn
  // it is; then it is the next one's.
  template <class T>
  __device__ __forceinline__ void score(Dots& s, Dots& dp) const {
    using Own = typename Tile::Own;
    using Block = typename Tile::Block;
    wgmma_fence(s[0], dp[0]);
    issue_product_of_rows<T, Own, Block>(s[0], Base::held(kK), Base::streamed(kQueries));
    issue_product_of_rows<T, Own, Block>(dp[0], Base::held(kV), Base::streamed(kDout));
    wgmma_commit();
    Base::pass_turn();
    wgmma_wait<0>(s[0], dp[0]);
  }

  // Scores s become probabilities, dp gradients of scores, given `statistics(query)`, lse and
  // delta.
  template <bool kPlain, class Statistics>
  __device__ __forceinline__ void weigh(Dots& s, Dots& dp, const Keys& tile, int first_row,
                                        int block, const Logit& logit,
                                        const Statistics& statistics) const {
    const Meeting meeting = Meeting::of<Side::keys>(args.problem, tile.at);
    const int row = tile.first + first_row, last = least(row + 16, tile.at.n_k) - 1;
    const bool masked = meeting.partners<kM>(row, last).masked(block);
    const int lane = thread_index() % kWarp;
    float2 of_query = {};  // columns change last
    differentiate<kPlain>(s, dp, meeting, row, block, masked, args.problem, logit,
                          [&](int, int n, int i) {
                            if (i < 2) of_query = statistics(column_of(lane, n, i));
                            return of_query;
                          });
  }

  // The sums of this consumer's keys from `before` on, through a place that only it has read.
  template <class T, int kD>
  __device__ __forceinline__ void store(const float (&sums)[1][kD / 8][4], float factor,
                                        SharedAddress through, const View& to, int width,
                                        const Keys& tile, int before) const {
    const auto [b, h, first, at] = tile;
    const int first_row = at.first_k + first + before;
    const float scale[1][2] = {{factor, factor}};
    store_rows<T, kD, 1, kD>(sums, scale, through, Base::own_row(), 0,
                             rows_of<T>(to, b, first_row, h), to.row, at.n_k - first - before,
                             width);
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

// What the consumers read of a tile of keys.
template <class Tile>
__device__ __forceinline__ void produce_of_keys(Producer<Tile>& producer, const KeyArguments& args,
                                                const TileOf<Tile::kRows>& tile,
                                                const Partners& queries) {
  const Attention& p = args.of.problem;
  const int batch = p.cu_q ? 0 : tile.b, first_head = tile.h * p.group();
  const auto load = [&](int h, int block) {
    const int row = tile.at.first_q + block;
    const Statistics<Tile> statistics(args.of, tile, h, block, queries.stop);
    producer.wait_for_room(kQueries);
    statistics.write(producer.shared.beside(producer.place[kQueries].stage));
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
}

}  // namespace ceg::cuda
