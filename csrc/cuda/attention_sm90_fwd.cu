// Flash attention forward for sm_90a: TMA, mbarriers, wgmma.
//
// A block of threads takes tile after tile of kM queries of one head. Its first warpgroup brings Q
// and, in a ring of stages each, blocks of kN keys and values; each of the others has 64 queries,
// and keeps scores, probabilities and output in registers. The scores of a block are computed while
// the softmax of the block before waits for nothing, and the output of that one while its own
// softmax runs. Warpgroups take turns at the tensor cores, so that one is in its softmax while
// another multiplies (Shah et al. 2024, arXiv 2407.08608).
#include "attention_launch.h"
#include "attention_softmax.h"
#include "tma.h"
#include "wgmma.h"

namespace ceg::cuda {

struct AttentionSm90 {
  AttentionFwd fwd;
  TensorMap q, k, v;
};

namespace {

// Chosen with the compiler's report, measured on no GPU.
template <int kHead, bool kPlain>
struct Sm90Tile {
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kM = 64 * kConsumers, kN = 128;
  static constexpr int kStages = 2;
  // Of a thread: at the start each has 65536 / kThreads, rounded down to a multiple of 8.
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static_assert((kProducerRegisters + kConsumers * kConsumerRegisters) * kWarpgroup <= 65536);

  using Queries = Panels<64, kHead>;  // of a warpgroup
  using Keys = Panels<kN, kHead>;     // and values

  // Shared memory, in bytes.
  static constexpr int kKeys = kConsumers * Queries::kBytes;
  static constexpr int kValues = kKeys + kStages * Keys::kBytes;
  static constexpr int kBarriers = kValues + kStages * Keys::kBytes;
  static constexpr int kSharedBytes =
      kBarriers + (2 + 4 * kStages) * static_cast<int>(sizeof(Mbarrier));
  static_assert(kSharedBytes <= 227 << 10, "sm_90 has no more");
};

// The block's shared memory. A full barrier completes when its tile is there, an empty one when all
// warps of all consumers have read it.
template <class Tile>
struct SharedTiles {
  SharedAddress base;

  __device__ __forceinline__ SharedTiles() : base(shared_address(dynamic_shared_memory())) {}

  __device__ __forceinline__ SharedAddress q(int consumer) const {
    return base + consumer * Tile::Queries::kBytes;
  }
  __device__ __forceinline__ SharedAddress k(int stage) const {
    return base + Tile::kKeys + stage * Tile::Keys::kBytes;
  }
  __device__ __forceinline__ SharedAddress v(int stage) const {
    return base + Tile::kValues + stage * Tile::Keys::kBytes;
  }
  __device__ __forceinline__ SharedAddress q_full() const { return barrier(0); }
  __device__ __forceinline__ SharedAddress q_empty() const { return barrier(1); }
  __device__ __forceinline__ SharedAddress k_full(int stage) const {
    return barrier(2 + 4 * stage);
  }
  __device__ __forceinline__ SharedAddress k_empty(int stage) const {
    return barrier(3 + 4 * stage);
  }
  __device__ __forceinline__ SharedAddress v_full(int stage) const {
    return barrier(4 + 4 * stage);
  }
  __device__ __forceinline__ SharedAddress v_empty(int stage) const {
    return barrier(5 + 4 * stage);
  }

  __device__ __forceinline__ void init_barriers() const {
    const auto init = [](SharedAddress full, SharedAddress empty) {
      mbarrier_init(full, 1);
      mbarrier_init(empty, Tile::kConsumers * kWarpgroup / kWarp);
    };
    init(q_full(), q_empty());
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      init(k_full(stage), k_empty(stage));
      init(v_full(stage), v_empty(stage));
    }
    mbarrier_init_fence();
  }

