// Flash attention backward for sm_80 and later: dQ.
//
// A block of threads takes kM queries of one head and visits the keys they see in blocks of kN. K
// and V blocks arrive in one of two buffers while the other is read.
#include "attention_backward.h"
#include "attention_launch.h"

namespace ceg::cuda {
namespace {

// Chosen with the compiler's report, measured on no GPU.
template <int kD, bool kPlain>
struct QueryTile {
  static constexpr int kWarps = kD == 128 ? 8 : 4, kThreads = kWarp * kWarps;
  static constexpr int kRows = kD <= 64 ? 2 : 1;  // bands of a warp
  static constexpr int kM = 16 * kRows * kWarps;
  static constexpr int kN = kD <= 128 ? 32 : 16;
  static constexpr int kBlocksPerSm = kD <= 64 ? 2 : 1;
  static constexpr int kTileBytes = kN * kD * 2;
  static constexpr int kBufferBytes = 2 * kTileBytes;
  static constexpr int kSharedBytes = 2 * (kM * kD * 2 + kBufferBytes);
  static_assert(kSharedBytes <= 99 << 10, "sm_86, sm_89 and sm_120 have no more");
};

template <class T, int kD, bool kPlain>
__global__ void __launch_bounds__(QueryTile<kD, kPlain>::kThreads,
                                  QueryTile<kD, kPlain>::kBlocksPerSm)
    attention_bwd_dq_kernel(const __grid_constant__ AttentionBwd args) {
  using Tile = QueryTile<kD, kPlain>;
  constexpr int kM = Tile::kM, kN = Tile::kN, kRows = Tile::kRows;
  const Attention& p = args.problem;
  const TileOf<kM> tile(p, args.of_queries, p.heads, true);
  const auto [b, h, first, at] = tile;
  if (first >= at.n_q) return;

  // The tile's keys, and those of this warp's rows.
  const auto row_now = [] { return thread_index() / kWarp * 16 * kRows; };
  const int row = row_now();
  const int last = least(first + kM, at.n_q) - 1;
  const int warp_last = least(first + row + 16 * kRows, at.n_q) - 1;
  const Meeting meeting = Meeting::of<Side::queries>(p, at);
  const Partners keys = meeting.partners<kN>(first, last);
  const Partners own = meeting.partners<kN>(first + row, warp_last);
  const int own_stop = first + row <= warp_last ? own.stop : 0;

  // Load: Q and dout, which stay, with the first block of keys.
  const SharedAddress q_tile = shared_address(dynamic_shared_memory());
  const SharedAddress dout_tile = q_tile + kM * Swizzle<kD>::kRowBytes;
  const SharedAddress buffers = dout_tile + kM * Swizzle<kD>::kRowBytes;
  {
    using Loader = TileLoader<T, kM, kD, Tile::kThreads>;
    const int query = at.first_q + first;
    const int rows = at.n_q - first;
    Loader(rows_of<const T>(args.q, b, query, h), args.q.row)
        .load(q_tile, args.q.row, rows, p.head_dim);
    Loader(rows_of<const T>(args.dout, b, query, h), args.dout.row)
        .load(dout_tile, args.dout.row, rows, p.value_dim);
  }
  using Loader = TileLoader<T, kN, kD, Tile::kThreads>;
  const int first_key = at.first_k + keys.start;
  Loader load_k(rows_of<const T>(args.k, b, first_key, h / p.group()), args.k.row);
  Loader load_v(rows_of<const T>(args.v, b, first_key, h / p.group()), args.v.row);
  const auto load = [&](SharedAddress buffer, int block) {
    load_k.load(buffer, args.k.row, keys.stop - block, p.head_dim);
    load_v.load(buffer + Tile::kTileBytes, args.v.row, keys.stop - block, p.value_dim);
  };
  load(buffers, keys.start);
  float lse[kRows][2], delta[kRows][2];
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = first + row + row_of(static_cast<int>(threadIdx.x) % kWarp, m, 2 * half);
      const bool there = i < at.n_q;
      const float* const from = rows_of<const float>(args.lse, b, at.first_q + i, h);
      lse[m][half] = there ? finite_or_blind(*from) : kInf;
      delta[m][half] = there ? *rows_of<const float>(args.delta, b, at.first_q + i, h) : 0;
    }
  }

  // Visit the keys.
  const Logit logit(p, b, h);
  float dq[kRows][kD / 8][4], lost[kRows][2] = {};
  clear(dq);
  SharedAddress buffer = buffers;
  for (int block = keys.start; block < keys.stop; block += kN) {
    cp_async_wait_all();
    __syncthreads();
    const SharedAddress other = buffer == buffers ? buffers + Tile::kBufferBytes : buffers;
    if (block + kN < keys.stop) load(other, block + kN);
    if (block >= own.start && block < own_stop) {
      // Scores and dout.v of the pairs, [kM, kN].
      const SharedAddress k_tile = buffer, v_tile = buffer + Tile::kTileBytes;
      float s[kRows][kN / 8][4], dp[kRows][kN / 8][4];
      clear(s);
      clear(dp);
      product_of_rows<T, kD, kRows, kN>(s, q_tile, row_now(), k_tile);
      product_of_rows<T, kD, kRows, kN>(dp, dout_tile, row_now(), v_tile);
      differentiate<kPlain>(
          s, dp, meeting, first + row_now(), block, own.masked(block), p, logit,
          [&](int m, int, int i) { return make_float2(lse[m][i / 2], delta[m][i / 2]); });

      // dQ.
      uint32_t ds[kRows][kN / 16][4];
      to_operand<T>(ds, dp);
      add_lost<T>(lost, dp, ds);
      product<T, kD, kRows, kN / 16, kD>(dq, ds, k_tile, 0);
    }
    buffer = other;
  }

  // What rounding has lost, to the first key of the last block.
  if (keys.start < keys.stop) {
    const SharedAddress k_tile = buffer == buffers ? buffers + Tile::kBufferBytes : buffers;
    uint32_t operand[kRows][1][4];
    to_operand_of_one<T>(operand, lost);
    product<T, kD, kRows, 1, kD>(dq, operand, k_tile, 0);
  }

  // Write.
  cp_async_wait_all();
  __syncthreads();
  const TileOf<kM> same(p, args.of_queries, p.heads, true);
  const int rows = same.at.n_q - same.first;
  const int first_row = same.at.first_q + same.first;
  float scale[kRows][2];
#pragma unroll
  for (int m = 0; m < kRows; ++m) scale[m][0] = scale[m][1] = p.scale;
  store_rows<T, kD, kRows, kD>(dq, scale, q_tile, row_now(), 0,
                               rows_of<T>(args.dq, same.b, first_row, same.h), args.dq.row, rows,
                               p.head_dim);
}

}  // namespace

void attention_sm80_dq(const AttentionBwd& args, DType dtype, uintptr_t stream) {
  with_tile(dtype, args.problem, [&](auto item, auto head, auto plain) {
    using T = decltype(item);
    constexpr int kD = decltype(head)::kWidth;
    using Tile = QueryTile<kD, plain.value>;
    launch_tiles<Tile>("attention_bwd_dq_kernel", attention_bwd_dq_kernel<T, kD, plain.value>, args,
                       &AttentionBwd::of_queries, args.problem.max_q, Tile::kM, stream);
  });
}

void list_attention_dq(Kernels& kernels) {
  list_tiles<QueryTile>(kernels, "attention_bwd_dq_kernel", [](auto item, auto head, auto plain) {
    return attention_bwd_dq_kernel<decltype(item), decltype(head)::kWidth, plain.value>;
  });
}

}  // namespace ceg::cuda
