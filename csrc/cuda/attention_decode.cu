// Flash attention forward for a few queries (decoding), sm_80 and later: mma.sync, ldmatrix,
// cp.async.
//
// A block of threads takes 16 rows of one group of heads (attention_split.h) and one chunk of the
// group's keys. Its warps have all rows and take turns at the keys, kN at a time: each brings its
// own through a ring in shared memory, with its own running maximum and sum, and waits for nobody
// until the end, where the warps' results are merged. Memory is the limit: what counts is how many
// bytes are under way. Where the keys are in several chunks, each leaves its output, maximum and
// sum, which a second kernel merges. Both merge in a fixed order, without atomics.
#include <type_traits>

#include "attention_decode.h"
#include "attention_launch.h"

namespace ceg::cuda {
namespace {

// Chosen on paper, measured on no GPU: a block has 32 KiB under way, and a multiprocessor holds two
// blocks or more (sm_86, sm_89 and sm_120 one, beyond head_dim 64). A microsecond of an H100's 3.35
// TB/s is 25 KiB for each of its multiprocessors.
template <int kD, bool kPlain>
struct DecodeTile {
  static constexpr int kWarps = kD <= 128 ? 4 : 2, kThreads = kWarp * kWarps;
  static constexpr int kM = kTileRows;
  static constexpr int kN = 16;                    // keys of a warp's step, the depth of one mma
  static constexpr int kTurn = kWarps * kN;        // keys from a warp's step to its next
  static constexpr int kSlots = kD <= 64 ? 5 : 3;  // of a ring, kN keys or their values each
  static constexpr int kSlotBytes = kN * Swizzle<kD>::kRowBytes;
  static constexpr int kRingBytes = kSlots * kSlotBytes;
  static constexpr int kSharedBytes = kM * Swizzle<kD>::kRowBytes + kWarps * kRingBytes;
  // That leaves the registers which the sums want: 128, 168, 255 a thread.
  static constexpr int kBlocksPerSm = kD <= 64 ? 4 : kD <= 128 ? 3 : 2;
  // A warp's part takes the place of its ring, in rows of floats that are apart by 8 banks.
  static constexpr int kPartRow = kD + 8, kPartStats = kM * kPartRow;
  static_assert((kPartStats + 2 * kM) * 4 <= kRingBytes, "no warp may touch another's ring");
  static_assert(kSlots % 2 == 1, "the slot that is filled next takes what was just read, K or V");
  static_assert((kSlots - 1) * kSlotBytes * kWarps == 32 << 10, "bytes under way");
  static_assert(kSharedBytes <= 99 << 10, "sm_86, sm_89 and sm_120 have no more");
};

// Brings a warp kN rows of keys or values at a time, kTurn apart.
template <class T, int kD>
struct StepLoader {
  using Tile = DecodeTile<kD, true>;
  using Layout = Swizzle<kD>;
  static constexpr int kAtOnce = kWarp / Layout::kChunks;  // rows

  const T* from;  // of this lane in the next step
  int64_t stride;
  int row, chunk, left;  // left: rows that are there from the next step on

  __device__ __forceinline__ StepLoader(const View& view, const T* source, int rows, int width)
      : stride(view.row), left(rows) {
    const int lane = thread_index() % kWarp;
    row = lane / Layout::kChunks, chunk = lane % Layout::kChunks;
    from = source + row * stride + chunk * Layout::kChunk;
    if (chunk * Layout::kChunk >= width) left = 0;
  }

