// Flash attention forward for sm_90a: TMA, mbarriers, wgmma.
//
// A block of threads takes tile after tile of kM queries of one head. Its first warpgroup brings Q
// and, in a ring of stages each, blocks of kN keys and values; each of the others has 64 queries,
// and keeps scores, probabilities and output in registers. The output of a block is summed while
// the next one is in its softmax, and warpgroups take turns at the tensor cores, so that one
// multiplies while another is in its softmax (Shah et al. 2024, arXiv 2407.08608).
#include "attention_launch.h"
#include "attention_sm90.h"
#include "attention_softmax.h"
#include "wgmma.h"

namespace ceg::cuda {

namespace {

// Rows of a tile of values from `first` on become zeros: a stranger's NaN times a weight of 0 is
// NaN.
template <class Values>
__device__ __forceinline__ void clear_rows(SharedAddress tile, int first, int barrier) {
  constexpr int kChunks = Values::kCount * 8;
  const int thread = thread_index() % kWarpgroup;
  for (int i = first * kChunks + thread; i < Values::kRows * kChunks; i += kWarpgroup) {
    *shared_pointer<uint4>(tile + Values::offset(i / kChunks, i % kChunks)) =
        make_uint4(0, 0, 0, 0);
  }
  async_proxy_fence();
  named_barrier_sync(barrier, kWarpgroup);
}

// What a consumer does with a tile of 64 queries.
template <class T, int kD, bool kPlain>
struct Consumer {
  using Tile = Sm90Tile<kD, kPlain>;
  using Queries = typename Tile::Queries;
  using Keys = typename Tile::Keys;
  static constexpr int kN = Tile::kN;
  using Softmax = OnlineSoftmax<std::is_same_v<T, bf16>, 1, kN / 8>;
  using Scores = float[1][kN / 8][4];
  using Weights = uint32_t[1][kN / 16][4];
  using Output = float[1][kD / 8][4];
  // Named barriers, one for each consumer; 0 is __syncthreads'.
  static constexpr int kWarpgroupBarrier = 1, kTurnBarrier = 1 + Tile::kConsumers;

  const AttentionFwd& args;
  const SharedTiles<Tile>& shared;
  RingPlace<1> q_place = {};
  RingPlace<Tile::kStages> k_place = {}, v_place = {};

  // Which of the consumers, and the warp's first row among the tile's.
  static __device__ __forceinline__ int index() { return thread_index() / kWarpgroup - 1; }
  static __device__ __forceinline__ int warp_row() { return thread_index() / kWarp * 16 - 4 * 16; }

  // In turns warpgroups issue their products: while those run, another has its softmax.
  static __device__ __forceinline__ void take_turn() {
    named_barrier_sync(kTurnBarrier + index(), 2 * kWarpgroup);
  }
  static __device__ __forceinline__ void pass_turn() {
    named_barrier_arrive(kTurnBarrier + (index() + 1) % Tile::kConsumers, 2 * kWarpgroup);
  }

  // The warp is done with a tile that the producer may overwrite.
  static __device__ __forceinline__ void release(SharedAddress empty) {
    __syncwarp();
    if (thread_index() % kWarp == 0) mbarrier_arrive(empty);
  }

