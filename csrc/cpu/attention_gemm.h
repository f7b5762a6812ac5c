// Register-tiled matmul on packed operands: C[r, :] (+)= sum_k A[r, k] * B[k, :].
//
// Two engines here: Fma<C> multiplies one k at a time, DotBf16 takes two k at once with vdpbf16ps;
// attention_amx.h has the third. With depth = 1 or 2 items per step, the operands look like this:
//   A  broadcast operand: item (r, k) at a[r * a_row + (k / depth) * a_step + k % depth]
//   B  vector operand:    item (k, n) at b[(k / depth) * b_step + n * depth + k % depth], with
//      columns cut into panels of kPanel, b_panel items apart
//   C  row-major in the compute type
// An engine takes kRows rows of C at a time and k in multiples of kAlign, padded with zeros; the
// forward gives it kForwardBlocks blocks of keys at once. Without kStridedA, a_step must be depth.
#pragma once

#include "vec.h"

namespace ceg::CEG_ISA {

// 24 (12) accumulators, 4 (2) vectors of B and a broadcast fill 32 (16) registers.
inline constexpr int kTileRows = 6;
// Tiles that a panel of B serves while it is in L1.
inline constexpr int kTiles = 4;
#if defined(__AVX512F__)
inline constexpr int kTileVecs = 4;
#else
inline constexpr int kTileVecs = 2;
#endif

// What a thread must set up and restore around an engine's work: nothing.
struct NoThreadState {};

template <class C>
struct Fma {
  using Compute = C;
  using Item = C;
  using Operand = Vec<C>;
  using ThreadState = NoThreadState;
  static constexpr int kDepth = 1;
  static constexpr int kAlign = 1;
  static constexpr int kRows = kTiles * kTileRows;
  static constexpr int kForwardBlocks = 1;
  static constexpr bool kStridedA = true;
  static constexpr int kRowPad = 1;  // what a product rounds its sizes up to
  static constexpr int kColumnPad = kLanes<C>;

  static Operand load_b(const Item* p) { return load<C>(p); }
  static Operand broadcast_a(const Item* p) { return broadcast(*p); }
  static Vec<C> multiply_add(Operand a, Operand b, Vec<C> c) { return a * b + c; }
  // Two vectors of A items of one row.
  static void store_a(Item* p, Vec<C> low, Vec<C> high) {
    store(p, low);
    store(p + kLanes<C>, high);
  }
};

#if defined(__AVX512BF16__)
struct DotBf16 {
  using Compute = float;
  using Item = bf16;
  using Operand = Vec<uint32_t>;
  using ThreadState = NoThreadState;
  static constexpr int kDepth = 2;
  static constexpr int kAlign = 2;
  static constexpr int kRows = kTiles * kTileRows;
  static constexpr int kForwardBlocks = 1;
  static constexpr bool kStridedA = true;
  static constexpr int kRowPad = 1;
  static constexpr int kColumnPad = kLanes<float>;

  static Operand load_b(const Item* p) {
    Operand v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static Operand broadcast_a(const Item* p) {
    uint32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return Operand{} + pair;
  }
  static Vec<float> multiply_add(Operand a, Operand b, Vec<float> c) {
    return reinterpret_cast<Vec<float>>(_mm512_dpbf16_ps(
        reinterpret_cast<__m512>(c), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
  }
  static void store_a(Item* p, Vec<float> low, Vec<float> high) {
    const __m512bh packed =
        _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low));
    std::memcpy(p, &packed, sizeof packed);
  }
  // Lane i of two rows side by side, for k running over rows.
  static Operand pair(Vec<float> even, Vec<float> odd) {
    const auto packed = reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(odd), reinterpret_cast<__m512>(even)));
    alignas(64) static constexpr uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                       21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                       11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return reinterpret_cast<Operand>(_mm512_permutexvar_epi16(_mm512_load_si512(order), packed));
  }
};
#endif

template <class E>
inline constexpr int kPanel = kTileVecs * kLanes<typename E::Compute>;

template <class E>
struct Gemm {
  using Item = typename E::Item;
  using Compute = typename E::Compute;

  const Item* a;
  int64_t a_row;
  int64_t a_step;
  const Item* b;
  int64_t b_step;
  int64_t b_panel;
  Compute* c;
  int64_t c_row;
  int64_t steps;
  const Compute* scale;  // per row: C starts from scale[r] * C; null: from zero
};

