// The engine of bf16 attention on AMX: attention_gemm.h's product on tiles of 16 x 16.
//
// A tile register has 16 rows of 64 bytes: 16 x 32 items of A, 16 pairs of k x 16 columns of B, or
// 16 x 16 floats of C. With a stride between the rows they are loaded from the packed operands of
// DotBf16 as they are. Four accumulators, two tiles of A and two of B fill the eight registers: 32
// rows x 32 columns of C with as many loads as multiplications.
//
// The instruction adds up 32 items of k by itself, then adds the sum to C. So k is cut at multiples
// of 32 from the start of a block, whatever part of it a tile of rows sees, and a row's bits stay
// its own; items of k that a row does not see are multiplied by zeros. Denormals count as zero.
#pragma once

#if defined(__AMX_BF16__)

#include "attention_gemm.h"
#include "tiles.h"

namespace ceg::CEG_ISA {

struct AmxBf16 : DotBf16 {
  using ThreadState = TileRegisters;
  static constexpr int kRows = 2 * kTile;
  static constexpr int kAlign = 32;
  // p.v loads and stores its accumulators once a block: 256 keys are 10-15% faster than 128.
  static constexpr int kForwardBlocks = 2;
  static constexpr bool kStridedA = false;
  static constexpr int kRowPad = kTile;
  static constexpr int kColumnPad = 2 * kTile;
};

// C of 16 rows: [16][stride], two tiles of columns.
struct TileRow {
  float* c;
  int64_t stride;
};

// One or two tiles of rows, two of columns; the second rows' A lies 16 rows below the first's.
template <bool two>
inline void amx_tiles(const Gemm<AmxBf16>& g, const bf16* b, TileRow top, TileRow bottom) {
  const int64_t a_bytes = g.a_row * 2, b_bytes = g.b_step * 2;
  const int64_t top_bytes = top.stride * 4, bottom_bytes = bottom.stride * 4;
  // The compiler does not know that tile loads read memory.
  asm volatile("" ::: "memory");
  if (g.scale == nullptr) {
    _tile_zero(0);
    _tile_zero(1);
    if (two) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, top.c, top_bytes);
    _tile_loadd(1, top.c + kTile, top_bytes);
    if (two) {
      _tile_loadd(2, bottom.c, bottom_bytes);
      _tile_loadd(3, bottom.c + kTile, bottom_bytes);
    }
  }
  constexpr int pairs = AmxBf16::kAlign / 2;
  const bf16* a = g.a;
  for (int64_t step = 0; step < g.steps; step += pairs) {
    _tile_loadd(6, b, b_bytes);
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(7, b + kTile * 2, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (two) {
      _tile_loadd(5, a + kTile * g.a_row, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    a += pairs * g.a_step;
    b += pairs * g.b_step;
  }
  _tile_stored(0, top.c, top_bytes);
  _tile_stored(1, top.c + kTile, top_bytes);
  if (two) {
    _tile_stored(2, bottom.c, bottom_bytes);
    _tile_stored(3, bottom.c + kTile, bottom_bytes);
  }
}

// Most factors are 1, those of a running maximum that stayed.
inline void scale_rows(const Gemm<AmxBf16>& g, int rows, int64_t columns) {
  for (int first = 0; first < rows; first += kTile) {
    const __m512 factors = reinterpret_cast<__m512>(load_n<float>(g.scale + first, rows - first));
    const __mmask16 given = rows - first < kTile ? (1u << (rows - first)) - 1u : 0xffffu;
    unsigned moved = _mm512_mask_cmp_ps_mask(given, factors, _mm512_set1_ps(1), _CMP_NEQ_UQ);
    for (; moved != 0; moved &= moved - 1) {
      const int r = first + __builtin_ctz(moved);
      float* c = g.c + r * g.c_row;
      for (int64_t n = 0; n < columns; n += kLanes<float>) {
        store(c + n, load<float>(c + n) * g.scale[r]);
      }
    }
  }
}

// `rows` <= kRows rows of C, columns [0, columns) rounded up to 32. A must be readable up to a
// multiple of 16 rows; rows of C past `rows` stay untouched.
template <>
inline void gemm<AmxBf16>(const Gemm<AmxBf16>& g, int rows, int64_t columns) {
  constexpr int width = 2 * kTile;
  static_assert(kPanel<AmxBf16> % width == 0, "two tiles of columns must not straddle panels");
  if (g.scale != nullptr) scale_rows(g, rows, (columns + width - 1) / width * width);
  const bool two = rows > kTile;
  const int last = two ? rows - kTile : rows;  // rows of the last tile
  alignas(64) float spare[kTile * width];
  for (int64_t n = 0; n < columns; n += width) {
    const bf16* b = g.b + n / kPanel<AmxBf16> * g.b_panel + n % kPanel<AmxBf16> * 2;
    float* c = g.c + n;
    float* c_last = two ? c + kTile * g.c_row : c;
    const auto copy_last = [&](float* to, int64_t to_row, const float* from, int64_t from_row) {
      for (int r = 0; r < last; ++r) {
        std::memcpy(to + r * to_row, from + r * from_row, width * sizeof(float));
      }
    };
    if (last < kTile && g.scale != nullptr) copy_last(spare, width, c_last, g.c_row);
    const TileRow bottom = last < kTile ? TileRow{spare, width} : TileRow{c_last, g.c_row};
    if (two) {
      amx_tiles<true>(g, b, {c, g.c_row}, bottom);
    } else {
      amx_tiles<false>(g, b, bottom, {});
    }
    if (last < kTile) copy_last(c_last, g.c_row, spare, width);
  }
}

}  // namespace ceg::CEG_ISA

#endif
