// Products of 64 x 16 and 16 x N tiles of 16-bit items by a warpgroup, asynchronously (PTX ISA,
// "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions": "Register Fragments and
// Shared Memory Matrix Layouts", "wgmma.mma_async", "wgmma.fence", ".commit_group", ".wait_group").
//   Warp w of the warpgroup has rows 16 w ... 16 w + 15 of A and of the accumulators, laid out as
//   mma.m16n8k16's: c[N / 8][4].
#pragma once

#include "mma.h"
#include "swizzle.h"
#include "warpgroup.h"

#ifdef CEG_CUDA_SIM
#include "sim/wgmma.h"
#endif

namespace ceg {

// Which index of an operand in shared memory is dense: that of the sum (k), or the row of A or the
// column of B (mn).
enum class Major { k, mn };

// "Matrix Descriptor Format", with the 128-byte swizzle and patterns that start at multiples of
// 1024 bytes (base offset 0). Addresses and distances in bytes.
__host__ __device__ constexpr uint64_t matrix_descriptor(uint32_t start, uint32_t leading,
                                                         uint32_t stride) {
  const auto encode = [](uint32_t bytes) { return uint64_t{(bytes & 0x3ffff) >> 4}; };
  return encode(start) | encode(leading) << 16 | encode(stride) << 32 | uint64_t{1} << 62;
}

// The descriptor of what lies `bytes` further.
__host__ __device__ constexpr uint64_t moved_descriptor(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// Where the item at (mn, k) of an operand lies: "Strides" and "Canonical Layouts", T = 8 items.
__host__ __device__ constexpr uint32_t operand_address(uint64_t descriptor, Major major, int mn,
                                                       int k) {
  const auto field = [&](int bit) {
    return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4;
  };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  return swizzle_128(major == Major::k
                         ? start + mn / 8 * stride + mn % 8 * 128 + k * 2
                         : start + mn / 64 * leading + mn % 64 * 2 + k / 8 * stride + k % 8 * 128);
}

// Tiles in Panels as operands, 16 items of k after `step` others.
//   Dense in k: rows are mn, columns k. The leading distance is not used and said to be 1.
template <class Tile>
__host__ __device__ constexpr uint64_t operand_of_rows(uint32_t tile) {
  return matrix_descriptor(tile, 16, 8 * Swizzle<64>::kRowBytes);
}
template <class Tile>
__host__ __device__ constexpr uint64_t step_of_rows(uint64_t descriptor, int step) {
  return moved_descriptor(descriptor, step / 4 * Tile::kPanelBytes + step % 4 * 32);
}
//   Dense in mn: columns are mn, rows k.
template <class Tile>
__host__ __device__ constexpr uint64_t operand_of_columns(uint32_t tile) {
  return matrix_descriptor(tile, Tile::kPanelBytes, 8 * Swizzle<64>::kRowBytes);
}
template <class Tile>
__host__ __device__ constexpr uint64_t step_of_columns(uint64_t descriptor, int step) {
  return moved_descriptor(descriptor, step * 16 * Swizzle<64>::kRowBytes);
}

#ifdef CEG_CUDA_SIM

// A descriptor's 18 bits of address, counted from the block's dynamic shared memory.
inline uint32_t descriptor_address(SharedAddress at) {
  return static_cast<uint32_t>(at - shared_address(dynamic_shared_memory()));
}

// A and B from shared memory, both dense in the same index.
template <class T, Major kMajor = Major::k, int kBlocks>
void wgmma(float (&c)[kBlocks][4], uint64_t a, uint64_t b, bool accumulate) {
  constexpr bool kIsMn = kMajor == Major::mn;
  sim::wgmma_issue<T>(&c[0][0], kBlocks * 8, a, nullptr, kIsMn, b, kIsMn, accumulate);
}
// A from registers, B from shared memory, dense in mn.
template <class T, int kBlocks>
void wgmma(float (&c)[kBlocks][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  sim::wgmma_issue<T>(&c[0][0], kBlocks * 8, 0, a, false, b, true, accumulate);
}
template <class... Registers>
void wgmma_fence(Registers&...) {
  sim::wgmma_fence();
}
inline void wgmma_commit() { sim::wgmma_commit(); }
template <int kGroups, class... Registers>
void wgmma_wait(Registers&...) {
  sim::wgmma_wait(kGroups);
}

#else

__device__ __forceinline__ uint32_t descriptor_address(SharedAddress at) { return at; }

// The compiler takes an asm for done when it returns: these keep what it does with the registers on
// its side of a fence or a wait.
template <int kBlocks>
__device__ __forceinline__ void pin(float (&c)[kBlocks][4]) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[n][i])::"memory");
  }
}
template <int kSteps>
__device__ __forceinline__ void pin(uint32_t (&a)[kSteps][4]) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[k][i])::"memory");
  }
}

