// Lists of torch tensors, walked without an interpreted call per tensor: what keeps the Python share of a
// step small.
//
// Tensors are read through the C functions that torch.Tensor exports as DLPack's exchange API (DLPack 1.3,
// torch 2.11): a stable C ABI, so no torch header is needed. The structs below are that ABI.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

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

// The exchange API of a class, or null when it has none that is known here. It lives as long as the class.
const DLPackExchangeAPI* exchange_api(const py::object& tensor_class) {
  const py::object capsule = py::getattr(tensor_class, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_CheckExact(capsule.ptr())) return nullptr;
  const auto* api = static_cast<const DLPackExchangeAPI*>(
      PyCapsule_GetPointer(capsule.ptr(), PyCapsule_GetName(capsule.ptr())));
  if (api == nullptr) throw py::error_already_set();
  return api->major == kMajor && api->tensor_from_object != nullptr ? api : nullptr;
}

uint64_t mix(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x9e3779b97f4a7c15ull;
  return hash ^ (hash >> 29);
}

// Of dtype, device, shape and strides.
uint64_t form_of(const DLTensor& x) {
  uint64_t hash = mix(uint64_t(x.ndim), uint64_t(x.dtype.code) << 8 | x.dtype.bits);
  hash = mix(hash, uint64_t(uint32_t(x.device.device_type)) << 32 | uint32_t(x.device.device_id));
  for (int32_t d = 0; d < x.ndim; ++d) {
    hash = mix(hash, uint64_t(x.shape[d]));
    if (x.strides != nullptr) hash = mix(hash, uint64_t(x.strides[d]));
  }
  return hash;
}

uint64_t address_of(const DLTensor& x) { return reinterpret_cast<uintptr_t>(x.data) + x.byte_offset; }

int64_t numel_of(const DLTensor& x) {
  int64_t numel = 1;
  for (int32_t d = 0; d < x.ndim; ++d) numel *= x.shape[d];
  return numel;
}

int64_t stride_of(const DLTensor& x, int32_t d) {
  if (x.strides != nullptr) return x.strides[d];
  int64_t stride = 1;
  for (int32_t inner = d + 1; inner < x.ndim; ++inner) stride *= x.shape[inner];
  return stride;
}

bool is_contiguous(const DLTensor& x) {
  int64_t expected = 1;
  for (int32_t d = x.ndim - 1; d >= 0; --d) {
    if (x.shape[d] != 1 && stride_of(x, d) != expected) return false;
    expected *= x.shape[d];
  }
  return true;
}

constexpr uint8_t kFloat = 2, kBFloat = 4, kComplex = 5;  // DLDataTypeCode

bool scalar_type_of(const DLTensor& x, saft::ScalarType* type) {
  const int bits = x.dtype.bits;
  if (x.dtype.code == kBFloat && bits == 16) {
    *type = saft::ScalarType::kBFloat16;
  } else if (x.dtype.code == kFloat && (bits == 16 || bits == 32 || bits == 64)) {
    *type = bits == 16   ? saft::ScalarType::kFloat16
            : bits == 32 ? saft::ScalarType::kFloat32
                         : saft::ScalarType::kFloat64;
  } else {
    return false;
  }
  return true;
}

class TensorReader {
 public:
  TensorReader(const py::object& tensor_class, const py::object& parameter_class)
      : api_(exchange_api(tensor_class)),
        tensor_(reinterpret_cast<PyTypeObject*>(tensor_class.ptr())),
        parameter_(reinterpret_cast<PyTypeObject*>(parameter_class.ptr())),
        grad_(tensor_class.attr("grad")),
        is_neg_(tensor_class.attr("is_neg")),
        storage_(tensor_class.attr("untyped_storage")),
        storage_offset_(tensor_class.attr("storage_offset")),
        nbytes_(py::module_::import("torch").attr("UntypedStorage").attr("nbytes")) {}

