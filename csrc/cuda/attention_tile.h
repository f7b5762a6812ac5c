// What the sm_80 attention kernels share: tiles in shared memory, products of tiles by a warp, the
// logit of a pair, who sees whom.
//   Accumulators of a warp: [kRows][n / 8][4], kRows bands of 16 rows, n columns, each 16 x 8 block
//   as mma leaves it: a lane has rows lane / 4 and lane / 4 + 8, columns lane % 4 * 2 + {0, 1}.
#pragma once

#include <cmath>

#include "attention.h"
#include "cp_async.h"
#include "mma.h"
#include "swizzle.h"

namespace ceg::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInf = __builtin_huge_valf();

__device__ __forceinline__ float exp2_fast(float x) {
#ifdef CEG_CUDA_SIM
  return std::exp2(x);
#else
  // PTX ISA, "Floating Point Instructions: ex2": relative error 2^-22, exp2(-inf) = 0.
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Where sequence b begins in its tensors, and how long it is. Positions are 32 bits, as cu_seqlens
// are; rows_of() multiplies in 64.
struct Sequence {
  int first_q, first_k, n_q, n_k;

  __device__ __forceinline__ Sequence(const Attention& p, int b)
      : first_q(0), first_k(0), n_q(p.max_q), n_k(p.max_k) {
    if (p.cu_q) {
      first_q = p.cu_q[b];
      n_q = p.cu_q[b + 1] - p.cu_q[b];
      first_k = p.cu_k[b];
      n_k = p.cu_k[b + 1] - p.cu_k[b];
    }
  }
  // The key that stands beside query 0.
  __device__ __forceinline__ int shift() const { return n_k - n_q; }
};

// Whose rows a tile has; the other side's are its columns.
enum class Side { queries, keys };

// How the rows of a tile meet the columns: see partners().
struct Meeting {
  int offset, before, after, count;

  template <Side kSide>
  static __device__ __forceinline__ Meeting of(const Attention& p, const Sequence& at) {
    if constexpr (kSide == Side::queries) return {at.shift(), p.left, p.right, at.n_k};
    return {-at.shift(), p.right, p.left, at.n_q};
  }
  template <int kBlock>
  __device__ __forceinline__ Partners partners(int first, int last) const {
    return cuda::partners<kBlock>(first, last, offset, before, after, count);
  }
};

// blockIdx.x and threadIdx.x, read again by each call: what follows from them is computed again,
// too, instead of taking registers from one end of a loop to the other.
__device__ __forceinline__ int block_index() {
#ifdef CEG_CUDA_SIM
  return static_cast<int>(blockIdx.x);
#else
  int index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
#endif
}
__device__ __forceinline__ int thread_index() {
#ifdef CEG_CUDA_SIM
  return static_cast<int>(threadIdx.x);
#else
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
#endif
}

// What follows from it is computed again, too.
__device__ __forceinline__ int again(int index) {
#ifndef CEG_CUDA_SIM
  asm volatile("" : "+r"(index));
#endif
  return index;
}

// The tile of a block of threads: kTile rows of one head of one sequence, of queries or keys.
template <int kTile>
struct TileOf {
  int b, h, first;
  Sequence at;

  __device__ __forceinline__ TileOf(const Attention& p, const Schedule& schedule, int heads,
                                    bool last_tile_first)
      : TileOf(p, heads, schedule.place(block_index(), last_tile_first)) {}

  __device__ __forceinline__ TileOf(const Attention& p, int heads, Schedule::Place place)
      : b(place.head / heads), h(place.head % heads), first(place.tile * kTile), at(p, b) {}
};

template <class T>
__device__ __forceinline__ T* rows_of(const View& view, int b, int64_t first, int h) {
  return static_cast<T*>(view.data) + b * view.batch + first * view.row + h * view.head;
}

// Brings tiles of kRows rows of a matrix of `width` columns, one behind the other.
template <class T, int kRows, int kD, int kThreads>
struct TileLoader {
  using Layout = Swizzle<kD>;
  static constexpr int kAtOnce = kThreads / Layout::kChunks;  // rows
  static_assert(kThreads % Layout::kChunks == 0 && kRows % kAtOnce == 0, "threads share evenly");

  const T* from;  // of this thread in the next tile

  // `source`: the next tile's first item.
  __device__ __forceinline__ TileLoader(const T* source, int64_t stride) {
    const int thread = thread_index();
    from = source + thread / Layout::kChunks * stride + thread % Layout::kChunks * Layout::kChunk;
  }

  // Zeros beyond `rows` rows and `width` columns, so that a smaller head_dim adds nothing and no
  // NaN of a stranger's row comes in.
  __device__ __forceinline__ void load(SharedAddress tile, int64_t stride, int rows, int width) {
    const int thread = thread_index();
    const int row = thread / Layout::kChunks, chunk = thread % Layout::kChunks;
    const int there = chunk * Layout::kChunk < width ? rows - row : 0;
#pragma unroll
    for (int i = 0; i < kRows; i += kAtOnce) {
      cp_async_16(tile + Layout::offset(row + i, chunk), from, i < there);
      from += kAtOnce * stride;
    }
  }
};

// s += A B^T of kRows * 16 rows of tile A, from `row` on, and kColumns rows of tile B.
template <class T, int kD, int kRows, int kColumns>
__device__ __forceinline__ void product_of_rows(float (&s)[kRows][kColumns / 8][4],
                                                SharedAddress a_tile, int row,
                                                SharedAddress b_tile) {
  using Layout = Swizzle<kD>;
  const int lane = thread_index() % kWarp;
  // ldmatrix's four matrices: of A rows then columns, of B columns then rows vary faster.
  const SharedAddress a_at = a_tile + Layout::offset(row + lane % 16, lane / 16);
  const SharedAddress b_at = b_tile + Layout::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < kD / 16; ++k) {
    uint32_t a[kRows][4];
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      ldmatrix_x4(a[m], Layout::moved(a_at, 16 * m, 2 * k));
    }
#pragma unroll
    for (int n = 0; n < kColumns / 8; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, Layout::moved(b_at, 8 * n, 2 * k));
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        mma_m16n8k16<T>(s[m][n], a[m], b[0], b[1]);
        mma_m16n8k16<T>(s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Accumulators as the A operand of the next product: the same lanes hold the same rows.
template <class T, int kRows, int kBlocks>
__device__ __forceinline__ void to_operand(uint32_t (&a)[kRows][kBlocks / 2][4],
                                           const float (&s)[kRows][kBlocks][4]) {
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int n = 0; n < kBlocks; n += 2) {
      a[m][n / 2][0] = pack<T>(s[m][n][0], s[m][n][1]);
      a[m][n / 2][1] = pack<T>(s[m][n][2], s[m][n][3]);
      a[m][n / 2][2] = pack<T>(s[m][n + 1][0], s[m][n + 1][1]);
      a[m][n / 2][3] = pack<T>(s[m][n + 1][2], s[m][n + 1][3]);
    }
  }
}

