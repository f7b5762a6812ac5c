#include "check.h"

#include <algorithm>

namespace ceg {
namespace {

std::string tuple_text(const int64_t* sizes, int n) {
  std::ostringstream text;
  text << '(';
  for (int i = 0; i < n; ++i) {
    if (i) text << ", ";
    if (sizes[i] < 0) {
      text << '*';
    } else {
      text << sizes[i];
    }
  }
  text << (n == 1 ? ",)" : ")");
  return text.str();
}

template <class Int>
void check_range_of(const char* name, const Tensor& t, int64_t low, int64_t high) {
  const bool dense = t.ndim == 1 || t.stride[0] == t.shape[1];
  const int64_t rows = dense ? 1 : t.shape[0], columns = dense ? t.numel() : t.shape[1];
  for (int64_t row = 0; row < rows; ++row) {
    const Int* values = t.ptr<Int>() + (dense ? 0 : row * t.stride[0]);
    // Without a branch per element, so that it runs at the speed of memory.
    Int smallest = values[0], largest = values[0];
    for (int64_t i = 1; i < columns; ++i) {
      smallest = std::min(smallest, values[i]);
      largest = std::max(largest, values[i]);
    }
    CEG_CHECK(smallest >= low && largest < high, name, " must be in [", low, ", ", high, "), got ",
              smallest < low ? smallest : largest);
  }
}

}  // namespace

std::string shape_text(const Tensor& t) { return tuple_text(t.shape, t.ndim); }

std::string text(const Device& device) {
  const std::string number = std::to_string(device.index);
  if (device.type == kCpu) return "cpu";
  if (device.type == kCuda) return "cuda:" + number;
  return "DLPack device (" + std::to_string(device.type) + ", " + number + ")";
}

void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> expected) {
  bool same = t.ndim == static_cast<int>(expected.size());
  int i = 0;
  for (int64_t size : expected) {
    if (!same) break;
    same = size < 0 || t.shape[i] == size;
    ++i;
  }
  CEG_CHECK(same, name, " must have shape ",
            tuple_text(expected.begin(), static_cast<int>(expected.size())), ", got ",
            shape_text(t));
}

void check_dtype(const char* tensor_name, const Tensor& t, std::initializer_list<DType> expected) {
  for (DType dtype : expected) {
    if (t.dtype == dtype) return;
  }
  std::string wanted;
  for (DType dtype : expected) {
    if (!wanted.empty()) wanted += " or ";
    wanted += name(dtype);
  }
  fail(tensor_name, " must be ", wanted, ", got ", name(t.dtype));
}

void check_float(const char* name, const Tensor& t) {
  check_dtype(name, t, {DType::f32, DType::bf16, DType::f16, DType::f64});
}

void check_like(const char* name, const Tensor& t, const Tensor& like) {
  const bool same = t.ndim == like.ndim && std::equal(t.shape, t.shape + t.ndim, like.shape);
  CEG_CHECK(same, name, " must have shape ", shape_text(like), ", got ", shape_text(t));
  check_dtype(name, t, {like.dtype});
  check_rows(name, t, like.device);
}

void check_rows(const char* name, const Tensor& t, const Device& where) {
  CEG_CHECK(t.device == where, name, " must be on ", text(where), ", got ", text(t.device));
  CEG_CHECK(t.stride[t.ndim - 1] == 1 || t.shape[t.ndim - 1] <= 1, name,
            " must have stride 1 in its last dimension, got ", t.stride[t.ndim - 1]);
}

void check_output(const char* name, const Tensor& t, const Device& where) {
  check_rows(name, t, where);
  CEG_CHECK(!t.read_only, name, " must be writable, got a read-only array");
  // A broadcast output would be written by several threads at once.
  for (int i = 0; i < t.ndim; ++i) {
    CEG_CHECK(t.stride[i] != 0 || t.shape[i] <= 1 || t.numel() == 0, name,
              " must not be expanded, got stride 0 in dimension ", i);
  }
}

void check_range(const char* name, const Tensor& t, int64_t low, int64_t high) {
  if (t.numel() == 0) return;
  if (t.dtype == DType::i64) {
    check_range_of<int64_t>(name, t, low, high);
  } else {
    check_range_of<int32_t>(name, t, low, high);
  }
}

}  // namespace ceg