  // A group of products each: s = Q K^T, acc += P V.
  __device__ __forceinline__ void issue_scores(Scores& s) const {
    const uint64_t q = operand_of_rows<Queries>(descriptor_address(shared.q(index())));
    const uint64_t k = operand_of_rows<Keys>(descriptor_address(shared.k(k_place.stage)));
#pragma unroll
    for (int step = 0; step < kD / 16; ++step) {
      wgmma<T>(s[0], step_of_rows<Queries>(q, step), step_of_rows<Keys>(k, step), step > 0);
    }
    wgmma_commit();
  }
  __device__ __forceinline__ void issue_output(Output& acc, const Weights& weights) const {
    const uint64_t v = operand_of_columns<Keys>(descriptor_address(shared.v(v_place.stage)));
#pragma unroll
    for (int step = 0; step < kN / 16; ++step) {
      wgmma<T>(acc[0], weights[0][step], step_of_columns<Keys>(v, step), true);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void wait_for_keys() const {
    mbarrier_wait(shared.k_full(k_place.stage), k_place.parity);
  }
  __device__ __forceinline__ void wait_for_values() const {
    mbarrier_wait(shared.v_full(v_place.stage), v_place.parity);
  }
  __device__ __forceinline__ void release_keys() {
    release(shared.k_empty(k_place.stage));
    k_place.advance();
  }
  __device__ __forceinline__ void release_values() {
    release(shared.v_empty(v_place.stage));
    v_place.advance();
  }

  // Scores of the keys from `block` on become probabilities.
  __device__ __forceinline__ void weigh(Scores& s, const TileOf<Tile::kM>& tile, int block,
                                        Softmax& softmax, const Logit& logit,
                                        float (&rescale)[2]) const {
    const Attention& p = args.problem;
    const int row = tile.first + warp_row(), last = least(row + 16, tile.at.n_q) - 1;
    const Partners own = partners<kN>(row, last, tile.at.shift(), p.left, p.right, tile.at.n_k);
    const bool masked = own.masked(block);
    if (!kPlain || masked) {
      mask<kPlain>(s, row + tile.at.shift(), block, tile.at.n_k, p.left, p.right, masked, logit);
    }
    rescale[0] = softmax.step(0, 0, s, p.to_log2);
    rescale[1] = softmax.step(0, 1, s, p.to_log2);
  }

  // The products of one block run beside the softmax of the next.
  __device__ __forceinline__ void attend(const TileOf<Tile::kM>& tile, const Partners& keys,
                                         Output& acc, Softmax& softmax) {
    const Logit logit(args.problem, tile.b, tile.h);
    Scores s;
    Weights weights;
    float rescale[2];
    wait_for_keys();
    take_turn();
    wgmma_fence(s[0]);
    issue_scores(s);
    pass_turn();
    wgmma_wait<0>(s[0]);
    release_keys();
    weigh(s, tile, keys.start, softmax, logit, rescale);  // acc is 0
    to_operand<T>(weights, s);

    for (int block = keys.start + kN; block < keys.stop; block += kN) {
      wait_for_keys();
      take_turn();
      wgmma_fence(s[0]);
      issue_scores(s);
      wait_for_values();
      wgmma_fence(acc[0], weights[0]);
      issue_output(acc, weights);
      pass_turn();
      wgmma_wait<1>(s[0]);
      release_keys();
      weigh(s, tile, block, softmax, logit, rescale);
      wgmma_wait<0>(acc[0], weights[0]);
      release_values();
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[0][n][i] *= rescale[i / 2];
      }
      to_operand<T>(weights, s);
    }

    wait_for_values();
    const int there = tile.at.n_k - (keys.stop - 1) / kN * kN;  // keys of the last block
    if (args.problem.cu_q && there < kN) {
      clear_rows<Keys>(shared.v(v_place.stage), there, kWarpgroupBarrier + index());
    }
    wgmma_fence(acc[0], weights[0]);
    issue_output(acc, weights);
    wgmma_wait<0>(acc[0], weights[0]);
    release_values();
  }

  // Normalises, and writes through the place of this warpgroup's queries.
  __device__ __forceinline__ void write(const TileOf<Tile::kM>& tile, const Output& acc,
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
    named_barrier_sync(kWarpgroupBarrier + index(), kWarpgroup);  // all warps have read Q
    T* const out = rows_of<T>(args.out, b, first_row + before, h);
    store_rows<T, kD, 1, kD>(acc, factor, shared.q(index()), warp_row() - before, 0, out,
                             args.out.row, rows - before, p.value_dim);
    async_proxy_fence();
    release(shared.q_empty());
  }

  __device__ __forceinline__ void run() {
    if (index() == Tile::kConsumers - 1) pass_turn();
    for_each_tile<Tile>(args, [&](const TileOf<Tile::kM>& tile, const Partners& keys) {
      Softmax softmax;
      Output acc;
      clear(acc);
      mbarrier_wait(shared.q_full(), q_place.parity);
      q_place.advance();
      if (keys.start < keys.stop) attend(tile, keys, acc, softmax);
      write(tile, acc, softmax);
    });
    if (index() == 0) take_turn();  // which the last one passed
  }
};

template <class T, int kD, bool kPlain>
__global__ void __launch_bounds__(Sm90Tile<kD, kPlain>::kThreads, 1)
    attention_sm90_fwd_kernel(const __grid_constant__ AttentionSm90 args) {
#if CEG_SM90A
  using Tile = Sm90Tile<kD, kPlain>;
  const SharedTiles<Tile> shared;
  if (threadIdx.x == 0) {
    tma_prefetch(args.q);
    tma_prefetch(args.k);
    tma_prefetch(args.v);
    shared.init_barriers();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    give_registers<Tile::kProducerRegisters>();
    if (threadIdx.x == 0) produce<Tile>(args, shared);
  } else {
    take_registers<Tile::kConsumerRegisters>();
    Consumer<T, kD, kPlain>{args.fwd, shared}.run();
  }
#endif
}

TensorOfRows rows_of_map(const View& view, int columns, int rows, int heads, int batch) {
  return {view.data, columns, rows, heads, batch, view.row, view.head, view.batch};
}

struct Rows {
  TensorOfRows q, k, v;