// Before the first product, and between any other access to these registers and a product.
template <class... Registers>
__device__ __forceinline__ void wgmma_fence(Registers&... touched) {
  (pin(touched), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// The products since the last commit become a group.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until all but the last kGroups groups are complete; `done` are their registers.
template <int kGroups, class... Registers>
__device__ __forceinline__ void wgmma_wait(Registers&... done) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
  (pin(done), ...);
}

// Operands of the asm below: 32 accumulators from c[n] on, their names, and the instruction.
#define CEG_C8(n)                                                                \
  "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3]), "+f"(c[n + 1][0]), \
      "+f"(c[n + 1][1]), "+f"(c[n + 1][2]), "+f"(c[n + 1][3])
#define CEG_C32(n) CEG_C8(n), CEG_C8(n + 2), CEG_C8(n + 4), CEG_C8(n + 6)
#define CEG_32_NAMES                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CEG_64_NAMES                                                         \
  CEG_32_NAMES                                                               \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
  "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CEG_128_NAMES                                                                \
  CEG_64_NAMES                                                                       \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, "    \
  "%79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, " \
  "%95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, "  \
  "%109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, "   \
  "%122, %123, %124, %125, %126, %127"
#define CEG_WGMMA(type, n, accumulators, operands, predicate, flags)                              \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " predicate                                                   \
  ", 0;\n"                                                                                        \
  "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" accumulators "}, " operands \
  ", p, 1, 1, " flags ";\n}"
// A and B from shared memory; imm-trans-a and -b are 0 where both are dense in k, 1 where in mn.
#define CEG_WGMMA_SHARED(type)                                                   \
  if constexpr (kMajor == Major::mn) {                                           \
    asm volatile(CEG_WGMMA(type, "64", CEG_32_NAMES, "%32, %33", "%34", "1, 1")  \
                 : CEG_C32(0)                                                    \
                 : "l"(a), "l"(b), "r"(scale));                                  \
  } else if constexpr (kBlocks == 8) {                                           \
    asm volatile(CEG_WGMMA(type, "64", CEG_32_NAMES, "%32, %33", "%34", "0, 0")  \
                 : CEG_C32(0)                                                    \
                 : "l"(a), "l"(b), "r"(scale));                                  \
  } else {                                                                       \
    asm volatile(CEG_WGMMA(type, "128", CEG_64_NAMES, "%64, %65", "%66", "0, 0") \
                 : CEG_C32(0), CEG_C32(8)                                        \
                 : "l"(a), "l"(b), "r"(scale));                                  \
  }
// A from registers; imm-trans-b is 1: B is dense in mn.
#define CEG_WGMMA_REGISTERS(type)                                                              \
  if constexpr (kBlocks == 8) {                                                                \
    asm volatile(CEG_WGMMA(type, "64", CEG_32_NAMES, "{%32, %33, %34, %35}, %36", "%37", "1")  \
                 : CEG_C32(0)                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale));            \
  } else if constexpr (kBlocks == 16) {                                                        \
    asm volatile(CEG_WGMMA(type, "128", CEG_64_NAMES, "{%64, %65, %66, %67}, %68", "%69", "1") \
                 : CEG_C32(0), CEG_C32(8)                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale));            \
  } else {                                                                                     \
    asm volatile(                                                                              \
        CEG_WGMMA(type, "256", CEG_128_NAMES, "{%128, %129, %130, %131}, %132", "%133", "1")   \
        : CEG_C32(0), CEG_C32(8), CEG_C32(16), CEG_C32(24)                                     \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale));                     \
  }

// c = A B, or c += A B where it shall accumulate. A and B from shared memory, both dense in the
// same index.
template <class T, Major kMajor = Major::k, int kBlocks>
__device__ __forceinline__ void wgmma(float (&c)[kBlocks][4], uint64_t a, uint64_t b,
                                      bool accumulate) {
  static_assert(kBlocks == 8 || (kBlocks == 16 && kMajor == Major::k),
                "N = 64 is written out, and N = 128 dense in k");
  const int scale = accumulate;
  if constexpr (std::is_same_v<T, bf16>) {
    CEG_WGMMA_SHARED("bf16")
  } else {
    CEG_WGMMA_SHARED("f16")
  }
}

// A from registers, as mma_a_position() says for each warp's rows; B dense in mn.
template <class T, int kBlocks>
__device__ __forceinline__ void wgmma(float (&c)[kBlocks][4], const uint32_t (&a)[4], uint64_t b,
                                      bool accumulate) {
  static_assert(kBlocks == 8 || kBlocks == 16 || kBlocks == 32, "N = 64, 128, 256 are written out");
  const int scale = accumulate;
  if constexpr (std::is_same_v<T, bf16>) {
    CEG_WGMMA_REGISTERS("bf16")
  } else {
    CEG_WGMMA_REGISTERS("f16")
  }
}

#undef CEG_C8
#undef CEG_C32
#undef CEG_32_NAMES
#undef CEG_64_NAMES
#undef CEG_128_NAMES
#undef CEG_WGMMA
#undef CEG_WGMMA_SHARED
#undef CEG_WGMMA_REGISTERS

#endif

}  // namespace ceg
