// Flash attention backward for sm_90a: dK, dV and dQ from one visit of each pair, for heads of up
// to 128.
//
// dQ is a sum over keys while dK and dV, which stay in registers, are sums over queries. The tiles
// of keys of a head are dealt to splits. A block of threads takes one split of one key head after
// another and adds each tile's share of dQ to sums that are the split's alone, in fp32 in memory;
// a second kernel adds the splits in order. No atomics, and nobody waits for another block: the
// bits follow from the shape and from the number of multiprocessors, by which there are splits.
#include "attention_sm90_bwd.h"

#include "attention_sm90_launch.h"
#include "vector.h"

namespace ceg::cuda {
namespace {

constexpr int64_t kMostBytes = int64_t{512} << 20;  // of the sums

template <int kD, bool kPlain>
using Tile = OnePassTile<kD>;

template <class Tile>
__device__ __forceinline__ void produce(const KeyArguments& args, const SharedTiles<Tile>& shared) {
  Producer<Tile> producer{shared};
  for_each_dealt_tile<Tile>(
      args.of, [&](const TileOf<Tile::kRows>& tile, const Partners& queries, DealtPlace at) {
        produce_of_keys<Tile>(producer, args, tile, queries);
        return at;
      });
}

template <class T, int kD, bool kPlain>
__global__ void __launch_bounds__(OnePassTile<kD>::kThreads, 1)
    attention_sm90_bwd_kernel(const __grid_constant__ KeyArguments args) {
#if CEG_SM90A
  using Shared = SharedTiles<OnePassTile<kD>>;
  if (threadIdx.x == 0) ScoreRing<OnePassTile<kD>>{Shared().base}.init_barriers();
  run_roles<OnePassTile<kD>>(
      args, [&](const Shared& shared) { produce(args, shared); },
      [&](const Shared& shared) { OnePassConsumer<T, kD, kPlain>(shared, args.of).run(); });
#else
  __trap();  // code for another GPU must not leave the output as it was
#endif
}

// dQ of a tile of 64 queries of one head by a warpgroup: the splits that have seen it, in order.
template <class T, int kD>
__global__ void __launch_bounds__(kWarpgroup)
    attention_sm90_bwd_sum_kernel(const __grid_constant__ AttentionBwd args) {
  using Keys = OnePassTile<kD>;
  const Attention& p = args.problem;
  const TileOf<64> tile(p, args.of_queries, p.heads, true);
  if (tile.first >= tile.at.n_q) return;
  const int tiles = (tile.at.n_k + Keys::kRows - 1) / Keys::kRows, splits = args.of_splits.tiles;
  const auto queries_of = [&](int key_tile) {
    const int first = key_tile * Keys::kRows;
    return Meeting::of<Side::keys>(p, tile.at)
        .template partners<Keys::kBlock>(first, least(first + Keys::kRows, tile.at.n_k) - 1);
  };
  const int thread = thread_index();
  struct Through {
    __align__(Swizzle<kD>::kAlignment) unsigned char bytes[64 * Swizzle<kD>::kRowBytes];
  };
  const SharedAddress through = shared_address(shared_memory<Through>().bytes);
  T* const to = rows_of<T>(args.dq, tile.b, tile.at.first_q + tile.first, tile.h);
  const float scale[1][2] = {{p.scale, p.scale}};

#pragma unroll
  for (int column = 0; column < kD; column += kSumColumns) {
    // Sum.
    float dq[1][8][4];
    clear(dq);
    for (int split = 0; split < least(splits, tiles); ++split) {
      if (tile.first < queries_of(split).start) continue;
      if (tile.first >= queries_of(last_dealt_tile(split, tiles, splits)).stop) continue;
      const int64_t block = static_cast<int64_t>(tile.first / 64) * p.heads + tile.h;
      const float* const from = args.sums_of(split, tile.b, tile.at.first_q, kD) + block * 64 * kD +
                                64 * column + 4 * thread;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        float x[4];
        load_once<4>(from + 4 * n * kWarpgroup).unpack(x);
#pragma unroll
        for (int i = 0; i < 4; ++i) dq[0][n][i] += x[i];
      }
    }

    // Write.
    store_rows<T, kD, 1, kSumColumns>(dq, scale, through, thread / kWarp * 16, column, to,
                                      args.dq.row, tile.at.n_q - tile.first, p.head_dim);
  }
}

struct SumTile {
  static constexpr int kThreads = kWarpgroup, kSharedBytes = 0;
};

int width_of(const Attention& p) { return most(p.head_dim, p.value_dim) <= 64 ? 64 : 128; }

int key_tiles(const Attention& p) {
  constexpr int kRows = OnePassTile<64>::kRows;
  static_assert(kRows == OnePassTile<128>::kRows);
  return (p.max_k + kRows - 1) / kRows;
}

Schedule schedule_of(const AttentionBwd& args) {
  const Attention& p = args.problem;
  const int heads = p.batch * p.kv_heads;
  return {splits_of(heads, key_tiles(p), multiprocessors()), heads, args.of_keys.section};
}

int64_t rows_of_sums(const AttentionBwd& args) {
  return schedule_of(args).tiles * args.query_tiles() * args.problem.heads * width_of(args.problem);
}

}  // namespace

