// A borrowed view of an array of any framework. Nothing here knows Python or torch.
#pragma once

#include <cstdint>
#include <string>

namespace ceg {

enum class DType : int8_t { f32, f64, bf16, f16, i32, i64, other };

// DLPack's numbers.
enum DeviceType : int { kCpu = 1, kCuda = 2 };

struct Device {
  int type = kCpu;
  int index = 0;
  bool operator==(const Device&) const = default;
};

struct Tensor {
  // (total, H, D) and (B, T, H, D) are the largest that any launcher takes; one spare.
  static constexpr int kMaxDims = 5;

  void* data = nullptr;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements
  int ndim = 0;
  Device device;
  DType dtype = DType::other;
  bool read_only = false;

  template <typename T>
  T* ptr() const {
    return static_cast<T*>(data);
  }

  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
};

inline const char* name(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::f64:
      return "float64";
    case DType::bf16:
      return "bfloat16";
    case DType::f16:
      return "float16";
    case DType::i32:
      return "int32";
    case DType::i64:
      return "int64";
    case DType::other:
      break;
  }
  return "an unsupported dtype";
}

inline bool is_float(DType dtype) {
  return dtype == DType::f32 || dtype == DType::f64 || dtype == DType::bf16 || dtype == DType::f16;
}

inline int64_t item_size(DType dtype) {
  switch (dtype) {
    case DType::f64:
    case DType::i64:
      return 8;
    case DType::bf16:
    case DType::f16:
      return 2;
    default:
      return 4;
  }
}

// The type that the maths is done in, and that weights, tables and statistics are stored in.
inline DType compute_type(DType storage) { return storage == DType::f64 ? DType::f64 : DType::f32; }

}  // namespace ceg
