// Python objects to ceg::Tensor, without copies and without knowing their framework.
//
// torch >= 2.10 offers its C functions on the type (`__dlpack_c_exchange_api__`, about 50 ns an
// argument); anything else (NumPy, older torch) hands over a `__dlpack__` capsule. The caller
// holds a reference to every argument during the call, so a borrowed view is enough.
#pragma once

#include <pybind11/pybind11.h>

#include <unordered_map>

#include "tensor.h"

namespace ceg::dlpack {

// The stable binary interface of DLPack 1.x (https://dmlc.github.io/dlpack/latest/c_api.html);
// only what is read is declared, pointers to the rest are opaque.
struct Version {
  uint32_t major, minor;
};

struct View {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;  // null: row-major
  uint64_t byte_offset;
};
static_assert(sizeof(View) == 48, "DLTensor is 48 bytes on every 64-bit platform");

struct Managed {  // capsule "dltensor"
  View view;
  void* context;
  void (*deleter)(Managed*);
};

struct ManagedVersioned {  // capsule "dltensor_versioned"
  Version version;
  void* context;
  void (*deleter)(ManagedVersioned*);
  uint64_t flags;  // bit 0: read only
  View view;
};

struct ExchangeApi {
  Version version;
  const ExchangeApi* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*view_from_object)(void* object, View* out);  // may be null
  void* current_work_stream;
};

inline DType dtype_of(const View& view) {
  if (view.type_lanes != 1) return DType::other;
  enum { kInt = 0, kFloat = 2, kBfloat = 4 };
  switch (view.type_code << 8 | view.type_bits) {
    case kFloat << 8 | 32:
      return DType::f32;
    case kFloat << 8 | 64:
      return DType::f64;
    case kFloat << 8 | 16:
      return DType::f16;
    case kBfloat << 8 | 16:
      return DType::bf16;
    case kInt << 8 | 32:
      return DType::i32;
    case kInt << 8 | 64:
      return DType::i64;
    default:
      return DType::other;
  }
}

inline Tensor tensor_of(const View& view, bool read_only) {
  if (view.ndim > Tensor::kMaxDims) {
    throw pybind11::value_error("an array must have at most " + std::to_string(Tensor::kMaxDims) +
                                " dimensions, got " + std::to_string(view.ndim));
  }
  Tensor t;
  t.data = static_cast<char*>(view.data) + view.byte_offset;
  t.ndim = view.ndim;
  t.device = {view.device_type, view.device_id};
  t.dtype = dtype_of(view);
  t.read_only = read_only;
  int64_t row_major = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    t.shape[i] = view.shape[i];
    t.stride[i] = view.strides ? view.strides[i] : row_major;
    row_major *= view.shape[i];
  }
  return t;
}

// The exchange functions of a type, or null. Types that have them are few and live for the whole
// process; the reference taken here keeps their address from being reused.
inline const ExchangeApi* exchange_api(PyTypeObject* type) {
  static std::unordered_map<PyTypeObject*, const ExchangeApi*> known;
  if (auto it = known.find(type); it != known.end()) return it->second;
  PyObject* capsule =
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  const ExchangeApi* api = nullptr;
  if (capsule && PyCapsule_IsValid(capsule, "dlpack_exchange_api")) {
    api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  }
  Py_XDECREF(capsule);
  PyErr_Clear();
  while (api && (api->version.major != 1 || !api->view_from_object)) api = api->previous;
  if (api) {
    Py_INCREF(type);
    known.emplace(type, api);
  }
  return api;
}

inline Tensor from_capsule(pybind11::handle object) {
  namespace py = pybind11;
  if (!py::hasattr(object, "__dlpack__")) {
    throw py::type_error("expected an array with __dlpack__ (NumPy, torch), got " +
                         std::string(Py_TYPE(object.ptr())->tp_name));
  }
  py::object method = object.attr("__dlpack__");
  py::object capsule;
  try {
    // Without max_version NumPy refuses read-only arrays, which are fine as inputs.
    capsule = method(py::arg("max_version") = py::make_tuple(1, 0));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    capsule = method();  // an exporter from before DLPack 1.0
  }
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    auto* managed =
        static_cast<ManagedVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    return tensor_of(managed->view, managed->flags & 1);
  }
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (!managed) throw py::error_already_set();
  return tensor_of(managed->view, false);
}

inline Tensor from_object(pybind11::handle object) {
  const ExchangeApi* api = exchange_api(Py_TYPE(object.ptr()));
  if (!api) return from_capsule(object);
  View view;
  if (api->view_from_object(object.ptr(), &view) != 0) throw pybind11::error_already_set();
  return tensor_of(view, false);
}

}  // namespace ceg::dlpack

namespace pybind11::detail {

template <>
struct type_caster<ceg::Tensor> {
  PYBIND11_TYPE_CASTER(ceg::Tensor, const_name("Array"));

  // Throws instead of returning false: there are no overloads, and the reason is worth more than
  // pybind11's list of signatures.
  bool load(handle object, bool) {
    if (object.is_none()) {
      throw type_error("expected an array, got None");
    }
    value = ceg::dlpack::from_object(object);
    return true;
  }
};

}  // namespace pybind11::detail