std::string attention_sm90_one_pass_why_not(const AttentionBwd& args) {
  if (std::string why = attention_sm90_why_not(args); !why.empty()) return why;
  const int width = most(args.problem.head_dim, args.problem.value_dim);
  if (width > 128) return "needs head_dim <= 128, got " + std::to_string(width);
  const int64_t bytes = rows_of_sums(args) * 64 * int64_t{sizeof(float)};
  if (bytes <= kMostBytes) return "";
  return "needs at most 512 MiB for the sums of dq, got " + std::to_string(bytes >> 20);
}

int64_t attention_sm90_bwd_rows(const AttentionBwd& args) {
  return attention_sm90_one_pass_why_not(args).empty() ? rows_of_sums(args) : 0;
}

void attention_sm90_bwd(const AttentionBwd& args, DType dtype, uintptr_t stream) {
  with_tile(dtype, args.problem, [&](auto item, auto head, auto plain) {
    using T = decltype(item);
    constexpr int kD = decltype(head)::kWidth;
    if constexpr (kD <= 128) {
      using Tile = OnePassTile<kD>;
      const MappedRows rows(args);
      KeyArguments all = {args,
                          {tensor_map("k", dtype, rows.k, 64), tensor_map("v", dtype, rows.v, 64)},
                          {tensor_map("q", dtype, rows.q, Tile::kBlock),
                           tensor_map("dout", dtype, rows_of_dout(args), Tile::kBlock)}};
      all.of.of_splits = schedule_of(args);
      launch_persistent<Tile>("attention_sm90_bwd_kernel",
                              attention_sm90_bwd_kernel<T, kD, plain.value>, all, all.of.of_splits,
                              stream);
      launch_tiles<SumTile>("attention_sm90_bwd_sum_kernel", attention_sm90_bwd_sum_kernel<T, kD>,
                            all.of, &AttentionBwd::of_queries, args.problem.max_q, 64, stream);
    }
  });
}

void list_attention_sm90_bwd(Kernels& kernels) {
  list_tiles<Tile, 128>(kernels, "attention_sm90_bwd_kernel", [](auto item, auto head, auto plain) {
    return attention_sm90_bwd_kernel<decltype(item), decltype(head)::kWidth, plain.value>;
  });
  const auto list_sum = [&](auto item, auto head, const char* name) {
    const auto kernel = attention_sm90_bwd_sum_kernel<decltype(item), decltype(head)::kWidth>;
    kernels.push_back({name, reinterpret_cast<const void*>(kernel), kWarpgroup});
  };
  list_sum(bf16{}, HeadTile<64>{}, "attention_sm90_bwd_sum_kernel bf16 D64");
  list_sum(bf16{}, HeadTile<128>{}, "attention_sm90_bwd_sum_kernel bf16 D128");
  list_sum(f16{}, HeadTile<64>{}, "attention_sm90_bwd_sum_kernel f16 D64");
  list_sum(f16{}, HeadTile<128>{}, "attention_sm90_bwd_sum_kernel f16 D128");
}

}  // namespace ceg::cuda
