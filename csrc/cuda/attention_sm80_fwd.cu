// Flash attention forward for sm_80 and later: mma.sync, ldmatrix, cp.async.
//
// A block of threads takes kM queries of one head and visits the keys they see in blocks of kN,
// with the running maximum and sum of each row (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao
// et al. 2022, arXiv 2205.14135). Q stays in shared memory; K and V have room for a block each, and
// one arrives while the other is read. A warp has whole rows, so that scores become probabilities
// and these the next product's operand without leaving registers.
#include <type_traits>

#include "attention_launch.h"
#include "attention_softmax.h"
#include "attention_tile.h"

namespace ceg::cuda {
namespace {

// Chosen with the compiler's report, measured on no GPU: two bands of 16 rows a warp read each K
// and V fragment once for two products, which shared memory needs to keep up with the tensor cores.
template <int kD, bool kPlain>
struct ForwardTile {
  static constexpr int kWarps = 4, kThreads = kWarp * kWarps;
  static constexpr int kRows = kD <= 128 ? 2 : 1;  // bands of a warp
  static constexpr int kM = 16 * kRows * kWarps;
  static constexpr int kN = kD <= 128 ? 64 : 32;
  static constexpr int kBlocksPerSm = 2;
  static constexpr int kSharedBytes = (kM + 2 * kN) * kD * 2;
  static_assert(kSharedBytes <= 99 << 10, "sm_86, sm_89 and sm_120 have no more");
};

template <class T, int kD, bool kPlain>
__global__ void __launch_bounds__(ForwardTile<kD, kPlain>::kThreads,
                                  ForwardTile<kD, kPlain>::kBlocksPerSm)
    attention_fwd_kernel(const __grid_constant__ AttentionFwd args) {
  using Tile = ForwardTile<kD, kPlain>;
  constexpr int kM = Tile::kM, kN = Tile::kN, kRows = Tile::kRows;
  const Attention& p = args.problem;
  const TileOf<kM> tile(p, args.schedule, p.heads, true);
  const auto [b, h, first, at] = tile;
  if (first >= at.n_q) return;

  // The tile's keys, and those of this warp's rows.
  const int row = static_cast<int>(threadIdx.x) / kWarp * 16 * kRows;  // of the warp, in the tile
  const int last = least(first + kM, at.n_q) - 1;
  const int warp_last = least(first + row + 16 * kRows, at.n_q) - 1;
  const Partners keys = partners<kN>(first, last, at.shift(), p.left, p.right, at.n_k);
  const Partners own = partners<kN>(first + row, warp_last, at.shift(), p.left, p.right, at.n_k);
  const int own_stop = first + row <= warp_last ? own.stop : 0;

  // Load: Q and the first keys.
  const SharedAddress q_tile = shared_address(dynamic_shared_memory());
  const SharedAddress k_tile = q_tile + kM * Swizzle<kD>::kRowBytes;
  const SharedAddress v_tile = k_tile + kN * Swizzle<kD>::kRowBytes;
  using Loader = TileLoader<T, kN, kD, Tile::kThreads>;
  const auto source = [&](const View& view, int row, int head) {
    return rows_of<const T>(view, b, row, head);
  };
  TileLoader<T, kM, kD, Tile::kThreads> load_q(source(args.q, at.first_q + first, h), args.q.row);
  Loader load_k(source(args.k, at.first_k + keys.start, h / p.group()), args.k.row);
  Loader load_v(source(args.v, at.first_k + keys.start, h / p.group()), args.v.row);
  load_q.load(q_tile, args.q.row, at.n_q - first, p.head_dim);
  load_k.load(k_tile, args.k.row, keys.stop - keys.start, p.head_dim);

  // Visit the keys. V arrives while the scores are computed, the next K during softmax and output.
  const Logit logit(p, b, h);
  OnlineSoftmax<std::is_same_v<T, bf16>, kRows, kN / 8> softmax;
  float acc[kRows][kD / 8][4];
  clear(acc);
  for (int block = keys.start; block < keys.stop; block += kN) {
    const bool busy = block < own_stop;
    uint32_t weights[kRows][kN / 16][4];
    cp_async_wait_all();
    __syncthreads();
    load_v.load(v_tile, args.v.row, keys.stop - block, p.value_dim);
    if (busy) {
      float s[kRows][kN / 8][4];
      clear(s);
      product_of_rows<T, kD, kRows, kN>(s, q_tile, thread_index() / kWarp * 16 * kRows, k_tile);
      const bool masked = own.masked(block);
      if (!kPlain || masked) {
        // Boundary blocks are few: where only these have a mask, all it needs is computed again.
        const TileOf<kM> same(p, args.schedule, p.heads, true);
        const TileOf<kM>& here = kPlain ? same : tile;
        const int warp_row = here.first + thread_index() / kWarp * 16 * kRows;
        mask<kPlain>(s, warp_row + here.at.shift(), block, here.at.n_k, p.left, p.right, masked,
                     logit);
      }
      softmax.step(s, acc, p.to_log2);
      to_operand<T>(weights, s);
    }
    cp_async_wait_all();
    __syncthreads();
    load_k.load(k_tile, args.k.row, keys.stop - (block + kN), p.head_dim);
    if (busy) product<T, kD, kRows, kN / 16, kD>(acc, weights, v_tile, 0);
  }

  // Normalise and write; a warp's rows of Q are its own to overwrite once they have landed.
  cp_async_wait_all();
  __syncthreads();
  const TileOf<kM> same(p, args.schedule, p.heads, true);
  const int rows = same.at.n_q - same.first;
  const int thread = thread_index(), lane = thread % kWarp;
  const int own_row = thread / kWarp * 16 * kRows;
  if (own_row >= rows) return;
  const int first_row = same.at.first_q + same.first;
  float factor[kRows][2];
  float* const lse = rows_of<float>(args.lse, same.b, first_row, same.h);
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float row_lse;
      softmax.finish(m, half, p, p.sink ? p.sink + same.h * p.sink_head : nullptr, factor[m][half],
                     row_lse);
      const int i = own_row + row_of(lane, m, 2 * half);
      if (lane % 4 == 0 && i < rows) lse[i * args.lse.row] = row_lse;
    }
  }
  T* const out = rows_of<T>(args.out, same.b, first_row, same.h);
  store_rows<T, kD, kRows, kD>(acc, factor, q_tile, own_row, 0, out, args.out.row, rows,
                               p.value_dim);
}

}  // namespace

void attention_sm80_fwd(const AttentionFwd& args, DType dtype, uintptr_t stream) {
  with_tile(dtype, args.problem, [&](auto item, auto head, auto plain) {
    using T = decltype(item);
    constexpr int kD = decltype(head)::kWidth;
    using Tile = ForwardTile<kD, plain.value>;
    launch_tiles<Tile>("attention_fwd_kernel", attention_fwd_kernel<T, kD, plain.value>, args,
                       &AttentionFwd::schedule, args.problem.max_q, Tile::kM, stream);
  });
}

void list_attention_fwd(Kernels& kernels) {
  list_tiles<ForwardTile>(kernels, "attention_fwd_kernel", [](auto item, auto head, auto plain) {
    return attention_fwd_kernel<decltype(item), decltype(head)::kWidth, plain.value>;
  });
}

}  // namespace ceg::cuda