// acc += A B of kSteps * 16 rows of tile B and its kColumns columns from `column` on.
template <class T, int kD, int kRows, int kSteps, int kColumns>
__device__ __forceinline__ void product(float (&acc)[kRows][kColumns / 8][4],
                                        const uint32_t (&a)[kRows][kSteps][4], SharedAddress b_tile,
                                        int column) {
  using Layout = Swizzle<kD>;
  const int lane = thread_index() % kWarp;
  const SharedAddress at = b_tile + Layout::offset(lane % 16, lane / 16);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; n += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, Layout::moved(at, 16 * k, n + column / 8));
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        mma_m16n8k16<T>(acc[m][n], a[m][k], b[0], b[1]);
        mma_m16n8k16<T>(acc[m][n + 1], a[m][k], b[2], b[3]);
      }
    }
  }
}

template <int kRows, int kBlocks>
__device__ __forceinline__ void clear(float (&acc)[kRows][kBlocks][4]) {
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] = 0;
    }
  }
}

// The softcap's tanh. Near 0 the formula with exp loses digits: a polynomial, error < 2e-7.
__device__ __forceinline__ float tanh_accurate(float x) {
  const float a = std::fabs(x);
  const float large = 1 - 2 / (exp2_fast(a * (2 * kLog2e)) + 1);
  const float s = x * x;
  float t = std::fmaf(s, -0.008863235f, 0.021869488f);
  t = std::fmaf(t, s, -0.053968254f);
  t = std::fmaf(t, s, 0.13333333f);
  t = std::fmaf(t, s, -0.33333333f);
  return a < 0.35f ? std::fmaf(x, s * t, x) : x < 0 ? -large : large;
}

// From q.k to the natural logit: softcap(scale * q.k) - slope * |distance|.
struct Logit {
  float scale, cap, cap_in, slope;

  __device__ __forceinline__ Logit(const Attention& p, int b, int h)
      : scale(p.scale),
        cap(p.softcap),
        cap_in(p.softcap > 0 ? p.scale / p.softcap : 0),
        slope(p.slopes ? p.slopes[b * p.slopes_batch + h * p.slopes_head] : 0) {}

  // tanh: for the softcap's derivative, 0 without one.
  __device__ __forceinline__ float of(float dot, int distance, float& tanh) const {
    tanh = 0;
    float s = dot * scale;
    if (cap > 0) {
      tanh = tanh_accurate(dot * cap_in);
      s = cap * tanh;
    }
    return s - slope * static_cast<float>(distance < 0 ? -distance : distance);
  }
};

// The column of element i of 8-column block n of a lane's accumulators, and its row.
__device__ __forceinline__ int column_of(int lane, int n, int i) {
  return 8 * n + lane % 4 * 2 + i % 2;
}
__device__ __forceinline__ int row_of(int lane, int m, int i) {
  return 16 * m + lane / 4 + i / 2 * 8;
}

// A warp's accumulators, each row times its factor, through its own rows of a tile and out to
// memory in 16-byte pieces. Rows [0, rows) of `to` and columns [0, width) are there.
template <class T, int kD, int kRows, int kColumns>
__device__ __forceinline__ void store_rows(const float (&acc)[kRows][kColumns / 8][4],
                                           const float (&factor)[kRows][2], SharedAddress tile,
                                           int row, int column, T* to, int64_t stride, int rows,
                                           int width) {
  using Layout = Swizzle<kD>;
  const int lane = thread_index() % kWarp;
  const SharedAddress at = tile + Layout::offset(row + lane / 4, column / 8);
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        *shared_pointer<uint32_t>(Layout::moved(at, 16 * m + 8 * h, n) + lane % 4 * 4) =
            pack<T>(acc[m][n][2 * h] * factor[m][h], acc[m][n][2 * h + 1] * factor[m][h]);
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = kColumns / Layout::kChunk;
#pragma unroll
  for (int i = lane; i < kRows * 16 * kChunks; i += kWarp) {
    const int r = row + i / kChunks, chunk = column / 8 + i % kChunks;
    if (r < rows && chunk * Layout::kChunk < width) {
      const uint4 bits = *shared_pointer<const uint4>(tile + Layout::offset(r, chunk));
      *reinterpret_cast<uint4*>(to + r * stride + chunk * Layout::kChunk) = bits;
    }
  }
}

}  // namespace ceg::cuda