  explicit Rows(const AttentionFwd& a) {
    const Attention& p = a.problem;
    const int batch = p.cu_q ? 1 : p.batch;
    q = rows_of_map(a.q, p.head_dim, a.q_rows, p.heads, batch);
    k = rows_of_map(a.k, p.head_dim, a.k_rows, p.kv_heads, batch);
    v = rows_of_map(a.v, p.value_dim, a.k_rows, p.kv_heads, batch);
  }
};

constexpr int kWidest = 128;

}  // namespace

std::string attention_sm90_why_not(const AttentionFwd& args) {
  const int width = most(args.problem.head_dim, args.problem.value_dim);
  if (width > kWidest) return "needs head_dim <= 128, got " + std::to_string(width);
#if !defined(CEG_HAS_SM90A) && !defined(CEG_CUDA_SIM)
  return "needs a build for sm_90a";
#endif
  const int capability = compute_capability();
  if (capability != 90) return "needs sm_90, got sm_" + std::to_string(capability);
  const Rows rows(args);
  for (const auto& [name, t] : {std::pair{"q", &rows.q}, {"k", &rows.k}, {"v", &rows.v}}) {
    if (std::string why = tensor_map_why_not(name, *t); !why.empty()) return why;
  }
  return "";
}

void attention_sm90_fwd(const AttentionFwd& args, DType dtype, uintptr_t stream) {
  with_tile<kWidest>(dtype, args.problem, [&](auto item, auto head, auto plain) {
    using T = decltype(item);
    constexpr int kD = decltype(head)::kWidth;
    using Tile = Sm90Tile<kD, plain.value>;
    const Rows rows(args);
    AttentionSm90 all = {args, tensor_map("q", dtype, rows.q, 64),
                         tensor_map("k", dtype, rows.k, Tile::kN),
                         tensor_map("v", dtype, rows.v, Tile::kN)};
    const char* const name = "attention_sm90_fwd_kernel";
    Schedule& schedule = all.fwd.schedule;
    schedule.tiles = (args.problem.max_q + Tile::kM - 1) / Tile::kM;
    const int64_t blocks = schedule.blocks();
    CEG_CHECK(blocks <= INT32_MAX / 2, name, " must have at most 2^30 tiles, got ", blocks);
    const auto grid = static_cast<unsigned>(least(static_cast<int>(blocks), multiprocessors()));
    launch({name, grid, Tile::kThreads, Tile::kSharedBytes, stream},
           attention_sm90_fwd_kernel<T, kD, plain.value>, all);
  });
}

void list_attention_sm90_fwd(Kernels& kernels) {
  list_tiles<Sm90Tile, kWidest>(
      kernels, "attention_sm90_fwd_kernel", [](auto item, auto head, auto plain) {
        return attention_sm90_fwd_kernel<decltype(item), decltype(head)::kWidth, plain.value>;
      });
}

}  // namespace ceg::cuda
