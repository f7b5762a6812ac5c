// From a problem to the instantiation of a kernel and its grid.
#pragma once

#include "../check.h"
#include "attention.h"
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

}  // namespace ceg::cuda
