// What the forward and the backward of rms_norm share: a weight in one of two dtypes, or none.
#pragma once

#include <optional>
#include <span>
#include <string>

#include "../check.h"
#include "kernels.h"
#include "launch.h"
#include "vector.h"

namespace ceg::cuda {

// Offsets within a row are 32 bits wide, and stay so where a loop steps beyond the end.
constexpr int64_t kLongestRow = 1 << 30;

template <class T>
struct Weight {
  const float* wide = nullptr;
  const T* narrow = nullptr;  // one of the two, or neither: all ones
  float offset = 0;

  // weight + offset of N columns from the one at `o`. The branches are the same for all threads.
  template <int N>
  __device__ __forceinline__ void scale(int64_t o, float (&to)[N]) const {
    if (narrow) {
      load_constant<N>(narrow + o).unpack(to);
#pragma unroll
      for (int i = 0; i < N; ++i) to[i] += offset;
    } else if (wide) {
      constexpr int kPart = N < kVector<float> ? N : kVector<float>;
#pragma unroll
      for (int i = 0; i < N; i += kPart) {
        float part[kPart];
        load_constant<kPart>(wide + o + i).unpack(part);
#pragma unroll
        for (int j = 0; j < kPart; ++j) to[i + j] = part[j] + offset;
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) to[i] = 1.0f;
    }
  }
};

template <class T>
Weight<T> weight_of(const std::optional<Tensor>& weight, double offset) {
  if (!weight) return {};
  const auto shift = static_cast<float>(offset);
  if (weight->dtype == DType::f32) return {.wide = weight->ptr<float>(), .offset = shift};
  return {.narrow = weight->ptr<T>(), .offset = shift};
}

// A kernel for rows up to some length.
template <class Arguments>
struct Variant {
  int longest_row;
  dim3 block;  // y: rows
  void (*kernel)(Arguments);
};

template <class Arguments>
void list_variants(const char* kernel, const std::string& type, int vector,
                   std::span<const Variant<Arguments>> variants, Kernels& kernels) {
  for (const auto& v : variants) {
    const std::string rows = " to D " + std::to_string(v.longest_row);
    add(kernels, kernel, type, vector, v.kernel, static_cast<int>(v.block.x * v.block.y), rows);
  }
}

// (R, D) of a storage type that the kernels have, on a GPU.
inline void check_matrix(const char* name, const Tensor& t) {
  check_shape(name, t, {-1, -1});
  check_dtype(name, t, {DType::f32, DType::bf16, DType::f16});
  check_rows(name, t, launch_device(name, t));
  CEG_CHECK(t.shape[0] <= INT32_MAX && t.shape[1] <= kLongestRow, name,
            " must have at most 2^31 - 1 rows of at most 2^30 elements, got ", shape_text(t));
}

inline void check_weight(const char* name, const Tensor& weight, const Tensor& x) {
  check_shape(name, weight, {x.shape[1]});
  check_dtype(name, weight, {x.dtype, DType::f32});
  check_rows(name, weight, x.device);
}

// A row of statistics.
inline void check_rstd(const Tensor& rstd, const Tensor& x) {
  check_shape("rstd", rstd, {x.shape[0]});
  check_dtype("rstd", rstd, {DType::f32});
  check_rows("rstd", rstd, x.device);
}

inline bool vectorizable(const std::optional<Tensor>& t) { return !t || ceg::vectorizable(*t); }

}  // namespace ceg::cuda
