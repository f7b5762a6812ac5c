// What the sm_90a attention kernels share: a warp that brings tiles, warpgroups that read them, the
// shared memory between both, and the order of tiles.
//   A block of threads takes tile after tile of kRows rows of one head: queries, or keys for their
//   gradients. What it holds of them (Q, K and V, Q and dout) stays while blocks of kBlock rows of
//   the other side stream by (K and V, Q and dout). Each consumer has 64 of the rows, or both share
//   64.
#pragma once

#include "attention_tile.h"
#include "tma.h"
#include "warpgroup.h"
#include "wgmma.h"

namespace ceg::cuda {

template <class Problem, int kHeld>
struct Sm90Arguments {
  Problem of;
  TensorMap held[kHeld], streamed[2];
};

// kRowBytes: beside each row of the first that streams by lies so much more, which the producer
// writes. kLessStages: so many fewer has the second.
template <int kHead, int kBlockRows, int kHeldTensors, int kRingStages, int kRowBytes = 0,
          int kLessStages = 0, int kTileRows = 128>
struct Sm90Tile {
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kRows = kTileRows, kParts = kRows / 64, kBlock = kBlockRows;
  static_assert(kRows % 64 == 0, "wgmma has 64 rows");
  static constexpr int kHeld = kHeldTensors;
  static constexpr int kStages = kRingStages, kAllStages = 2 * kStages - kLessStages;
  // Of a thread: at the start each has 65536 / kThreads, rounded down to a multiple of 8.
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static_assert((kProducerRegisters + kConsumers * kConsumerRegisters) * kWarpgroup <= 65536);

  static constexpr __device__ int stages(int tensor) {
    return tensor == 0 ? kStages : kStages - kLessStages;
  }

  using Own = Panels<64, kHead>;  // what a consumer has of a held tensor
  using Block = Panels<kBlock, kHead>;
  static_assert(Own::kBytes % Own::kAlignment == 0 && Block::kBytes % Block::kAlignment == 0);

  // Shared memory, in bytes.
  static constexpr int kStreamed = kHeld * kParts * Own::kBytes;
  static constexpr int kBeside = kStreamed + kAllStages * Block::kBytes;
  static constexpr int kBesideBytes = kBlock * kRowBytes;
  static constexpr int kBarriers = kBeside + kStages * kBesideBytes;
  static constexpr int kSharedBytes =
      kBarriers + (2 + 2 * kAllStages) * static_cast<int>(sizeof(Mbarrier));
  static_assert(kSharedBytes <= 227 << 10, "sm_90 has no more");
};

// The block's shared memory. A full barrier completes when its tile is there, an empty one when all
// warps of all consumers have read it.
template <class Tile>
struct SharedTiles {
  SharedAddress base;

  __device__ __forceinline__ SharedTiles() : base(shared_address(dynamic_shared_memory())) {}

  __device__ __forceinline__ SharedAddress held(int tensor, int part) const {
    return base + (tensor * Tile::kParts + part) * Tile::Own::kBytes;
  }
  __device__ __forceinline__ SharedAddress streamed(int tensor, int stage) const {
    return base + Tile::kStreamed + (tensor * Tile::kStages + stage) * Tile::Block::kBytes;
  }
  __device__ __forceinline__ SharedAddress beside(int stage) const {
    return base + Tile::kBeside + stage * Tile::kBesideBytes;
  }
  __device__ __forceinline__ SharedAddress held_full() const { return barrier(0); }
  __device__ __forceinline__ SharedAddress held_empty() const { return barrier(1); }
  __device__ __forceinline__ SharedAddress full(int tensor, int stage) const {
    return barrier(2 + 2 * (tensor * Tile::kStages + stage));
  }
  __device__ __forceinline__ SharedAddress empty(int tensor, int stage) const {
    return barrier(3 + 2 * (tensor * Tile::kStages + stage));
  }

  __device__ __forceinline__ void init_barriers() const {
    const auto init = [](SharedAddress full, SharedAddress empty) {
      mbarrier_init(full, 1);
      mbarrier_init(empty, Tile::kConsumers * kWarpgroup / kWarp);
    };
    init(held_full(), held_empty());
    for (int i = 0; i < Tile::kAllStages; ++i) init(full(0, i), empty(0, i));
    mbarrier_init_fence();
  }