  bool is_available() const { return api_ != nullptr; }

  // Writes the data pointers of `tensors` to `column`, a pointer every `row_bytes`, and their forms to
  // `forms`. True when every form was there already; with `is_fixed` the pointer is part of the form. None,
  // with some of it written, when one is of a subclass, or cannot be read.
  py::object read(const py::list& tensors, uintptr_t column, int64_t row_bytes, uintptr_t forms,
                  bool is_fixed) const {
    auto* form = reinterpret_cast<uint64_t*>(forms);
    bool same = true;
    for (const py::handle object : tensors) {
      DLTensor tensor;
      if (!read_one(object.ptr(), &tensor)) return py::none();
      const uint64_t data = address_of(tensor);
      if (data == 0 && numel_of(tensor) != 0) return py::none();  // its memory is gone
      const uint64_t now = is_fixed ? mix(form_of(tensor), data) : form_of(tensor);
      same = same && *form == now;
      *form++ = now;
      *reinterpret_cast<uint64_t*>(column) = data;
      column += uintptr_t(row_bytes);
    }
    return py::bool_(same);
  }

  // Whether all are of torch's own classes and on one device, and their values lie in memory that their
  // storage still has. False also where that is not plain to see.
  bool are_plain(const py::list& tensors) const {
    DLDevice device{};
    for (size_t i = 0; i < tensors.size(); ++i) {
      const py::handle object = PyList_GET_ITEM(tensors.ptr(), Py_ssize_t(i));
      DLTensor x;
      if (!read_one(object.ptr(), &x) || x.dtype.code == kComplex) return false;
      if (i == 0) device = x.device;
      if (x.device.device_type != device.device_type || x.device.device_id != device.device_id) return false;
      if (call(is_neg_, object).ptr() != Py_False) return false;
      if (numel_of(x) == 0) continue;
      int64_t numel = 1 + call(storage_offset_, object).cast<int64_t>();  // from the start of the storage
      for (int32_t d = 0; d < x.ndim; ++d) numel += (x.shape[d] - 1) * stride_of(x, d);
      const auto bytes = call(nbytes_, call(storage_, object)).cast<int64_t>();
      if (address_of(x) == 0 || bytes < numel * (x.dtype.bits / 8)) return false;
    }
    return true;
  }

  // Fills a row of saft::TensorDesc per tensor. False, with some of them written, when one cannot be read, is
  // not contiguous or has a dtype that the struct does not know.
  bool describe(const py::list& tensors, uintptr_t rows) const {
    auto* row = reinterpret_cast<saft::TensorDesc*>(rows);
    for (const py::handle object : tensors) {
      DLTensor x;
      if (!read_one(object.ptr(), &x) || !is_contiguous(x)) return false;
      *row = {reinterpret_cast<void*>(address_of(x)), numel_of(x), {}, 0, nullptr};
      if (!scalar_type_of(x, &row->dtype)) return false;
      ++row;
    }
    return true;
  }

  // What `tensor` is and where it lies, as one number. False when it is of a subclass, or cannot be read.
  bool where(PyObject* tensor, uint64_t* hash) const {
    DLTensor x;
    if (!read_one(tensor, &x)) return false;
    *hash = mix(form_of(x), address_of(x));
    return true;
  }

  // [p.grad for p in parameters], lazily negated ones made so; None when one of them has none.
  py::object gradients(const py::list& parameters) const {
    const size_t count = parameters.size();
    py::list values(count);
    for (size_t i = 0; i < count; ++i) {
      if (i + kAhead < count) prefetch(PyList_GET_ITEM(parameters.ptr(), Py_ssize_t(i + kAhead)));
      py::object value = gradient(PyList_GET_ITEM(parameters.ptr(), Py_ssize_t(i)));
      if (value.is_none()) return value;
      if (is_negated(value)) value = value.attr("resolve_neg")();
      PyList_SET_ITEM(values.ptr(), Py_ssize_t(i), value.release().ptr());
    }
    return std::move(values);
  }

