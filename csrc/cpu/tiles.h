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

// Tiles for the life of the object, on this thread. Then they are configured as they were before:
// torch's matmuls use them too. Not the intrinsics, which tell GCC 12 of 8 bytes of the 64 only.
class TileRegisters {
 public:
  TileRegisters() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    asm volatile("ldtilecfg %0" : : "m"(kTileConfig));
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  ~TileRegisters() { asm volatile("ldtilecfg %0" : : "m"(before_)); }

 private:
  TileConfig before_;
};

}  // namespace ceg::CEG_ISA

#endif
