// The index arithmetic of the kernels as functions that tests can call for every argument.
#include "layouts.h"

#include "../attention_split.h"
#include "../mbarrier.h"
#include "../mma.h"
#include "../swizzle.h"
#include "../wgmma.h"

namespace ceg::sim {
namespace {

template <class F>
int with_columns(int columns, F f) {
  switch (columns) {
    case 64:
      return f(Swizzle<64>());
    case 128:
      return f(Swizzle<128>());
    case 256:
      return f(Swizzle<256>());
    default:
      throw std::invalid_argument("columns must be 64, 128 or 256, got " + std::to_string(columns));
  }
}

template <class F>
int with_panels(int rows, int columns, F f) {
  const auto of_rows = [&](auto narrow, auto middle, auto wide) {
    return columns == 64 ? f(narrow) : columns == 128 ? f(middle) : f(wide);
  };
  if (rows == 64) return of_rows(Panels<64, 64>(), Panels<64, 128>(), Panels<64, 256>());
  return of_rows(Panels<128, 64>(), Panels<128, 128>(), Panels<128, 256>());
}

}  // namespace

std::vector<std::tuple<int, int>> fragment(const std::string& operand, int lane) {
  std::vector<std::tuple<int, int>> held;
  const int registers = operand == "ldmatrix" ? 1 : operand == "b" ? 2 : 4;
  for (int i = 0; i < registers; ++i) {
    for (int half = 0; half < (operand == "c" ? 1 : 2); ++half) {
      const Position p = operand == "a"   ? mma_a_position(lane, i, half)
                         : operand == "b" ? mma_b_position(lane, i, half)
                         : operand == "c" ? mma_c_position(lane, i)
                                          : ldmatrix_position(lane, half);
      held.emplace_back(p.row, p.column);
    }
  }
  return held;
}

int swizzle_offset(int columns, int row, int chunk) {
  return with_columns(columns, [&](auto layout) { return layout.offset(row, chunk); });
}

int swizzle_moved(int columns, int from, int rows, int chunks) {
  return with_columns(columns, [&](auto layout) { return layout.moved(from, rows, chunks); });
}

int panels_offset(int rows, int columns, int row, int chunk) {
  return with_panels(rows, columns, [&](auto tile) { return tile.offset(row, chunk); });
}

int operand_address(int rows, int columns, int start, bool dense_in_k, int step, int mn, int k) {
  return with_panels(rows, columns, [&](auto tile) {
    using Tile = decltype(tile);
    const auto at = static_cast<uint32_t>(start);
    const uint64_t descriptor = dense_in_k
                                    ? step_of_rows<Tile>(operand_of_rows<Tile>(at), step)
                                    : step_of_columns<Tile>(operand_of_columns<Tile>(at), step);
    const Major major = dense_in_k ? Major::k : Major::mn;
    return static_cast<int>(ceg::operand_address(descriptor, major, mn, k));
  });
}

std::tuple<int, int, int, int> partners(int first, int last, int offset, int before, int after,
                                        int count) {
  const cuda::Partners p = cuda::partners<16>(first, last, offset, before, after, count);
  return {p.start, p.whole, p.rest, p.stop};
}

std::tuple<int, int, int> split_of(int rows, int heads, int keys, int multiprocessors) {
  const cuda::Split split = cuda::split_of(rows, heads, keys, multiprocessors);
  return {split.tiles, split.chunks, split.keys};
}

std::vector<std::tuple<int, int, int>> split_places(int tiles, int chunks, int heads) {
  const cuda::Split split = {tiles, chunks, 0};
  std::vector<std::tuple<int, int, int>> all;
  for (int block = 0; block < split.blocks(heads); ++block) {
    const cuda::Split::Place place = split.place(block);
    all.emplace_back(place.tile, place.chunk, place.head);
  }
  return all;
}

std::vector<std::tuple<int, int>> split_keys(int chunks, int keys, int first_seen, int n_k) {
  const cuda::Split split = {1, chunks, keys};
  std::vector<std::tuple<int, int>> all;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const cuda::Split::Keys range = split.keys_of(chunk, first_seen, n_k);
    all.emplace_back(range.start, range.stop);
  }
  return all;
}

std::vector<std::tuple<int, unsigned>> ring(int stages, int steps) {
  std::vector<std::tuple<int, unsigned>> all;
  for (RingPlace place; steps > 0; --steps, place.advance(stages)) {
    all.emplace_back(place.stage, place.parity);
  }
  return all;
}

std::vector<std::tuple<int, int>> places(int tiles, int heads, int section, bool last_tile_first) {
  const cuda::Schedule schedule = {tiles, heads, section};
  std::vector<std::tuple<int, int>> all;
  for (int block = 0; block < schedule.blocks(); ++block) {
    const cuda::Schedule::Place place = schedule.place(block, last_tile_first);
    all.emplace_back(place.tile, place.head);
  }
  return all;
}

}  // namespace ceg::sim