  // Zeros beyond the rows and the width: no NaN of a stranger's row comes in. Always a group, so
  // that whoever waits can count.
  __device__ __forceinline__ void load(SharedAddress slot) {
#pragma unroll
    for (int i = 0; i < Tile::kN; i += kAtOnce) {
      cp_async_16(slot + Layout::offset(row + i, chunk), from, row + i < left);
      from += kAtOnce * stride;
    }
    from += (Tile::kTurn - Tile::kN) * stride;
    left -= Tile::kTurn;
    cp_async_commit();
  }
};

// A row of a tile: which query of the sequence, which head.
struct GroupRow {
  int query, h;
  __device__ __forceinline__ GroupRow(int row, int h_kv, int group)
      : query(row / group), h(h_kv * group + row % group) {}
};

template <class T, int kD, bool kPlain>
__global__ void __launch_bounds__(DecodeTile<kD, kPlain>::kThreads,
                                  DecodeTile<kD, kPlain>::kBlocksPerSm)
    attention_decode_kernel(const __grid_constant__ AttentionDecode args) {
  using Tile = DecodeTile<kD, kPlain>;
  using Layout = Swizzle<kD>;
  constexpr int kM = Tile::kM, kN = Tile::kN, kSlots = Tile::kSlots;
  constexpr bool kFused = std::is_same_v<T, bf16>;
  const AttentionFwd& fwd = args.fwd;
  const Attention& p = fwd.problem;
  const auto [tile, chunk, head] = args.split.place(static_cast<int>(blockIdx.x));
  const int b = head / p.kv_heads, h_kv = head % p.kv_heads, group = p.group();
  const Sequence at(p, b);
  const int first_row = tile * kM, rows = at.n_q * group - first_row;
  if (rows <= 0) return;
  const Split::Keys keys = args.split.keys_of(chunk, most(at.shift() - p.left, 0), at.n_k);

  // Load: Q for all, then each warp's own first keys and values.
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const SharedAddress q_tile = shared_address(dynamic_shared_memory());
  const SharedAddress rings = q_tile + kM * Layout::kRowBytes;
  const SharedAddress ring = rings + warp * Tile::kRingBytes;
#pragma unroll
  for (int i = 0; i < kM * Layout::kChunks; i += Tile::kThreads) {
    const int r = (i + thread) / Layout::kChunks, c = (i + thread) % Layout::kChunks;
    const GroupRow row(first_row + r, h_kv, group);
    const T* const from = rows_of<const T>(fwd.q, b, at.first_q + row.query, row.h);
    cp_async_16(q_tile + Layout::offset(r, c), from + c * Layout::kChunk,
                r < rows && c * Layout::kChunk < p.head_dim);
  }
  cp_async_commit();
  const int start = keys.start + warp * kN;
  const auto source = [&](const View& view) {
    return rows_of<const T>(view, b, int64_t{at.first_k} + start, h_kv);
  };
  StepLoader<T, kD> load_k(fwd.k, source(fwd.k), keys.stop - start, p.head_dim);
  StepLoader<T, kD> load_v(fwd.v, source(fwd.v), keys.stop - start, p.value_dim);
#pragma unroll
  for (int slot = 0; slot < kSlots - 1; slot += 2) {
    load_k.load(ring + slot * Tile::kSlotBytes);
    load_v.load(ring + (slot + 1) * Tile::kSlotBytes);
  }
  cp_async_wait<kSlots - 1>();
  __syncthreads();

  // Who sees what, of this lane's two rows.
  int low[2];
  unsigned width[2];
  GroupRow own[2] = {{first_row + lane / 4, h_kv, group}, {first_row + lane / 4 + 8, h_kv, group}};
  const Logit logit[2] = {{p, b, own[0].h}, {p, b, own[1].h}};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int beside = own[half].query + at.shift();
    low[half] = beside - p.left;
    width[half] =
        static_cast<unsigned>(most(least(beside + p.right + 1, keys.stop) - low[half], 0));
  }

