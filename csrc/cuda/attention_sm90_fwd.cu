// Flash attention forward for sm_90a: TMA, mbarriers, wgmma.
//
// A block of threads takes tile after tile of kM queries of one head. Its first warpgroup brings Q
// and, in a ring of stages each, blocks of kN keys and values; each of the others has 64 queries,
// and keeps scores, probabilities and output in registers. The output of a block is summed while
// the next one is in its softmax, and warpgroups take turns at the tensor cores, so that one
// multiplies while another is in its softmax (Shah et al. 2024, arXiv 2407.08608).
#include "attention_sm90.h"
#include "attention_sm90_launch.h"
#include "attention_softmax.h"

namespace ceg::cuda {

namespace {

enum : int { kKeys, kValues };  // what streams by
using Arguments = Sm90Arguments<AttentionFwd, 1>;

// Chosen with the compiler's report, measured on no GPU. At 256 two stages of 128 keys would be
// 256 KiB, and a thread has 128 sums of the output.
template <int kD, bool kPlain>
using ForwardTile = Sm90Tile<kD, kD <= 128 ? 128 : 64, 1, 2>;

// What a consumer does with its 64 queries of a tile.
template <class T, int kD, bool kPlain>
struct Consumer : Reader<ForwardTile<kD, kPlain>> {
  using Tile = ForwardTile<kD, kPlain>;
  using Base = Reader<Tile>;
  using Base::index, Base::warp_row, Base::held, Base::streamed, Base::wait_for, Base::release;
  using Own = typename Tile::Own;
  using Block = typename Tile::Block;
  using Queries = TileOf<Tile::kRows>;
  static constexpr int kN = Tile::kBlock;
  using Softmax = OnlineSoftmax<std::is_same_v<T, bf16>, 1, kN / 8>;
  using Scores = float[1][kN / 8][4];
  using Weights = uint32_t[1][kN / 16][4];
  using Output = float[1][kD / 8][4];

  const AttentionFwd& args;

  __device__ __forceinline__ Consumer(const SharedTiles<Tile>& shared, const AttentionFwd& args)
      : Base{shared}, args(args) {}

  // A group of products each: s = Q K^T, acc += P V.
  __device__ __forceinline__ void issue_scores(Scores& s) const {
    issue_product_of_rows<T, Own, Block>(s[0], held(0), streamed(kKeys));
    wgmma_commit();
  }
  __device__ __forceinline__ void issue_output(Output& acc, const Weights& weights) const {
    issue_product<T, Block>(acc[0], weights[0], streamed(kValues));
    wgmma_commit();
  }

  // Scores of the keys from `block` on become probabilities.
  __device__ __forceinline__ void weigh(Scores& s, const Queries& tile, int block, Softmax& softmax,
                                        const Logit& logit, float (&rescale)[2]) const {
    const Attention& p = args.problem;
    const int row = tile.first + warp_row(), last = least(row + 16, tile.at.n_q) - 1;
    const bool masked =
        Meeting::of<Side::queries>(p, tile.at).template partners<kN>(row, last).masked(block);
    if (!kPlain || masked) {
      mask<kPlain>(s, row + tile.at.shift(), block, tile.at.n_k, p.left, p.right, masked, logit);
    }
    rescale[0] = softmax.step(0, 0, s, p.to_log2);
    rescale[1] = softmax.step(0, 1, s, p.to_log2);
  }

  // The products of one block run beside the softmax of the next.
  __device__ __forceinline__ void attend(const Queries& tile, const Partners& keys, Output& acc,
                                         Softmax& softmax) {
    const Logit logit(args.problem, tile.b, tile.h);
    Scores s;
    Weights weights;
    float rescale[2];
    wait_for(kKeys);
    Base::take_turn();
    wgmma_fence(s[0]);
    issue_scores(s);
    Base::pass_turn();
    wgmma_wait<0>(s[0]);
    release(kKeys);
    weigh(s, tile, keys.start, softmax, logit, rescale);  // acc is 0
    to_operand<T>(weights, s);

    for (int block = keys.start + kN; block < keys.stop; block += kN) {
      wait_for(kKeys);
      Base::take_turn();
      wgmma_fence(s[0]);
      issue_scores(s);
      wait_for(kValues);
      wgmma_fence(acc[0], weights[0]);
      issue_output(acc, weights);
      Base::pass_turn();
      wgmma_wait<1>(s[0]);
      release(kKeys);
      weigh(s, tile, block, softmax, logit, rescale);
      wgmma_wait<0>(acc[0], weights[0]);
      release(kValues);
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[0][n][i] *= rescale[i / 2];
      }
      to_operand<T>(weights, s);
    }

