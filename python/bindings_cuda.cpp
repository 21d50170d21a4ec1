// The CUDA part of saft_kernels._C, present when the module was built with nvcc. Everything is enqueued on
// the caller's stream; nothing waits for the device.

#include <pybind11/pybind11.h>

#include <cstring>
#include <string_view>
#include <vector>

#include "cuda/device.h"
#include "gather_scatter/gather_scatter.h"
#include "sddmm/sddmm.h"
#include "sparse_adamw/sparse_adamw.h"
#include "topk_magnitude/topk_magnitude.h"

namespace py = pybind11;

namespace {

static_assert(sizeof(saft::AdamWCudaHyper) == 17 * 8);

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

saft::TopKCudaPlan plan(uintptr_t tensors, int64_t num_tensors, int64_t k) {
  return saft::topk_magnitude_cuda_plan(pointer<const saft::TensorDesc>(tensors), num_tensors, k);
}

void launch(const saft::TopKCudaPlan& plan, uintptr_t tensors, uintptr_t workspace, uintptr_t indices,
            uintptr_t result, uintptr_t stream, int max_blocks) {
  saft::topk_magnitude_cuda(plan, pointer<const saft::TensorDesc>(tensors), pointer<void>(workspace),
                            pointer<saft::index_t>(indices), pointer<saft::index_t>(result),
                            pointer<void>(stream), max_blocks);
}

saft::SddmmParams sddmm_params(std::string_view params) {
  saft::SddmmParams row;
  std::memcpy(&row, params.data(), sizeof(row));
  return row;
}

int64_t sddmm_workspace_bytes(std::string_view params) {
  return saft::sddmm_cuda_workspace_bytes(sddmm_params(params));
}

void sddmm(std::string_view params, uintptr_t workspace, uintptr_t stream, int max_blocks) {
  saft::sddmm_cuda(sddmm_params(params), pointer<void>(workspace), pointer<void>(stream), max_blocks);
}

int64_t adamw_table_bytes(uintptr_t segments, int64_t num_segments) {
  return saft::sparse_adamw_cuda_table_bytes(pointer<const saft::AdamWSegment>(segments), num_segments);
}

void adamw_table(uintptr_t segments, int64_t num_segments, uintptr_t device_table, uintptr_t stream) {
  saft::sparse_adamw_cuda_table(pointer<const saft::AdamWSegment>(segments), num_segments,
                                pointer<void>(device_table), pointer<void>(stream));
}

void adamw(uintptr_t segments, int64_t num_segments, std::string_view hypers, uintptr_t device_table,
           uintptr_t stream, int max_blocks) {
  std::vector<saft::AdamWCudaHyper> rows(hypers.size() / sizeof(saft::AdamWCudaHyper));
  std::memcpy(rows.data(), hypers.data(), rows.size() * sizeof(saft::AdamWCudaHyper));
  saft::sparse_adamw_cuda(pointer<const saft::AdamWSegment>(segments), num_segments, rows.data(),
                          pointer<const void>(device_table), pointer<void>(stream), max_blocks);
}

int64_t gather_table_bytes(uintptr_t segments, int64_t num_segments) {
  return saft::gather_scatter_cuda_table_bytes(pointer<const saft::GatherSegment>(segments), num_segments);
}

void gather(uintptr_t segments, int64_t num_segments, uintptr_t device_table, uintptr_t stream,
            int max_blocks) {
  saft::gather_cuda(pointer<const saft::GatherSegment>(segments), num_segments, pointer<void>(device_table),
                    pointer<void>(stream), max_blocks);
}

void scatter(uintptr_t segments, int64_t num_segments, uintptr_t device_table, uintptr_t stream,
             int max_blocks) {
  saft::scatter_cuda(pointer<const saft::GatherSegment>(segments), num_segments, pointer<void>(device_table),
                     pointer<void>(stream), max_blocks);
}

}  // namespace

void bind_cuda(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> nogil;
  py::class_<saft::TopKCudaPlan>(m, "TopKCudaPlan")
      .def_readonly("workspace_bytes", &saft::TopKCudaPlan::workspace_bytes)
      .def_readonly("result_words", &saft::TopKCudaPlan::result_words);
  m.def("cuda_unavailable", &saft::cuda_unavailable, py::arg("device"), nogil);
  m.def("topk_magnitude_cuda_plan", &plan, py::arg("tensors"), py::arg("num_tensors"), py::arg("k"), nogil);
  m.def("topk_magnitude_cuda", &launch, py::arg("plan"), py::arg("tensors"), py::arg("workspace"),
        py::arg("indices"), py::arg("result"), py::arg("stream"), py::arg("max_blocks"), nogil);
  m.def("sddmm_cuda_workspace_bytes", &sddmm_workspace_bytes, py::arg("params"), nogil);
  m.def("sddmm_cuda", &sddmm, py::arg("params"), py::arg("workspace"), py::arg("stream"),
        py::arg("max_blocks"), nogil);
  m.def("topk_magnitude_cuda_threshold", &saft::topk_magnitude_cuda_threshold, py::arg("plan"),
        py::arg("key"));
  m.def("sparse_adamw_cuda_table_bytes", &adamw_table_bytes, py::arg("segments"), py::arg("num_segments"));
  m.def("sparse_adamw_cuda_table", &adamw_table, py::arg("segments"), py::arg("num_segments"),
        py::arg("device_table"), py::arg("stream"), nogil);
  m.def("sparse_adamw_cuda", &adamw, py::arg("segments"), py::arg("num_segments"), py::arg("hypers"),
        py::arg("device_table"), py::arg("stream"), py::arg("max_blocks"), nogil);
  m.def("gather_scatter_cuda_table_bytes", &gather_table_bytes, py::arg("segments"), py::arg("num_segments"));
  m.def("gather_cuda", &gather, py::arg("segments"), py::arg("num_segments"), py::arg("device_table"),
        py::arg("stream"), py::arg("max_blocks"), nogil);
  m.def("scatter_cuda", &scatter, py::arg("segments"), py::arg("num_segments"), py::arg("device_table"),
        py::arg("stream"), py::arg("max_blocks"), nogil);
}