  // Visit the keys. Each wait is for the oldest slot under way; what it leaves free, the one that
  // was read before, is filled at once.
  OnlineSoftmax<kFused, 1, kN / 8> softmax;
  float acc[1][kD / 8][4];
  clear(acc);
  SharedAddress read = ring, fill = ring + (kSlots - 1) * Tile::kSlotBytes;
  const auto next = [&](SharedAddress slot) {
    return slot == ring + (kSlots - 1) * Tile::kSlotBytes ? ring : slot + Tile::kSlotBytes;
  };
  const auto step = [&](StepLoader<T, kD>& loader) {
    cp_async_wait<kSlots - 2>();
    __syncwarp();
    loader.load(fill);
    fill = next(fill);
    const SharedAddress here = read;
    read = next(read);
    return here;
  };
  for (int key = start; key < keys.stop; key += Tile::kTurn) {
    const SharedAddress k_tile = step(load_k);
    float s[1][kN / 8][4];
    clear(s);
    product_of_rows<T, kD, 1, kN>(s, q_tile, 0, k_tile);
    // Masks in every step cost nothing where memory is the limit.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < kN / 8; ++n) {
        const int column = key + column_of(lane, n, i);
        float tanh;
        if constexpr (!kPlain) {
          s[0][n][i] = logit[i / 2].of(s[0][n][i], column - low[i / 2] - p.left, tanh);
        }
        if (static_cast<unsigned>(column - low[i / 2]) >= width[i / 2]) s[0][n][i] = -kInf;
      }
    }
    softmax.step(s, acc, p.to_log2);
    uint32_t weights[1][1][4];
    to_operand<T>(weights, s);
    product<T, kD, 1, 1, kD>(acc, weights, step(load_v), 0);
  }

  // Each warp leaves its part where its ring was.
  cp_async_wait_all();
  __syncwarp();
  auto* const part = shared_pointer<float>(ring);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = lane / 4 + 8 * half;
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
      *reinterpret_cast<float2*>(part + r * Tile::kPartRow + column_of(lane, n, 0)) =
          make_float2(acc[0][n][2 * half], acc[0][n][2 * half + 1]);
    }
    const float total = softmax.total_of_quad(0, half);
    if (lane % 4 == 0) {
      *reinterpret_cast<float2*>(part + Tile::kPartStats + 2 * r) =
          make_float2(softmax.top[0][half], total);
    }
  }
  __syncthreads();

  // Merge and write.
  const auto* const parts = shared_pointer<const float>(rings);
  for (int i = thread; i < kM * kD / 8; i += Tile::kThreads) {
    const int r = i / (kD / 8), column = i % (kD / 8) * 8;
    if (r >= rows || column >= p.value_dim) continue;
    Merged m = merge<kFused>(parts + r * Tile::kPartRow + column, Tile::kRingBytes / 4,
                             reinterpret_cast<const float2*>(parts + Tile::kPartStats + 2 * r),
                             Tile::kRingBytes / 8, Tile::kWarps, p.to_log2);
    const GroupRow row(first_row + r, h_kv, group);
    const int64_t t = at.first_q + row.query;
    if (!args.outs) {
      write<T>(fwd, b, t, row.h, column, m);
      continue;
    }
    const int64_t position = p.cu_q ? t : int64_t{b} * fwd.q_rows + t;
    const int64_t index = chunk * args.rows + position * p.heads + row.h;
    if (column == 0) args.stats[index] = make_float2(m.top, m.total);
    if (m.total == 0) continue;
    auto* const to = reinterpret_cast<float4*>(args.outs + index * p.value_dim + column);
    to[0] = make_float4(m.out[0], m.out[1], m.out[2], m.out[3]);
    to[1] = make_float4(m.out[4], m.out[5], m.out[6], m.out[7]);
  }
}

constexpr int kMergeThreads = 128;

// The chunks of a row by a block: `lanes` threads with 8 columns each are a team, and the teams
// take turns at the chunks, so that loads wait for each other in few of them only.
template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    attention_decode_merge_kernel(const __grid_constant__ AttentionDecode args, int lanes) {
  struct Parts {
    float4 outs[kMergeThreads][2];
    float2 stats[kMergeThreads];
  };
  constexpr bool kFused = std::is_same_v<T, bf16>;
  const AttentionFwd& fwd = args.fwd;
  const Attention& p = fwd.problem;
  const int thread = static_cast<int>(threadIdx.x), column = thread % lanes * 8;
  const int team = thread / lanes, teams = kMergeThreads / lanes, chunks = args.split.chunks;
  const int64_t row = blockIdx.x;

  // Each team its chunks.
  Parts& parts = shared_memory<Parts>();
  if (column < p.value_dim) {
    const int64_t first = team * args.rows + row;
    const Merged m = merge<kFused>(
        args.outs + first * p.value_dim + column, teams * args.rows * p.value_dim,
        args.stats + first, teams * args.rows, (chunks - team + teams - 1) / teams, p.to_log2);
    parts.outs[thread][0] = make_float4(m.out[0], m.out[1], m.out[2], m.out[3]);
    parts.outs[thread][1] = make_float4(m.out[4], m.out[5], m.out[6], m.out[7]);
    if (column == 0) parts.stats[team] = make_float2(m.top, m.total);
  }
  __syncthreads();

  // The teams' parts, and write.
  if (team != 0 || column >= p.value_dim) return;
  Merged m = merge<kFused>(reinterpret_cast<const float*>(parts.outs) + column, lanes * 8,
                           parts.stats, 1, least(teams, chunks), p.to_log2);
  const int64_t position = row / p.heads;
  write<T>(fwd, static_cast<int>(position / fwd.q_rows), position % fwd.q_rows,
           static_cast<int>(row % p.heads), column, m);
}