  // Whether `p.grad is gradient` for each.
  bool have_gradients(const py::list& parameters, const py::list& gradients) const {
    const size_t count = parameters.size();
    if (gradients.size() != count) return false;
    for (size_t i = 0; i < count; ++i) {
      if (i + kAhead < count) prefetch(PyList_GET_ITEM(parameters.ptr(), Py_ssize_t(i + kAhead)));
      const py::object value = gradient(PyList_GET_ITEM(parameters.ptr(), Py_ssize_t(i)));
      if (value.ptr() != PyList_GET_ITEM(gradients.ptr(), Py_ssize_t(i))) return false;
    }
    return true;
  }

  static constexpr size_t kAhead = 8;  // tensors

  // What a tensor object points to: between two steps it has left the cache. Nothing is read through the
  // word.
  static void prefetch(const PyObject* object) {
    const char* word = *reinterpret_cast<const char* const*>(object + 1);
    for (size_t line = 0; line < 4; ++line) __builtin_prefetch(word + 64 * line);
  }

 private:
  bool is_known(const PyTypeObject* type) const { return type == tensor_ || type == parameter_; }

  // False when it is of a subclass, or cannot be read.
  bool read_one(PyObject* object, DLTensor* tensor) const {
    if (!is_known(Py_TYPE(object))) return false;
    if (api_->tensor_from_object(object, tensor) == 0) return true;
    PyErr_Clear();
    return false;
  }

  static py::object call(const py::object& function, py::handle argument) {
    auto result = py::reinterpret_steal<py::object>(PyObject_CallOneArg(function.ptr(), argument.ptr()));
    if (!result) throw py::error_already_set();
    return result;
  }

  // `object.grad`. The descriptors of torch.Tensor spare a search of its base classes.
  py::object gradient(PyObject* object) const {
    PyTypeObject* type = Py_TYPE(object);
    PyObject* grad = grad_.ptr();
    const descrgetfunc get = Py_TYPE(grad)->tp_descr_get;
    PyObject* value = is_known(type) && get != nullptr ? get(grad, object, reinterpret_cast<PyObject*>(type))
                                                       : PyObject_GetAttrString(object, "grad");
    if (value == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
  }

  bool is_negated(const py::object& tensor) const {
    if (!is_known(Py_TYPE(tensor.ptr()))) return tensor.attr("is_neg")().cast<bool>();
    return call(is_neg_, tensor).ptr() == Py_True;
  }

  const DLPackExchangeAPI* api_;
  const PyTypeObject *tensor_, *parameter_;  // torch keeps them alive
  py::object grad_, is_neg_, storage_, storage_offset_, nbytes_;
};

// The tensors of many dicts, as they are now: whether each dict still holds the same objects under the same
// keys, and each of them the same memory in the same form. `tensor.data = other`, `set_`, `share_memory_` and
// a storage that is resized leave the object and change its memory, and torch tells nobody.
class Watch {
 public:
  // Watches dicts[i][key] for all of `keys`, whether or not there is one. Takes a reference to every dict,
  // and to all that is in it.
  Watch(const TensorReader& reader, const py::list& dicts, const py::set& keys) : reader_(&reader) {
    for (const py::handle handle : dicts) {
      const auto dict = py::reinterpret_borrow<py::dict>(handle);
      dicts_.push_back(dict);
      for (const auto& item : dict) {
        const bool is_watched = keys.contains(item.first) && !item.second.is_none();
        Item seen{py::reinterpret_borrow<py::object>(item.first),
                  py::reinterpret_borrow<py::object>(item.second)};
        if (is_watched) {
          seen.is_watched = true;
          is_readable_ = reader.where(item.second.ptr(), &seen.where) && is_readable_;
        }
        items_.push_back(std::move(seen));
      }
      ends_.push_back(items_.size());
    }
    for (const py::handle key : keys) keys_.push_back(py::reinterpret_borrow<py::object>(key));
  }

