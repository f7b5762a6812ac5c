// What the sm_90a attention forward shares between the warpgroup that brings tiles and those that
// read them: shapes, shared memory, the order of tiles; and the former.
#pragma once

#include "attention_tile.h"
#include "tma.h"
#include "warpgroup.h"

namespace ceg::cuda {

struct AttentionSm90 {
  AttentionFwd fwd;
  TensorMap q, k, v;
};

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
  static_assert(Queries::kBytes % Queries::kAlignment == 0 && Keys::kBytes % Keys::kAlignment == 0);

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

}  // namespace ceg::cuda