 private:
  __device__ __forceinline__ SharedAddress barrier(int i) const {
    return base + Tile::kBarriers + i * static_cast<int>(sizeof(Mbarrier));
  }
};

template <class Tile, Side kSide>
__device__ __forceinline__ TileOf<Tile::kRows> tile_of(const Attention& p, const Schedule& schedule,
                                                       int block) {
  constexpr bool kOfQueries = kSide == Side::queries;
  return {p, kOfQueries ? p.heads : p.kv_heads, schedule.place(block, kOfQueries)};
}

// f(tile, partners, block) for each tile of this block of threads, the producer's and the
// consumers' loop.
template <class Tile, Side kSide, class F>
__device__ __forceinline__ void for_each_tile(const Attention& p, const Schedule& schedule, F f) {
  const int blocks = static_cast<int>(schedule.blocks());
  for (int block = block_index(); block < blocks; block += static_cast<int>(gridDim.x)) {
    const TileOf<Tile::kRows> tile = tile_of<Tile, kSide>(p, schedule, block);
    const int count = kSide == Side::queries ? tile.at.n_q : tile.at.n_k;
    if (tile.first >= count) continue;
    const int last = least(tile.first + Tile::kRows, count) - 1;
    f(tile, Meeting::of<kSide>(p, tile.at).template partners<Tile::kBlock>(tile.first, last),
      block);
  }
}

// A warp that fills what the consumers have emptied.
template <class Tile>
struct Producer {
  const SharedTiles<Tile>& shared;
  RingPlace held_place = {}, place[2] = {};

  static __device__ __forceinline__ bool leads() { return thread_index() % kWarp == 0; }

  template <class Panels>
  static __device__ __forceinline__ void load(const TensorMap& map, SharedAddress to,
                                              SharedAddress full, int row, int head, int batch) {
#pragma unroll
    for (int i = 0; i < Panels::kCount; ++i) {
      tma_load(to + i * Panels::kPanelBytes, map, full, i * kBoxColumns, row, head, batch);
    }
  }

  // What stays, from `row` on.
  __device__ __forceinline__ void hold(const TensorMap (&maps)[Tile::kHeld], int row, int head,
                                       int batch) {
    mbarrier_wait(shared.held_empty(), held_place.parity ^ 1);
    if (leads()) {
      mbarrier_arrive_expect_tx(shared.held_full(), Tile::kStreamed);
#pragma unroll
      for (int i = 0; i < Tile::kHeld; ++i) {
        for (int part = 0; part < Tile::kParts; ++part) {
          load<typename Tile::Own>(maps[i], shared.held(i, part), shared.held_full(),
                                   row + 64 * part, head, batch);
        }
      }
    }
    held_place.advance(1);
  }

  // The next block of what streams by: once there is room, from `row` on.
  __device__ __forceinline__ void wait_for_room(int tensor) const {
    mbarrier_wait(shared.empty(tensor, place[tensor].stage), place[tensor].parity ^ 1);
  }
  __device__ __forceinline__ void fill(int tensor, const TensorMap& map, int row, int head,
                                       int batch) {
    if (leads()) {
      const SharedAddress full = shared.full(tensor, place[tensor].stage);
      mbarrier_arrive_expect_tx(full, Tile::Block::kBytes);
      load<typename Tile::Block>(map, shared.streamed(tensor, place[tensor].stage), full, row, head,
                                 batch);
    }
    place[tensor].advance(Tile::stages(tensor));
  }
  __device__ __forceinline__ void stream(int tensor, const TensorMap& map, int row, int head,
                                         int batch) {
    wait_for_room(tensor);
    fill(tensor, map, row, head, batch);
  }
};

// Where a consumer is in what it reads, and what its warps do together.
template <class Tile>
struct Reader {
  // Named barriers, of each kind one for each consumer; 0 is __syncthreads'.
  static constexpr int kBarrier = 1, kTurnBarrier = 1 + Tile::kConsumers;

  const SharedTiles<Tile>& shared;
  RingPlace held_place = {}, place[2] = {};

  // Which of the consumers, and the warp's first row among the tile's and among the consumer's.
  static __device__ __forceinline__ int index() { return thread_index() / kWarpgroup - 1; }
  static __device__ __forceinline__ int warp_row() { return thread_index() / kWarp * 16 - 4 * 16; }
  static __device__ __forceinline__ int own_row() { return warp_row() % 64; }

  static __device__ __forceinline__ void meet() {
    named_barrier_sync(kBarrier + index(), kWarpgroup);
  }

