// Lists of torch tensors, walked without an interpreted call per tensor: what keeps the Python share of a
// step small.
//
// Tensors are read through the C functions that torch.Tensor exports as DLPack's exchange API (DLPack 1.3,
// torch 2.11): a stable C ABI, so no torch header is needed. The structs below are that ABI.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>

#include "common.h"

namespace py = pybind11;

namespace {

struct DLDevice {
  int32_t device_type, device_id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  const int64_t* shape;
  const int64_t* strides;  // null: contiguous
  uint64_t byte_offset;
};
struct DLPackExchangeAPI {
  uint32_t major, minor;
  void* previous;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* tensor);  // fills it in; the object keeps the memory
  void* current_stream;
};
constexpr uint32_t kMajor = 1;
constexpr uint8_t kFloat = 2, kBfloat = 4;

// The exchange API of a class, or null when it has none that is known here. It lives as long as the class.
const DLPackExchangeAPI* exchange_api(const py::object& tensor_class) {
  const py::object capsule = py::getattr(tensor_class, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_CheckExact(capsule.ptr())) return nullptr;
  const auto* api = static_cast<const DLPackExchangeAPI*>(
      PyCapsule_GetPointer(capsule.ptr(), PyCapsule_GetName(capsule.ptr())));
  if (api == nullptr) throw py::error_already_set();
  return api->major == kMajor && api->tensor_from_object != nullptr ? api : nullptr;
}

int64_t dtype_code(DLDataType dtype) {
  if (dtype.lanes != 1) return -1;
  if (dtype.code == kBfloat && dtype.bits == 16) return int64_t(saft::ScalarType::kBFloat16);
  if (dtype.code != kFloat) return -1;
  switch (dtype.bits) {
    case 16:
      return int64_t(saft::ScalarType::kFloat16);
    case 32:
      return int64_t(saft::ScalarType::kFloat32);
    case 64:
      return int64_t(saft::ScalarType::kFloat64);
    default:
      return -1;
  }
}

// Elements of a contiguous tensor; -1 for any other.
int64_t contiguous_numel(const DLTensor& tensor) {
  int64_t numel = 1;
  bool contiguous = true;
  for (int32_t d = tensor.ndim - 1; d >= 0; --d) {
    if (tensor.strides != nullptr && tensor.shape[d] != 1) contiguous &= tensor.strides[d] == numel;
    numel *= tensor.shape[d];
  }
  return contiguous || numel == 0 ? numel : -1;
}

class TensorReader {
 public:
  TensorReader(const py::object& tensor_class, const py::object& parameter_class)
      : api_(exchange_api(tensor_class)),
        tensor_(reinterpret_cast<PyTypeObject*>(tensor_class.ptr())),
        parameter_(reinterpret_cast<PyTypeObject*>(parameter_class.ptr())) {}

  bool is_available() const { return api_ != nullptr; }

  // Writes the data pointers of `tensors` to `column`, a pointer every `row_bytes`. False, with some of them
  // written, unless each is contiguous, no subclass, and of the `expected` (numel, dtype code).
  bool move_pointers(const py::list& tensors, uintptr_t column, int64_t row_bytes, uintptr_t expected) const {
    const auto* want = reinterpret_cast<const int64_t*>(expected);
    for (const py::handle object : tensors) {
      const PyTypeObject* type = Py_TYPE(object.ptr());
      if (type != tensor_ && type != parameter_) return false;
      DLTensor tensor;
      if (api_->tensor_from_object(object.ptr(), &tensor) != 0) {
        PyErr_Clear();  // a conjugate or negative view
        return false;
      }
      if (contiguous_numel(tensor) != want[0] || dtype_code(tensor.dtype) != want[1]) return false;
      *reinterpret_cast<int64_t*>(column) =
          int64_t(reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset);
      column += uintptr_t(row_bytes);
      want += 2;
    }
    return true;
  }

 private:
  const DLPackExchangeAPI* api_;
  const PyTypeObject *tensor_, *parameter_;  // torch keeps them alive
};

// [getattr(object, name) for object in objects]; None when one of them is None
py::object attributes(const py::list& objects, const py::str& name) {
  py::list values(objects.size());
  for (size_t i = 0; i < objects.size(); ++i) {
    PyObject* value = PyObject_GetAttr(PyList_GET_ITEM(objects.ptr(), Py_ssize_t(i)), name.ptr());
    if (value == nullptr) throw py::error_already_set();
    PyList_SET_ITEM(values.ptr(), Py_ssize_t(i), value);
    if (value == Py_None) return py::none();
  }
  return std::move(values);
}

// Whether both hold the same objects.
bool same_objects(const py::list& now, const py::list& then) {
  if (now.size() != then.size()) return false;
  for (size_t i = 0; i < now.size(); ++i) {
    if (PyList_GET_ITEM(now.ptr(), Py_ssize_t(i)) != PyList_GET_ITEM(then.ptr(), Py_ssize_t(i))) return false;
  }
  return true;
}

// Whether dicts[i][key] is values[i], for all.
bool same_items(const py::list& dicts, const py::str& key, const py::list& values) {
  if (dicts.size() != values.size()) return false;
  for (size_t i = 0; i < dicts.size(); ++i) {
    PyObject* dict = PyList_GET_ITEM(dicts.ptr(), Py_ssize_t(i));
    if (!PyDict_Check(dict)) return false;
    PyObject* value = PyDict_GetItemWithError(dict, key.ptr());  // borrowed
    if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    if (value != PyList_GET_ITEM(values.ptr(), Py_ssize_t(i))) return false;
  }
  return true;
}

}  // namespace

void bind_tensors(py::module_& m) {
  py::class_<TensorReader>(m, "TensorReader")
      .def(py::init<const py::object&, const py::object&>(), py::arg("tensor_class"),
           py::arg("parameter_class"))
      .def_property_readonly("is_available", &TensorReader::is_available)
      .def("move_pointers", &TensorReader::move_pointers, py::arg("tensors"), py::arg("column"),
           py::arg("row_bytes"), py::arg("expected"));
  m.def("attributes", &attributes, py::arg("objects"), py::arg("name"));
  m.def("same_objects", &same_objects, py::arg("now"), py::arg("then"));
  m.def("same_items", &same_items, py::arg("dicts"), py::arg("key"), py::arg("values"));
}
