// From a problem to the instantiation of a kernel and its grid.
#pragma once

#include "../check.h"
#include "attention.h"
#include "kernels.h"
#include "launch.h"

namespace ceg::cuda {

template <int kD>
struct HeadTile {
  static constexpr int kWidth = kD;
};

// f(item, HeadTile, plain) for the items' type, the narrowest tile that holds a head, and whether
// the problem is plain: the template arguments of every attention kernel.
template <class F>
void with_tile(DType dtype, const Attention& p, F f) {
  const auto of_logits = [&](auto item, auto head) {
    p.plain() ? f(item, head, std::true_type{}) : f(item, head, std::false_type{});
  };
  const auto of_type = [&](auto item) {
    const int width = most(p.head_dim, p.value_dim);
    if (width <= 64) {
      of_logits(item, HeadTile<64>{});
    } else if (width <= 128) {
      of_logits(item, HeadTile<128>{});
    } else {
      of_logits(item, HeadTile<256>{});
    }
  };
  dtype == DType::bf16 ? of_type(bf16{}) : of_type(f16{});
}

// One block of Tile::kThreads for each tile of `rows` positions of each head; Arguments have the
// schedule in `*schedule`.
template <class Tile, class Kernel, class Arguments>
void launch_tiles(const char* name, Kernel kernel, Arguments args, Schedule Arguments::* schedule,
                  int64_t rows, int tile_rows, uintptr_t stream) {
  Schedule& s = args.*schedule;
  s.tiles = static_cast<int>((rows + tile_rows - 1) / tile_rows);
  CEG_CHECK(s.blocks() <= INT32_MAX, name, " must have at most 2^31 - 1 blocks, got ", s.blocks());
  launch({name, static_cast<unsigned>(s.blocks()), Tile::kThreads, Tile::kSharedBytes, stream},
         kernel, args);
}

// Adds a kernel's instantiations: `of(item, head, plain)` is the one, `Tile<head, plain>` its tile.
template <template <int, bool> class Tile, int kWidest = 256, class Of>
void list_tiles(Kernels& kernels, const char* name, Of of) {
  const auto add = [&](auto item, auto head, auto plain) {
    constexpr int kD = decltype(head)::kWidth;
    if constexpr (kD <= kWidest) {
      using T = Tile<kD, plain.value>;
      const char* const type = std::is_same_v<decltype(item), bf16> ? " bf16 D" : " f16 D";
      kernels.push_back({name + (type + std::to_string(kD)) + (plain.value ? "" : " any logits"),
                         reinterpret_cast<const void*>(of(item, head, plain)), T::kThreads,
                         T::kSharedBytes});
    }
  };
  for (const DType dtype : {DType::bf16, DType::f16}) {
    for (const int width : {64, 128, 256}) {
      for (const float scale : {1.0f, 0.0f}) {
        Attention p = {};
        p.head_dim = width;
        p.scale = scale;  // 0 is not plain
        with_tile(dtype, p, add);
      }
    }
  }
}

}  // namespace ceg::cuda