  // Consumers issue their products in turns: while those run, another has its exponentials. A turn
  // begins with the first consumer and is passed as often as it is taken.
  static __device__ __forceinline__ void take_turn() {
    named_barrier_sync(kTurnBarrier + index(), 2 * kWarpgroup);
  }
  static __device__ __forceinline__ void pass_turn() {
    named_barrier_arrive(kTurnBarrier + (index() + 1) % Tile::kConsumers, 2 * kWarpgroup);
  }
  template <class F>
  static __device__ __forceinline__ void in_turns(F f) {
    if (index() == Tile::kConsumers - 1) pass_turn();
    f();
    if (index() == 0) take_turn();  // which the last one passed
  }

  // The warp is done with a tile that the producer may overwrite.
  static __device__ __forceinline__ void give_back(SharedAddress empty) {
    __syncwarp();
    if (thread_index() % kWarp == 0) mbarrier_arrive(empty);
  }

  __device__ __forceinline__ SharedAddress held(int tensor) const {
    return shared.held(tensor, index());
  }
  __device__ __forceinline__ void wait_for_held() {
    mbarrier_wait(shared.held_full(), held_place.parity);
    held_place.advance(1);
  }
  // What the warp has written there is out.
  __device__ __forceinline__ void release_held() const {
    async_proxy_fence();
    give_back(shared.held_empty());
  }

  __device__ __forceinline__ SharedAddress streamed(int tensor) const {
    return shared.streamed(tensor, place[tensor].stage);
  }
  __device__ __forceinline__ void wait_for(int tensor) const {
    mbarrier_wait(shared.full(tensor, place[tensor].stage), place[tensor].parity);
  }
  __device__ __forceinline__ void release(int tensor) {
    give_back(shared.empty(tensor, place[tensor].stage));
    place[tensor].advance(Tile::stages(tensor));
  }

  // Rows from `first` on of what streams by become zeros: a stranger's NaN times a weight of 0 is
  // NaN. Each consumer does it for itself.
  template <class... Tensors>
  __device__ __forceinline__ void clear_rows(int first, Tensors... tensors) const {
    using Block = typename Tile::Block;
    constexpr int kChunks = Block::kCount * 8;
    const int thread = thread_index() % kWarpgroup;
    for (int i = first * kChunks + thread; i < Block::kRows * kChunks; i += kWarpgroup) {
      const int offset = Block::offset(i / kChunks, i % kChunks);
      ((*shared_pointer<uint4>(streamed(tensors) + offset) = make_uint4(0, 0, 0, 0)), ...);
    }
    async_proxy_fence();
    meet();
  }
};

// A kernel: produce(shared) is the first warp's part, consume(shared) that of the consumers.
template <class Tile, class Arguments, class Produce, class Consume>
__device__ __forceinline__ void run_roles(const Arguments& args, Produce produce, Consume consume) {
  const SharedTiles<Tile> shared;
  if (threadIdx.x == 0) {
    for (const TensorMap& map : args.held) tma_prefetch(map);
    for (const TensorMap& map : args.streamed) tma_prefetch(map);
    shared.init_barriers();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    give_registers<Tile::kProducerRegisters>();
    if (threadIdx.x < kWarp) produce(shared);
  } else {
    take_registers<Tile::kConsumerRegisters>();
    consume(shared);
  }
}

// Products that run beside what follows, until wgmma_wait: s = A B^T of a consumer's rows of tile A
// and all of tile B; acc += A B of an operand in registers and tile B.
template <class T, class A, class B, int kBlocks>
__device__ __forceinline__ void issue_product_of_rows(float (&s)[kBlocks][4], SharedAddress a_tile,
                                                      SharedAddress b_tile) {
  static_assert(A::kCount == B::kCount && B::kRows == 8 * kBlocks);
  const uint64_t a = operand_of_rows<A>(descriptor_address(a_tile));
  const uint64_t b = operand_of_rows<B>(descriptor_address(b_tile));
#pragma unroll
  for (int step = 0; step < 4 * A::kCount; ++step) {
    wgmma<T>(s, step_of_rows<A>(a, step), step_of_rows<B>(b, step), step > 0);
  }
}
template <class T, class B, int kBlocks, int kSteps>
__device__ __forceinline__ void issue_product(float (&acc)[kBlocks][4],
                                              const uint32_t (&a)[kSteps][4],
                                              SharedAddress b_tile) {
  static_assert(B::kCount * 8 == kBlocks && B::kRows >= 16 * kSteps);
  const uint64_t b = operand_of_columns<B>(descriptor_address(b_tile));
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    wgmma<T>(acc, a[step], step_of_columns<B>(b, step), true);
  }
}

}  // namespace ceg::cuda
