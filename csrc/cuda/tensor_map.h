// What the copy engine knows of an array: CUDA Driver API, "Tensor Map Object Management".
#pragma once

#include <cstdint>
#include <string>

#include "../tensor.h"
#include "gpu.h"

#ifdef CEG_CUDA_SIM
#include "sim/tma.h"
#else
#include <cuda.h>
#endif

namespace ceg {

#ifdef CEG_CUDA_SIM
using TensorMap = sim::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// 16-bit items; their columns are dense. Strides of a dimension of size 1 are not read.
struct TensorOfRows {
  void* data;
  int64_t columns, rows, heads, batch;
  int64_t row_stride, head_stride, batch_stride;  // in items
};

// Columns of a box, which are the 128 bytes that a swizzled row has.
constexpr int kBoxColumns = 64;

// Why there can be no map of it, or "".
std::string tensor_map_why_not(const char* name, const TensorOfRows& t);

// Boxes of `box_rows` rows of one head. Outside of the array they are zeros.
TensorMap tensor_map(const char* name, DType dtype, const TensorOfRows& t, int box_rows);

}  // namespace ceg