// What a product executes, padding included.
template <class E>
inline int64_t gemm_flops(const Gemm<E>& g, int64_t rows, int64_t columns) {
  const auto padded = [](int64_t n, int64_t to) { return (n + to - 1) / to * to; };
  return 2 * padded(rows, E::kRowPad) * padded(columns, E::kColumnPad) * g.steps * E::kDepth;
}

template <class E, int rows, int vecs>
void gemm_tile(const Gemm<E>& g, int first, const typename E::Item* b, typename E::Compute* c) {
  using C = typename E::Compute;
  constexpr int lanes = kLanes<C>;
  // From zero also where C is added to: the rounding errors then grow with the steps and with the
  // number of calls apart, not with their product.
  Vec<C> acc[rows][vecs] = {};
  const typename E::Item* a = g.a + first * g.a_row;
  c += first * g.c_row;
  // Two steps a round are 2-6% faster than one, four are not.
#pragma GCC unroll 2
  for (int64_t step = 0; step < g.steps; ++step) {
    typename E::Operand bv[vecs];
#pragma GCC unroll 8
    for (int v = 0; v < vecs; ++v) bv[v] = E::load_b(b + v * lanes * E::kDepth);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const typename E::Operand av = E::broadcast_a(a + r * g.a_row);
#pragma GCC unroll 8
      for (int v = 0; v < vecs; ++v) acc[r][v] = E::multiply_add(av, bv[v], acc[r][v]);
    }
    a += g.a_step;
    b += g.b_step;
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vecs; ++v) {
      C* out = c + r * g.c_row + v * lanes;
      store(out, g.scale ? load<C>(out) * g.scale[first + r] + acc[r][v] : acc[r][v]);
    }
  }
}

template <class E, int... index>
inline void gemm_dispatch(const Gemm<E>& g, int first, int rows, int vecs,
                          const typename E::Item* b, typename E::Compute* c,
                          std::integer_sequence<int, index...>) {
  using Tile = void (*)(const Gemm<E>&, int, const typename E::Item*, typename E::Compute*);
  static constexpr Tile tiles[] = {&gemm_tile<E, index / kTileVecs + 1, index % kTileVecs + 1>...};
  tiles[(rows - 1) * kTileVecs + vecs - 1](g, first, b, c);
}

// `rows` <= E::kRows rows of C, columns [0, columns) rounded up to whole vectors.
template <class E>
inline void gemm(const Gemm<E>& g, int rows, int64_t columns) {
  constexpr int lanes = kLanes<typename E::Compute>;
  using Tiles = std::make_integer_sequence<int, kTileRows * kTileVecs>;
  const typename E::Item* b = g.b;
  for (int64_t n = 0; n < columns; n += kPanel<E>, b += g.b_panel) {
    const int64_t left = (columns - n + lanes - 1) / lanes;
    const int vecs = left < kTileVecs ? static_cast<int>(left) : kTileVecs;
    for (int r = 0; r < rows; r += kTileRows) {
      gemm_dispatch<E>(g, r, rows - r < kTileRows ? rows - r : kTileRows, vecs, b, g.c + n,
                       Tiles{});
    }
  }
}

template <class Item>
inline float to_compute(Item x) {
  return static_cast<float>(x);
}
inline double to_compute(double x) { return x; }
inline float to_compute(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Row r of the same product over k in [first, last) only, item by item: where B holds an inf or NaN
// in a row that A multiplies by a masked zero, the tiles above would spread it.
template <class E>
void gemm_exact(const Gemm<E>& g, int r, int64_t first, int64_t last, int64_t columns) {
  typename E::Compute* c = g.c + r * g.c_row;
  for (int64_t n = 0; n < columns; ++n) c[n] = g.scale ? c[n] * g.scale[r] : 0;
  for (int64_t k = first; k < last; ++k) {
    const auto a = to_compute(g.a[r * g.a_row + k / E::kDepth * g.a_step + k % E::kDepth]);
    for (int64_t n = 0; n < columns; ++n) {
      const int64_t column = n / kPanel<E> * g.b_panel + n % kPanel<E> * E::kDepth;
      c[n] += a * to_compute(g.b[k / E::kDepth * g.b_step + column + k % E::kDepth]);
    }
  }
}

}  // namespace ceg::CEG_ISA