int64_t rows_of_all(const AttentionFwd& args) {
  const Attention& p = args.problem;
  return (p.cu_q ? args.q_rows : int64_t{p.batch} * args.q_rows) * p.heads;
}

Split split_of(const Attention& p) {
  return cuda::split_of(p.max_q * p.group(), int64_t{p.batch} * p.kv_heads,
                        most_seen(p.max_q, p.max_k, p.left), multiprocessors());
}

void merge_chunks(const AttentionDecode& args, DType dtype, uintptr_t stream) {
  int lanes = 1;
  while (lanes * 8 < args.fwd.problem.value_dim) lanes *= 2;
  CEG_CHECK(args.rows <= INT32_MAX, "q must have at most 2^31 - 1 rows, got ", args.rows);
  launch(
      {"attention_decode_merge_kernel", static_cast<unsigned>(args.rows), kMergeThreads, 0, stream},
      dtype == DType::bf16 ? attention_decode_merge_kernel<bf16>
                           : attention_decode_merge_kernel<f16>,
      args, lanes);
}

}  // namespace

int64_t attention_decode_rows(const AttentionFwd& args) {
  const int chunks = split_of(args.problem).chunks;
  return chunks > 1 ? chunks * rows_of_all(args) : 0;
}

void attention_decode(const AttentionFwd& fwd, float* parts, DType dtype, uintptr_t stream) {
  const Attention& p = fwd.problem;
  AttentionDecode args = {fwd, split_of(p), nullptr, nullptr, rows_of_all(fwd)};
  if (args.split.chunks > 1) {
    args.outs = parts;
    args.stats = reinterpret_cast<float2*>(parts + args.split.chunks * args.rows * p.value_dim);
  }
  const int64_t blocks = args.split.blocks(int64_t{p.batch} * p.kv_heads);
  CEG_CHECK(blocks <= INT32_MAX, "q must have at most 2^31 - 1 tiles of 16 rows, got ", blocks);
  with_tile(dtype, p, [&](auto item, auto head, auto plain) {
    constexpr int kD = decltype(head)::kWidth;
    using Tile = DecodeTile<kD, plain.value>;
    launch({"attention_decode_kernel", static_cast<unsigned>(blocks), Tile::kThreads,
            Tile::kSharedBytes, stream},
           attention_decode_kernel<decltype(item), kD, plain.value>, args);
  });
  if (args.split.chunks > 1) merge_chunks(args, dtype, stream);
}

void list_attention_decode(Kernels& kernels) {
  list_tiles<DecodeTile>(kernels, "attention_decode_kernel", [](auto item, auto head, auto plain) {
    return attention_decode_kernel<decltype(item), decltype(head)::kWidth, plain.value>;
  });
  const auto list = [&](const char* name, const void* address) {
    kernels.push_back({name, address, kMergeThreads});
  };
  list("attention_decode_merge_kernel bf16",
       reinterpret_cast<const void*>(attention_decode_merge_kernel<bf16>));
  list("attention_decode_merge_kernel f16",
       reinterpret_cast<const void*>(attention_decode_merge_kernel<f16>));
}

}  // namespace ceg::cuda
