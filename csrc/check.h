// Checks of a launcher's arguments. Each failure says name, expected, got, and reaches Python as
// a ValueError.
#pragma once

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "tensor.h"

namespace ceg {

template <typename... Parts>
[[noreturn]] __attribute__((cold, noinline)) void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

#define CEG_CHECK(cond, ...)    \
  do {                          \
    if (!(cond)) [[unlikely]]   \
      ::ceg::fail(__VA_ARGS__); \
  } while (0)

// -1 in an expected shape accepts any size; checks return nothing and throw std::invalid_argument.
void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> expected);
void check_dtype(const char* name, const Tensor& t, std::initializer_list<DType> expected);
void check_float(const char* name, const Tensor& t);
// Shape, dtype and device of another tensor, and check_rows.
void check_like(const char* name, const Tensor& t, const Tensor& like);
// There, with neighbours of the last dimension adjacent in memory. Not for scalars: check the shape
// first.
void check_rows(const char* name, const Tensor& t, const Device& where = {});
// check_rows, and may be written.
void check_output(const char* name, const Tensor& t, const Device& where = {});

// Every element of an int32 or int64 tensor, of one or two dimensions and on the CPU, is in
// [low, high).
void check_range(const char* name, const Tensor& t, int64_t low, int64_t high);

std::string shape_text(const Tensor& t);
std::string text(const Device& device);

}  // namespace ceg