 private:
  __device__ __forceinline__ SharedAddress barrier(int i) const {
    return base + Tile::kBarriers + i * static_cast<int>(sizeof(Mbarrier));
  }
};

// f(tile, keys) for each tile of this block, the producer's and the consumers' loop.
template <class Tile, class F>
__device__ __forceinline__ void for_each_tile(const AttentionFwd& args, F f) {
  const Attention& p = args.problem;
  const int blocks = static_cast<int>(args.schedule.blocks());
  for (int block = block_index(); block < blocks; block += static_cast<int>(gridDim.x)) {
    const TileOf<Tile::kM> tile(p, p.heads, args.schedule.place(block, true));
    if (tile.first >= tile.at.n_q) continue;
    const int last = least(tile.first + Tile::kM, tile.at.n_q) - 1;
    f(tile, partners<Tile::kN>(tile.first, last, tile.at.shift(), p.left, p.right, tile.at.n_k));
  }
}

// One thread: fills what the consumers have emptied.
template <class Tile>
__device__ __forceinline__ void produce(const AttentionSm90& args,
                                        const SharedTiles<Tile>& shared) {
  const Attention& p = args.fwd.problem;
  RingPlace<1> q_place;
  RingPlace<Tile::kStages> k_place, v_place;
  for_each_tile<Tile>(args.fwd, [&](const TileOf<Tile::kM>& tile, const Partners& keys) {
    const int batch = p.cu_q ? 0 : tile.b;
    const auto load = [&](const TensorMap& map, SharedAddress to, SharedAddress full, auto panels,
                          int row, int head) {
      using Panels = decltype(panels);
#pragma unroll
      for (int i = 0; i < Panels::kCount; ++i) {
        tma_load(to + i * Panels::kPanelBytes, map, full, i * kBoxColumns, row, head, batch);
      }
    };
    const auto load_keys = [&](const TensorMap& map, auto& place, SharedAddress to,
                               SharedAddress full, SharedAddress empty, int block) {
      mbarrier_wait(empty, place.parity ^ 1);
      mbarrier_arrive_expect_tx(full, Tile::Keys::kBytes);
      load(map, to, full, typename Tile::Keys(), tile.at.first_k + block, tile.h / p.group());
      place.advance();
    };
    const auto load_k = [&](int block) {
      const int stage = k_place.stage;
      load_keys(args.k, k_place, shared.k(stage), shared.k_full(stage), shared.k_empty(stage),
                block);
    };
    const auto load_v = [&](int block) {
      const int stage = v_place.stage;
      load_keys(args.v, v_place, shared.v(stage), shared.v_full(stage), shared.v_empty(stage),
                block);
    };

    // Keys first: they find room while the tile before still keeps Q's place.
    if (keys.start < keys.stop) load_k(keys.start);
    mbarrier_wait(shared.q_empty(), q_place.parity ^ 1);
    mbarrier_arrive_expect_tx(shared.q_full(), Tile::kConsumers * Tile::Queries::kBytes);
    for (int i = 0; i < Tile::kConsumers; ++i) {
      load(args.q, shared.q(i), shared.q_full(), typename Tile::Queries(),
           tile.at.first_q + tile.first + 64 * i, tile.h);
    }
    q_place.advance();
    for (int block = keys.start; block < keys.stop; block += Tile::kN) {
      if (block + Tile::kN < keys.stop) load_k(block + Tile::kN);
      load_v(block);
    }
  });
}

// Named barriers: 0 is __syncthreads'.
constexpr int kWarpgroupBarrier = 1;

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

// The warp is done with a tile that the producer may overwrite.
__device__ __forceinline__ void release(SharedAddress empty) {
  __syncwarp();
  if (thread_index() % kWarp == 0) mbarrier_arrive(empty);
}

template <class T, int kD, bool kPlain>
__device__ __forceinline__ void consume(const AttentionSm90& args,
                                        const SharedTiles<Sm90Tile<kD, kPlain>>& shared) {
  using Tile = Sm90Tile<kD, kPlain>;
  using Queries = typename Tile::Queries;
  using Keys = typename Tile::Keys;
  constexpr int kN = Tile::kN;
  const AttentionFwd& fwd = args.fwd;
  const Attention& p = fwd.problem;
  const int consumer = thread_index() / kWarpgroup - 1;
  RingPlace<1> q_place;
  RingPlace<Tile::kStages> k_place, v_place;

  for_each_tile<Tile>(fwd, [&](const TileOf<Tile::kM>& tile, const Partners& keys) {
    const auto [b, h, first, at] = tile;
    const int warp_row = 64 * consumer + thread_index() % kWarpgroup / kWarp * 16;  // in the tile
    const int warp_last = least(first + warp_row + 16, at.n_q) - 1;
    const Partners own =
        partners<kN>(first + warp_row, warp_last, at.shift(), p.left, p.right, at.n_k);
    const Logit logit(p, b, h);
    OnlineSoftmax<std::is_same_v<T, bf16>, 1, kN / 8> softmax;
    float acc[1][kD / 8][4];
    clear(acc);
    mbarrier_wait(shared.q_full(), q_place.parity);
    q_place.advance();

    for (int block = keys.start; block < keys.stop; block += kN) {
      // Scores.
      float s[1][kN / 8][4];
      mbarrier_wait(shared.k_full(k_place.stage), k_place.parity);
      const uint64_t q = operand_of_rows<Queries>(descriptor_address(shared.q(consumer)));
      const uint64_t k = operand_of_rows<Keys>(descriptor_address(shared.k(k_place.stage)));
      wgmma_fence(s[0]);
#pragma unroll
      for (int step = 0; step < kD / 16; ++step) {
        wgmma<T>(s[0], step_of_rows<Queries>(q, step), step_of_rows<Keys>(k, step), step > 0);
      }
      wgmma_commit();
      wgmma_wait<0>(s[0]);
      release(shared.k_empty(k_place.stage));
      k_place.advance();

      // Softmax.
      const bool masked = own.masked(block);
      if (!kPlain || masked) {
        mask<kPlain>(s, first + warp_row + at.shift(), block, at.n_k, p.left, p.right, masked,
                     logit);
      }
      softmax.step(s, acc, p.to_log2);
      uint32_t weights[1][kN / 16][4];
      to_operand<T>(weights, s);

      // Output.
      mbarrier_wait(shared.v_full(v_place.stage), v_place.parity);
      if (p.cu_q && block + kN > at.n_k) {
        clear_rows<Keys>(shared.v(v_place.stage), at.n_k - block, kWarpgroupBarrier + consumer);
      }
      const uint64_t v = operand_of_columns<Keys>(descriptor_address(shared.v(v_place.stage)));
      wgmma_fence(acc[0], weights[0]);
#pragma unroll
      for (int step = 0; step < kN / 16; ++step) {
        wgmma<T>(acc[0], weights[0][step], step_of_columns<Keys>(v, step), true);
      }
      wgmma_commit();
      wgmma_wait<0>(acc[0]);
      release(shared.v_empty(v_place.stage));
      v_place.advance();
    }

    // Normalise and write, through the place of this warpgroup's queries.
    const int rows = at.n_q - first, first_row = at.first_q + first;
    const int lane = thread_index() % kWarp;
    float factor[1][2];
    float* const lse = rows_of<float>(fwd.lse, b, first_row, h);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float row_lse;
      softmax.finish(0, half, p, p.sink ? p.sink + h * p.sink_head : nullptr, factor[0][half],
                     row_lse);
      const int i = warp_row + row_of(lane, 0, 2 * half);
      if (lane % 4 == 0 && i < rows) lse[i * fwd.lse.row] = row_lse;
    }
    named_barrier_sync(kWarpgroupBarrier + consumer, kWarpgroup);
    T* const out = rows_of<T>(fwd.out, b, first_row + 64 * consumer, h);
    store_rows<T, kD, 1, kD>(acc, factor, shared.q(consumer), warp_row % 64, 0, out, fwd.out.row,
                             rows - 64 * consumer, p.value_dim);
    async_proxy_fence();
    release(shared.q_empty());
  });
}

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
    consume<T, kD, kPlain>(args, shared);
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
