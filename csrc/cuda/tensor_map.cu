#include "tensor_map.h"

#include <sstream>
#include <stdexcept>

#include "../check.h"
#include "launch.h"

namespace ceg {
namespace {

constexpr int kDims = 4;
constexpr int64_t kItemBytes = 2;

// As the driver takes it, columns first. It wants a stride even of a dimension with one item.
struct Layout {
  uint64_t size[kDims], stride[kDims - 1];  // bytes

  explicit Layout(const TensorOfRows& t)
      : size{static_cast<uint64_t>(t.columns), static_cast<uint64_t>(t.rows),
             static_cast<uint64_t>(t.heads), static_cast<uint64_t>(t.batch)} {
    const int64_t given[] = {t.row_stride, t.head_stride, t.batch_stride};
    for (int i = 0; i + 1 < kDims; ++i) {
      const int64_t items = size[i + 1] > 1 ? given[i] : (t.columns + 7) / 8 * 8;
      stride[i] = static_cast<uint64_t>(items * kItemBytes);
    }
  }
};

}  // namespace

std::string tensor_map_why_not(const char* name, const TensorOfRows& t) {
  std::ostringstream why;
  const int64_t sizes[] = {t.columns, t.rows, t.heads, t.batch};
  for (const int64_t size : sizes) {
    if (size < 1 || size > int64_t{1} << 32) {
      why << name << " needs 1 to 2^32 items in each dimension, got " << size;
      return why.str();
    }
  }
  if (reinterpret_cast<uintptr_t>(t.data) % 16) {
    why << name << " must start at a multiple of 16 bytes, got " << t.data;
    return why.str();
  }
  const int64_t strides[] = {t.row_stride, t.head_stride, t.batch_stride};
  for (int i = 0; i < 3; ++i) {
    const int64_t bytes = strides[i] * kItemBytes;
    if (sizes[i + 1] > 1 && (bytes <= 0 || bytes % 16 || bytes >= int64_t{1} << 40)) {
      why << name << " needs strides of a positive multiple of 16 bytes below 2^40, got " << bytes;
      return why.str();
    }
  }
  return "";
}

#ifdef CEG_CUDA_SIM

TensorMap tensor_map(const char* name, DType, const TensorOfRows& t, int box_rows) {
  const std::string why = tensor_map_why_not(name, t);
  CEG_CHECK(why.empty(), why);
  CEG_CHECK(box_rows >= 1 && box_rows <= 256, name, " needs boxes of 1 to 256 rows");
  const Layout layout(t);
  TensorMap map{};
  map.data = static_cast<const unsigned char*>(t.data);
  for (int i = 0; i < kDims; ++i) {
    map.size[i] = static_cast<int64_t>(layout.size[i]);
    map.stride[i] = i == 0 ? kItemBytes : static_cast<int64_t>(layout.stride[i - 1]);
    map.box[i] = i == 0 ? kBoxColumns : i == 1 ? box_rows : 1;
  }
  return map;
}

#else

namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// Asked of the driver, so that the module loads where there is none.
Encode encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  const char* const name = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
  check_call(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result),
             name);
#else
  check_call(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result), name);
#endif
  if (result != cudaDriverEntryPointSuccess || !found) {
    throw std::runtime_error(std::string("the driver must have ") + name + ", it has not");
  }
  return reinterpret_cast<Encode>(found);
}

}  // namespace

TensorMap tensor_map(const char* name, DType dtype, const TensorOfRows& t, int box_rows) {
  static const Encode encode = encoder();
  const Layout layout(t);
  const cuuint32_t box[kDims] = {kBoxColumns, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t every[kDims] = {1, 1, 1, 1};
  const cuuint64_t* const size = reinterpret_cast<const cuuint64_t*>(layout.size);
  const cuuint64_t* const stride = reinterpret_cast<const cuuint64_t*>(layout.stride);
  static_assert(sizeof(cuuint64_t) == sizeof(uint64_t));
  TensorMap map;
  const CUresult status = encode(
      &map,
      dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      kDims, t.data, size, stride, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  CEG_CHECK(status == CUDA_SUCCESS, name, ": cuTensorMapEncodeTiled says ",
            static_cast<int>(status));
  return map;
}

#endif

}  // namespace ceg
