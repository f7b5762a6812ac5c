// Tensor-core products of 16-bit operands, and their way out of shared memory.
//   PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" (A: 16 x 16 row-major,
//   B: 16 x 8, C and D: 16 x 8) and "Warp-level matrix load instruction: ldmatrix".
#pragma once

#include "shared_address.h"

namespace ceg {

struct Position {
  int row, column;
  constexpr bool operator==(const Position&) const = default;
};

// Item `half` (0: low 16 bits) of register `i` of a lane: where it stands in the operand.
__host__ __device__ constexpr Position mma_a_position(int lane, int i, int half) {
  return {lane / 4 + i % 2 * 8, lane % 4 * 2 + half + i / 2 * 8};
}
__host__ __device__ constexpr Position mma_b_position(int lane, int i, int half) {
  return {lane % 4 * 2 + half + i * 8, lane / 4};
}
__host__ __device__ constexpr Position mma_c_position(int lane, int i) {
  return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2};
}
// In each 8 x 8 matrix that ldmatrix reads; with .trans in its transpose.
__host__ __device__ constexpr Position ldmatrix_position(int lane, int half) {
  return {lane / 4, lane % 4 * 2 + half};
}

// Two fp32 numbers rounded to 16 bits in a register, the first in its low half, and back.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>, "operands of 16 bits");
  uint32_t bits;
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  }
  return bits;
}
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t bits) {
  std::conditional_t<std::is_same_v<T, bf16>, __nv_bfloat162, __half2> pair;
  memcpy(&pair, &bits, sizeof(bits));
  return make_float2(__low2float(pair), __high2float(pair));
}

#ifdef CEG_CUDA_SIM

namespace sim {

struct Owner {
  int lane, i, half;
};

// Who holds each item of the operands: the fragment tables read backwards.
struct MmaOwners {
  Owner a[16][16] = {}, b[16][8] = {};
  constexpr MmaOwners() {
    for (int lane = 0; lane < 32; ++lane) {
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i) {
          const Position p = mma_a_position(lane, i, half);
          a[p.row][p.column] = {lane, i, half};
        }
        for (int i = 0; i < 2; ++i) {
          const Position p = mma_b_position(lane, i, half);
          b[p.row][p.column] = {lane, i, half};
        }
      }
    }
  }
};
inline constexpr MmaOwners kMmaOwners;

struct MmaOperands {
  uint32_t a[4], b[2];
};

}  // namespace sim

// The manual leaves the order and the rounding of the sum open: here it is rounded once.
template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const sim::MmaOperands mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const sim::MmaOperands* lanes = sim::warp_exchange("mma.sync.m16n8k16", kFullWarp, mine);
  const auto item = [](uint32_t bits, int half) {
    const float2 pair = unpack<T>(bits);
    return half ? pair.y : pair.x;
  };
  float row[2][16], column[2][16];
  const int lane = sim::lane();
  for (int k = 0; k < 16; ++k) {
    for (int j = 0; j < 2; ++j) {
      const sim::Owner of_a = sim::kMmaOwners.a[mma_c_position(lane, 2 * j).row][k];
      const sim::Owner of_b = sim::kMmaOwners.b[k][mma_c_position(lane, j).column];
      row[j][k] = item(lanes[of_a.lane].a[of_a.i], of_a.half);
      column[j][k] = item(lanes[of_b.lane].b[of_b.i], of_b.half);
    }
  }
  for (int i = 0; i < 4; ++i) {
    double sum = c[i];
    for (int k = 0; k < 16; ++k) sum += double{row[i / 2][k]} * column[i % 2][k];
    c[i] = static_cast<float>(sum);
  }
}

namespace sim {

// Lane l's address is row l % 8 of matrix l / 8.
template <bool kTrans>
void ldmatrix(uint32_t (&r)[4], SharedAddress address) {
  const void* const row = reinterpret_cast<const void*>(address);
  check_aligned(row, 16);
  const void* const* rows =
      warp_exchange(kTrans ? "ldmatrix.x4.trans" : "ldmatrix.x4", kFullWarp, row);
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int half = 0; half < 2; ++half) {
      const Position p = ldmatrix_position(lane(), half);
      const int from = kTrans ? p.column : p.row, at = kTrans ? p.row : p.column;
      pair[half] = static_cast<const uint16_t*>(rows[8 * i + from])[at];
    }
    r[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

}  // namespace sim

inline void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) { sim::ldmatrix<false>(r, row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row) { sim::ldmatrix<true>(r, row); }

#else

// PTX ISA, "Warp-level matrix instructions: mma": c += a b.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// PTX ISA, "ldmatrix": lane l brings the address of row l % 8 of matrix l / 8; register i comes
// from matrix i. The memory clobber keeps it behind the barrier that its data waited for.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

#endif

}  // namespace ceg
