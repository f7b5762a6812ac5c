// The tile registers of AMX: eight of 16 rows of 64 bytes.
#pragma once

#include "vec.h"

#if defined(__AMX_BF16__)

namespace ceg::CEG_ISA {

inline constexpr int kTile = 16;

// The layout that ldtilecfg reads: all eight registers at their full size.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
};
static_assert(sizeof(TileConfig) == 64, "fixed by the processor");
inline constexpr TileConfig kTileConfig = {};

// Tile registers belong to a thread and to whoever configured them last: torch's own matmuls find
// them as a fresh thread would.
class TileRegisters {
 public:
  TileRegisters() { _tile_loadconfig(&kTileConfig); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  ~TileRegisters() { _tile_release(); }
};

}  // namespace ceg::CEG_ISA

#endif
