// Where an item of a tile of 16-bit items lies in shared memory.
#pragma once

#include "gpu.h"

namespace ceg {

// Rows of kColumns items, the 16-byte chunks of each row permuted: the eight rows that ldmatrix
// reads at one chunk lie in different groups of four banks, and so do the eight chunks of a row
// that eight lanes write.
template <int kColumns>
struct Swizzle {
  static_assert(kColumns % 64 == 0, "a row must fill all 32 banks of 4 bytes");
  static constexpr int kChunk = 8;                   // items
  static constexpr int kChunks = kColumns / kChunk;  // of a row
  static constexpr int kRowBytes = kColumns * 2;
  static constexpr int kAlignment = 128;  // of a tile, for moved()

  // In bytes.
  __host__ __device__ static constexpr int offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ (row % 8)) * 16;
  }

  // From the address of (row, chunk) to that of (row + rows, chunk + chunks), for rows a multiple
  // of 8 and chunk % 8 == 0, or 1 and chunks even: an XOR and a constant, so that a lane keeps a
  // single address for all that it has of a tile.
  template <class Address>
  __host__ __device__ static constexpr Address moved(Address from, int rows, int chunks) {
    return (from ^ static_cast<Address>(chunks % 8 * 16)) + chunks / 8 * 128 + rows * kRowBytes;
  }
};

// What TMA and wgmma call the 128-byte swizzle, of an address in shared memory: the 16-byte chunks
// of eight rows of 128 bytes permuted as Swizzle<64> does, from multiples of 1024 bytes on.
template <class Address>
__host__ __device__ constexpr Address swizzle_128(Address address) {
  return address ^ (address >> 7 & 7) << 4;
}

// Panels of 64 columns one behind the other, each a Swizzle<64>: a tile as TMA boxes bring it and
// as wgmma reads it.
template <int kTileRows, int kColumns>
struct Panels {
  static_assert(kColumns % 64 == 0 && kTileRows % 8 == 0, "whole panels of whole patterns");
  static constexpr int kRows = kTileRows;
  static constexpr int kCount = kColumns / 64;
  static constexpr int kPanelBytes = kTileRows * Swizzle<64>::kRowBytes;
  static constexpr int kBytes = kCount * kPanelBytes;
  static constexpr int kAlignment = 1024;

  // In bytes.
  __host__ __device__ static constexpr int offset(int row, int chunk) {
    return chunk / 8 * kPanelBytes + Swizzle<64>::offset(row, chunk % 8);
  }
};

}  // namespace ceg
