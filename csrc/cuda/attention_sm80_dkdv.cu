// Flash attention backward for sm_80 and later: dK and dV.
//
// A block of threads takes kN keys of one key head and visits the queries that see them, of all
// heads of the group, in blocks of kM: no atomics, and the sums in one order. All is transposed: a
// warp has whole rows of keys, so that probabilities and their gradients become the operands of dV
// and dK without leaving registers. Q and dout blocks arrive in one of two buffers while the other
// is read.
#include "attention_backward.h"
#include "attention_launch.h"

namespace ceg::cuda {
namespace {

// Chosen with the compiler's report, measured on no GPU. 256 columns do not fit a warp's registers
// twice: two warps share its rows, compute the same scores and have half of the columns each. Two
// bands of 16 rows read each fragment of Q and dout once for two products, where registers allow
// it.
template <int kD, bool kPlain>
struct KeyTile {
  static constexpr int kRows = kD <= 64 && kPlain ? 2 : 1;  // bands of a warp
  static constexpr int kWarps = 8 / kRows, kThreads = kWarp * kWarps;
  static constexpr int kSplit = kD <= 128 ? 1 : 2;
  static constexpr int kColumns = kD / kSplit;
  static constexpr int kN = 16 * kRows * kWarps / kSplit;
  static constexpr int kM = kD <= 128 ? 32 : 16;
  static constexpr int kBlocksPerSm = kRows;
  static constexpr int kTileBytes = kM * kD * 2;
  static constexpr int kBufferBytes = 2 * kTileBytes + 1024;  // and lse, delta: tiles stay aligned
  static constexpr int kSharedBytes = 2 * (kN * kD * 2 + kBufferBytes);
  static_assert(2 * kM * sizeof(float) <= 1024, "lse and delta of a block of queries");
  static_assert(2 * kM <= kThreads, "a thread brings one lse or delta");
  static_assert(kSharedBytes <= 99 << 10, "sm_86, sm_89 and sm_120 have no more");
};

template <class T, int kD, bool kPlain>
__global__ void __launch_bounds__(KeyTile<kD, kPlain>::kThreads, KeyTile<kD, kPlain>::kBlocksPerSm)
    attention_bwd_dkdv_kernel(const __grid_constant__ AttentionBwd args) {
  using Tile = KeyTile<kD, kPlain>;
  constexpr int kM = Tile::kM, kN = Tile::kN, kRows = Tile::kRows, kColumns = Tile::kColumns;
  const Attention& p = args.problem;
  const TileOf<kN> tile(p, args.of_keys, p.kv_heads, false);
  const auto [b, kv_head, first, at] = tile;
  if (first >= at.n_k) return;

  // The tile's queries, and those of this warp's rows. A key has its partners mirrored.
  const auto row_now = [] { return thread_index() / (kWarp * Tile::kSplit) * 16 * kRows; };
  const int row = row_now();
  const int last = least(first + kN, at.n_k) - 1;
  const int warp_last = least(first + row + 16 * kRows, at.n_k) - 1;
  const Meeting meeting = Meeting::of<Side::keys>(p, at);
  const Partners queries = meeting.partners<kM>(first, last);
  const Partners own = meeting.partners<kM>(first + row, warp_last);
  // Without keys of its own a warp starts beyond all queries. Blocks that it has no pair with at
  // the other end are masked whole.
  const int own_start = first + row <= warp_last ? own.start : queries.stop;

  // Load: K and V, which stay, with the first block of queries.
  const SharedAddress k_tile = shared_address(dynamic_shared_memory());
  const SharedAddress v_tile = k_tile + kN * Swizzle<kD>::kRowBytes;
  const SharedAddress buffers = v_tile + kN * Swizzle<kD>::kRowBytes;
  {
    using Loader = TileLoader<T, kN, kD, Tile::kThreads>;
    const int key = at.first_k + first;
    const int rows = at.n_k - first;
    Loader(rows_of<const T>(args.k, b, key, kv_head), args.k.row)
        .load(k_tile, args.k.row, rows, p.head_dim);
    Loader(rows_of<const T>(args.v, b, key, kv_head), args.v.row)
        .load(v_tile, args.v.row, rows, p.value_dim);
  }
  using Loader = TileLoader<T, kM, kD, Tile::kThreads>;
  const auto load = [&](SharedAddress buffer, int h, int block) {
    const int query = at.first_q + block;
    Loader(rows_of<const T>(args.q, b, query, h), args.q.row)
        .load(buffer, args.q.row, queries.stop - block, p.head_dim);
    Loader(rows_of<const T>(args.dout, b, query, h), args.dout.row)
        .load(buffer + Tile::kTileBytes, args.dout.row, queries.stop - block, p.value_dim);
    const int thread = thread_index(), i = thread % kM;
    if (thread < 2 * kM) {
      const View& view = thread < kM ? args.lse : args.delta;
      const float* from = rows_of<const float>(view, b, query + i, h);
      cp_async_4(buffer + 2 * Tile::kTileBytes + thread * 4, from, block + i < queries.stop);
    }
  };
  const int first_head = kv_head * p.group(), stop_head = first_head + p.group();
  if (queries.start < queries.stop) load(buffers, first_head, queries.start);

  // Visit the queries.
  const auto column = [] { return thread_index() / kWarp % Tile::kSplit * kColumns; };
  float dk[kRows][kColumns / 8][4], dv[kRows][kColumns / 8][4];
  clear(dk);
  clear(dv);
  SharedAddress buffer = buffers;
  for (int h = first_head; h < stop_head; ++h) {
    const Logit logit(p, b, h);
    for (int block = queries.start; block < queries.stop; block += kM) {
      cp_async_wait_all();
      __syncthreads();
      const SharedAddress other = buffer == buffers ? buffers + Tile::kBufferBytes : buffers;
      const bool more = block + kM < queries.stop;
      if (more || h + 1 < stop_head) {
        load(other, more ? h : h + 1, more ? block + kM : queries.start);
      }
      if (block >= own_start) {
        // Scores and dout.v of the pairs, [kN, kM].
        const SharedAddress q_tile = buffer, dout_tile = buffer + Tile::kTileBytes;
        float s[kRows][kM / 8][4], dp[kRows][kM / 8][4];
        clear(s);
        clear(dp);
        product_of_rows<T, kD, kRows, kM>(s, k_tile, row_now(), q_tile);
        product_of_rows<T, kD, kRows, kM>(dp, v_tile, row_now(), dout_tile);
        const float* const lse = shared_pointer<const float>(buffer + 2 * Tile::kTileBytes);
        const int lane = thread_index() % kWarp;
        differentiate<kPlain>(s, dp, meeting, first + row_now(), block, own.masked(block), p, logit,
                              [&](int, int n, int i) {
                                const float* const of_query = lse + column_of(lane, n, i);
                                return make_float2(finite_or_blind(of_query[0]), of_query[kM]);
                              });

        // dV, dK.
        uint32_t operand[kRows][kM / 16][4];
        to_operand<T>(operand, s);
        product<T, kD, kRows, kM / 16, kColumns>(dv, operand, dout_tile, column());
        to_operand<T>(operand, dp);
        product<T, kD, kRows, kM / 16, kColumns>(dk, operand, q_tile, column());
      }
      buffer = other;
    }
  }

  // Write, through the tiles of K and V once nobody reads them.
  cp_async_wait_all();
  __syncthreads();
  const TileOf<kN> same(p, args.of_keys, p.kv_heads, false);
  const int rows = same.at.n_k - same.first;
  const int first_row = same.at.first_k + same.first;
  float scale[kRows][2], one[kRows][2];
#pragma unroll
  for (int m = 0; m < kRows; ++m) scale[m][0] = scale[m][1] = p.scale, one[m][0] = one[m][1] = 1;
  store_rows<T, kD, kRows, kColumns>(dk, scale, k_tile, row_now(), column(),
                                     rows_of<T>(args.dk, same.b, first_row, same.h), args.dk.row,
                                     rows, p.head_dim);
  store_rows<T, kD, kRows, kColumns>(dv, one, v_tile, row_now(), column(),
                                     rows_of<T>(args.dv, same.b, first_row, same.h), args.dv.row,
                                     rows, p.value_dim);
}

}  // namespace

void attention_sm80_dkdv(const AttentionBwd& args, DType dtype, uintptr_t stream) {
  with_tile(dtype, args.problem, [&](auto item, auto head, auto plain) {
    using T = decltype(item);
    constexpr int kD = decltype(head)::kWidth;
    using Tile = KeyTile<kD, plain.value>;
    launch_tiles<Tile>("attention_bwd_dkdv_kernel", attention_bwd_dkdv_kernel<T, kD, plain.value>,
                       args, &AttentionBwd::of_keys, args.problem.max_k, Tile::kN, stream);
  });
}

void list_attention_dkdv(Kernels& kernels) {
  list_tiles<KeyTile>(kernels, "attention_bwd_dkdv_kernel", [](auto item, auto head, auto plain) {
    return attention_bwd_dkdv_kernel<decltype(item), decltype(head)::kWidth, plain.value>;
  });
}

}  // namespace ceg::cuda
