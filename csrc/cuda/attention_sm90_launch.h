// What the launchers of the sm_90a attention kernels share.
#pragma once

#include "attention_launch.h"
#include "tensor_map.h"

namespace ceg::cuda {

inline TensorOfRows rows_of_queries(const Attention& p, const View& view, int columns, int rows) {
  const int batch = p.cu_q ? 1 : p.batch;
  return {view.data, columns, rows, p.heads, batch, view.row, view.head, view.batch};
}
inline TensorOfRows rows_of_keys(const Attention& p, const View& view, int columns, int rows) {
  const int batch = p.cu_q ? 1 : p.batch;
  return {view.data, columns, rows, p.kv_heads, batch, view.row, view.head, view.batch};
}

// What the copy engine brings for the forward and the backward.
template <class Problem>
struct MappedRows {
  TensorOfRows q, k, v;

  explicit MappedRows(const Problem& a)
      : q(rows_of_queries(a.problem, a.q, a.problem.head_dim, a.q_rows)),
        k(rows_of_keys(a.problem, a.k, a.problem.head_dim, a.k_rows)),
        v(rows_of_keys(a.problem, a.v, a.problem.value_dim, a.k_rows)) {}
};
inline TensorOfRows rows_of_dout(const AttentionBwd& a) {
  return rows_of_queries(a.problem, a.dout, a.problem.value_dim, a.q_rows);
}

// A block for each multiprocessor; each takes one tile of a head after another.
template <class Tile, class Kernel, class Arguments>
void launch_persistent(const char* name, Kernel kernel, const Arguments& arguments,
                       const Schedule& schedule, uintptr_t stream) {
  const int64_t blocks = schedule.blocks();
  CEG_CHECK(blocks <= INT32_MAX / 2, name, " must have at most 2^30 tiles, got ", blocks);
  const auto grid = static_cast<unsigned>(least(static_cast<int>(blocks), multiprocessors()));
  launch({name, grid, Tile::kThreads, Tile::kSharedBytes, stream}, kernel, arguments);
}

// Tiles of `rows` positions of a head.
template <class Tile, class Kernel, class Arguments>
void launch_persistent(const char* name, Kernel kernel, const Arguments& arguments,
                       Schedule& schedule, int64_t rows, uintptr_t stream) {
  schedule.tiles = static_cast<int>((rows + Tile::kRows - 1) / Tile::kRows);
  launch_persistent<Tile>(name, kernel, arguments, schedule, stream);
}

}  // namespace ceg::cuda