  // False when a tensor cannot be read this way; `holds` is then of no use.
  bool is_readable() const { return is_readable_; }

  bool holds() const {
    size_t at = 0;
    for (size_t i = 0; i < dicts_.size(); ++i) {
      const size_t first = at;
      PyObject *key, *value;
      Py_ssize_t position = 0;
      bool same = size_t(PyDict_GET_SIZE(dicts_[i].ptr())) == ends_[i] - first;
      for (; same && PyDict_Next(dicts_[i].ptr(), &position, &key, &value); ++at) {
        same = key == items_[at].key.ptr() && value == items_[at].value.ptr();
      }
      // something is other than it was, perhaps not what is watched
      if (!same && !has_its_tensors(dicts_[i].ptr(), first, ends_[i])) return false;
      for (at = first; at < ends_[i]; ++at) {
        if (!items_[at].is_watched) continue;
        if (at + kAhead < items_.size()) TensorReader::prefetch(items_[at + kAhead].value.ptr());
        uint64_t where;
        if (!reader_->where(items_[at].value.ptr(), &where) || where != items_[at].where) return false;
      }
    }
    return true;
  }

 private:
  static constexpr size_t kAhead = 32;  // items: 8 parameters

  struct Item {
    py::object key, value;
    bool is_watched = false;
    uint64_t where = 0;
  };

  // Whether it has what it had under the watched keys, by equality of keys.
  bool has_its_tensors(PyObject* dict, size_t first, size_t end) const {
    for (const py::object& key : keys_) {
      PyObject* value = PyDict_GetItemWithError(dict, key.ptr());  // borrowed
      if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
      if (value == Py_None) value = nullptr;
      PyObject* then = nullptr;
      for (size_t at = first; at < end; ++at) {
        if (items_[at].is_watched && items_[at].key.equal(key)) then = items_[at].value.ptr();
      }
      if (value != then) return false;
    }
    return true;
  }

  const TensorReader* reader_;
  bool is_readable_ = true;
  std::vector<py::object> keys_;
  std::vector<py::dict> dicts_;
  std::vector<size_t> ends_;  // of each dict's items
  std::vector<Item> items_;
};

// Whether both hold the same objects.
bool same_objects(const py::list& now, const py::list& then) {
  if (now.size() != then.size()) return false;
  for (size_t i = 0; i < now.size(); ++i) {
    if (PyList_GET_ITEM(now.ptr(), Py_ssize_t(i)) != PyList_GET_ITEM(then.ptr(), Py_ssize_t(i))) return false;
  }
  return true;
}

}  // namespace

void bind_tensors(py::module_& m) {
  py::class_<TensorReader>(m, "TensorReader")
      .def(py::init<const py::object&, const py::object&>(), py::arg("tensor_class"),
           py::arg("parameter_class"))
      .def_property_readonly("is_available", &TensorReader::is_available)
      .def("read", &TensorReader::read, py::arg("tensors"), py::arg("column"), py::arg("row_bytes"),
           py::arg("forms"), py::arg("is_fixed"))
      .def("gradients", &TensorReader::gradients, py::arg("parameters"))
      .def("have_gradients", &TensorReader::have_gradients, py::arg("parameters"), py::arg("gradients"))
      .def("are_plain", &TensorReader::are_plain, py::arg("tensors"))
      .def("describe", &TensorReader::describe, py::arg("tensors"), py::arg("rows"));
  py::class_<Watch>(m, "Watch")
      .def(py::init<const TensorReader&, const py::list&, const py::set&>(), py::keep_alive<1, 2>(),
           py::arg("reader"), py::arg("dicts"), py::arg("keys"))
      .def_property_readonly("is_readable", &Watch::is_readable)
      .def("holds", &Watch::holds);
  m.def("same_objects", &same_objects, py::arg("now"), py::arg("then"));
}