    wait_for(kValues);
    const int there = tile.at.n_k - (keys.stop - 1) / kN * kN;  // keys of the last block
    if (args.problem.cu_q && there < kN) Base::clear_rows(there, kValues);
    wgmma_fence(acc[0], weights[0]);
    issue_output(acc, weights);
    wgmma_wait<0>(acc[0], weights[0]);
    release(kValues);
  }

  // Normalises, and writes through the place of this warpgroup's queries.
  __device__ __forceinline__ void write(const Queries& tile, const Output& acc,
                                        Softmax& softmax) const {
    const Attention& p = args.problem;
    const auto [b, h, first, at] = tile;
    const int rows = at.n_q - first, first_row = at.first_q + first, before = 64 * index();
    const int lane = thread_index() % kWarp;
    float factor[1][2];
    float* const lse = rows_of<float>(args.lse, b, first_row, h);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float row_lse;
      softmax.finish(0, half, p, p.sink ? p.sink + h * p.sink_head : nullptr, factor[0][half],
                     row_lse);
      const int i = warp_row() + row_of(lane, 0, 2 * half);
      if (lane % 4 == 0 && i < rows) lse[i * args.lse.row] = row_lse;
    }
    Base::meet();  // all warps have read Q
    T* const out = rows_of<T>(args.out, b, first_row + before, h);
    store_rows<T, kD, 1, kD>(acc, factor, held(0), warp_row() - before, 0, out, args.out.row,
                             rows - before, p.value_dim);
    Base::release_held();
  }

  __device__ __forceinline__ void run() {
    const auto of_tile = [&](const Queries& tile, const Partners& keys, int) {
      Softmax softmax;
      Output acc;
      clear(acc);
      Base::wait_for_held();
      if (keys.start < keys.stop) attend(tile, keys, acc, softmax);
      write(tile, acc, softmax);
    };
    Base::in_turns(
        [&] { for_each_tile<Tile, Side::queries>(args.problem, args.schedule, of_tile); });
  }
};

template <class Tile>
__device__ __forceinline__ void produce(const Arguments& args, const SharedTiles<Tile>& shared) {
  const Attention& p = args.of.problem;
  Producer<Tile> producer{shared};
  const auto of_tile = [&](const TileOf<Tile::kRows>& tile, const Partners& keys, int) {
    const int batch = p.cu_q ? 0 : tile.b, kv_head = tile.h / p.group();
    const auto stream = [&](int tensor, int block) {
      producer.stream(tensor, args.streamed[tensor], tile.at.first_k + block, kv_head, batch);
    };
    // Keys first: they find room while the tile before still keeps Q's place.
    if (keys.start < keys.stop) stream(kKeys, keys.start);
    producer.hold(args.held, tile.at.first_q + tile.first, tile.h, batch);
    for (int block = keys.start; block < keys.stop; block += Tile::kBlock) {
      if (block + Tile::kBlock < keys.stop) stream(kKeys, block + Tile::kBlock);
      stream(kValues, block);
    }
  };
  for_each_tile<Tile, Side::queries>(p, args.of.schedule, of_tile);
}

template <class T, int kD, bool kPlain>
__global__ void __launch_bounds__(ForwardTile<kD, kPlain>::kThreads, 1)
    attention_sm90_fwd_kernel(const __grid_constant__ Arguments args) {
#if CEG_SM90A
  using Shared = SharedTiles<ForwardTile<kD, kPlain>>;
  run_roles<ForwardTile<kD, kPlain>>(
      args, [&](const Shared& shared) { produce(args, shared); },
      [&](const Shared& shared) { Consumer<T, kD, kPlain>(shared, args.of).run(); });
#else
  __trap();  // code for another GPU must not leave the output as it was
#endif
}

}  // namespace

void attention_sm90_fwd(const AttentionFwd& args, DType dtype, uintptr_t stream) {
  with_tile(dtype, args.problem, [&](auto item, auto head, auto plain) {
    using T = decltype(item);
    constexpr int kD = decltype(head)::kWidth;
    using Tile = ForwardTile<kD, plain.value>;
    const MappedRows rows(args);
    Arguments all = {args,
                     {tensor_map("q", dtype, rows.q, 64)},
                     {tensor_map("k", dtype, rows.k, Tile::kBlock),
                      tensor_map("v", dtype, rows.v, Tile::kBlock)}};
    launch_persistent<Tile>("attention_sm90_fwd_kernel",
                            attention_sm90_fwd_kernel<T, kD, plain.value>, all, all.of.schedule,
                            args.problem.max_q, stream);
  });
}

void list_attention_sm90_fwd(Kernels& kernels) {
  list_tiles<ForwardTile>(
      kernels, "attention_sm90_fwd_kernel", [](auto item, auto head, auto plain) {
        return attention_sm90_fwd_kernel<decltype(item), decltype(head)::kWidth, plain.value>;
      });
}

}  // namespace ceg::cuda
