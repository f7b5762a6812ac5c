#pragma once

#include <string>
#include <tuple>
#include <vector>

namespace ceg::sim {

// Positions (row, column) that a lane holds of an operand, in the order of its registers and their
// halves. operand: "a", "b", "c" of mma, "ldmatrix".
std::vector<std::tuple<int, int>> fragment(const std::string& operand, int lane);
// In bytes, of a tile with this many columns.
int swizzle_offset(int columns, int row, int chunk);
int swizzle_moved(int columns, int from, int rows, int chunks);
// Likewise, in Panels.
int panels_offset(int rows, int columns, int row, int chunk);
// Where wgmma finds item (mn, k) of the operand that a tile in Panels is, `step` steps on.
int operand_address(int rows, int columns, int start, bool dense_in_k, int step, int mn, int k);
// start, whole, rest, stop for blocks of 16.
std::tuple<int, int, int, int> partners(int first, int last, int offset, int before, int after,
                                        int count);
// (tiles, chunks, keys a chunk).
std::tuple<int, int, int> split_of(int rows, int heads, int keys, int multiprocessors);
// (tile, chunk, head) of each block of threads; (start, stop) of each chunk.
std::vector<std::tuple<int, int, int>> split_places(int tiles, int chunks, int heads);
std::vector<std::tuple<int, int>> split_keys(int chunks, int keys, int first_seen, int n_k);
// (stage, parity) of a ring before each of `steps` steps.
std::vector<std::tuple<int, unsigned>> ring(int stages, int steps);
// (tile, head) of each block of threads.
std::vector<std::tuple<int, int>> places(int tiles, int heads, int section, bool last_tile_first);

}  // namespace ceg::sim
