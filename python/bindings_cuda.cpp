// The CUDA part of saft_kernels._C, present when the module was built with nvcc. Everything is enqueued on
// the caller's stream; nothing waits for the device.

#include <pybind11/pybind11.h>

#include "sddmm_cuda.h"
#include "topk_magnitude_cuda.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

saft::TopKCudaPlan plan(uintptr_t tensors, int64_t num_tensors, int64_t k) {
  return saft::topk_magnitude_cuda_plan(pointer<const saft::TensorDesc>(tensors), num_tensors, k);
}

void fill_table(const saft::TopKCudaPlan& plan, uintptr_t tensors, uintptr_t table, uintptr_t device_table) {
  saft::topk_magnitude_cuda_table(plan, pointer<const saft::TensorDesc>(tensors), pointer<void>(table),
                                  pointer<const void>(device_table));
}

void launch(const saft::TopKCudaPlan& plan, uintptr_t device_table, uintptr_t workspace, uintptr_t indices,
            uintptr_t result, uintptr_t stream, int max_blocks) {
  saft::topk_magnitude_cuda(plan, pointer<const void>(device_table), pointer<void>(workspace),
                            pointer<saft::index_t>(indices), pointer<saft::index_t>(result),
                            pointer<void>(stream), max_blocks);
}

int64_t sddmm_workspace_bytes(uintptr_t params) {
  return saft::sddmm_cuda_workspace_bytes(*pointer<const saft::SddmmParams>(params));
}

void sddmm(uintptr_t params, uintptr_t workspace, uintptr_t stream, int max_blocks) {
  saft::sddmm_cuda(*pointer<const saft::SddmmParams>(params), pointer<void>(workspace), pointer<void>(stream),
                   max_blocks);
}

}  // namespace

void bind_cuda(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> nogil;
  py::class_<saft::TopKCudaPlan>(m, "TopKCudaPlan")
      .def_readonly("table_bytes", &saft::TopKCudaPlan::table_bytes)
      .def_readonly("workspace_bytes", &saft::TopKCudaPlan::workspace_bytes)
      .def_readonly("result_words", &saft::TopKCudaPlan::result_words);
  m.def("cuda_unavailable", &saft::topk_magnitude_cuda_unavailable, py::arg("device"), nogil);
  m.def("topk_magnitude_cuda_plan", &plan, py::arg("tensors"), py::arg("num_tensors"), py::arg("k"), nogil);
  m.def("topk_magnitude_cuda_table", &fill_table, py::arg("plan"), py::arg("tensors"), py::arg("table"),
        py::arg("device_table"), nogil);
  m.def("topk_magnitude_cuda", &launch, py::arg("plan"), py::arg("device_table"), py::arg("workspace"),
        py::arg("indices"), py::arg("result"), py::arg("stream"), py::arg("max_blocks"), nogil);
  m.def("sddmm_cuda_workspace_bytes", &sddmm_workspace_bytes, py::arg("params"), nogil);
  m.def("sddmm_cuda", &sddmm, py::arg("params"), py::arg("workspace"), py::arg("stream"),
        py::arg("max_blocks"), nogil);
  m.def("topk_magnitude_cuda_threshold", &saft::topk_magnitude_cuda_threshold, py::arg("plan"),
        py::arg("key"));
}
