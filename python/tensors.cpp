// What the kernels want to know of many torch tensors, read in one call: addresses, and whether their form
// has changed. The same through Python costs 30 ns per tensor and attribute; a step has no time for that.
//
// torch.Tensor.__dlpack_c_exchange_api__ hands out tensors as DLPack 1.x structs. They are declared here as
// that standard lays them out (https://github.com/dmlc/dlpack, dlpack.h), as far as they are used.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace {

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t dtype_code, dtype_bits;
  uint16_t dtype_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; null: contiguous
  uint64_t byte_offset;
};
static_assert(sizeof(DLTensor) == 48);

struct DLPackExchangeAPI {
  uint32_t major, minor;
  void* prev_api;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);  // 0, or a Python error is set
};

uint64_t mix(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x9e3779b97f4a7c15ull;
  return hash ^ (hash >> 29);
}

// Of dtype, device, shape and strides.
uint64_t form_of(const DLTensor& x) {
  uint64_t hash = mix(uint64_t(x.ndim), uint64_t(x.dtype_code) << 8 | x.dtype_bits);
  hash = mix(hash, uint64_t(uint32_t(x.device_type)) << 32 | uint32_t(x.device_id));
  for (int32_t d = 0; d < x.ndim; ++d) {
    hash = mix(hash, uint64_t(x.shape[d]));
    if (x.strides != nullptr) hash = mix(hash, uint64_t(x.strides[d]));
  }
  return hash;
}

// Writes the address of tensors[i] to addresses[i * stride] and its form to forms[i]; true when every form
// was there already. With `fixed`, the address is part of the form.
bool read_tensors(const py::capsule& api_capsule, const py::list& tensors, uintptr_t addresses,
                  int64_t stride, uintptr_t forms, bool fixed) {
  const auto* const api =
      static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(api_capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  if (api->major != 1 || api->dltensor_from_py_object_no_sync == nullptr) {
    throw std::runtime_error(
        "torch.Tensor.__dlpack_c_exchange_api__: expected DLPack 1.x with DLTensors, got version " +
        std::to_string(api->major) + "; saft_kernels needs an update for this torch");
  }
  uint64_t* const address = reinterpret_cast<uint64_t*>(addresses);
  uint64_t* const form = reinterpret_cast<uint64_t*>(forms);
  bool same = true;
  for (py::ssize_t i = 0; i < PyList_GET_SIZE(tensors.ptr()); ++i) {
    DLTensor x;
    if (api->dltensor_from_py_object_no_sync(PyList_GET_ITEM(tensors.ptr(), i), &x) != 0) {
      throw py::error_already_set();
    }
    const uint64_t data = reinterpret_cast<uint64_t>(x.data) + x.byte_offset;
    const uint64_t now = fixed ? mix(form_of(x), data) : form_of(x);
    same = same && form[i] == now;
    form[i] = now;
    address[i * stride] = data;
  }
  return same;
}

}  // namespace

void bind_tensors(py::module_& m) {
  m.def("read_tensors", &read_tensors, py::arg("api"), py::arg("tensors"), py::arg("addresses"),
        py::arg("stride"), py::arg("forms"), py::arg("fixed"));
}
