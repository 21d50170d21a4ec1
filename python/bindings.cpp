// saft_kernels._C: the compiled backends. Private to saft_kernels/ops: addresses and sizes in, checked there.
//
// Tables are int64 arrays laid out as the C structs of csrc/ (every field is 64 bits wide). The GIL is
// released while a kernel runs.

#include <pybind11/pybind11.h>

#include <cstring>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "gather_scatter/gather_scatter.h"
#include "sddmm/sddmm.h"
#include "sparse_adamw/sparse_adamw.h"
#include "topk_magnitude/topk_magnitude.h"

namespace py = pybind11;

void bind_cuda(py::module_& m);     // bindings_cuda.cpp
void bind_tensors(py::module_& m);  // bindings_tensors.cpp

namespace {

static_assert(sizeof(saft::TensorDesc) == 5 * 8);
static_assert(sizeof(saft::AdamWSegment) == 19 * 8);
static_assert(sizeof(saft::AdamWHyper) == 9 * 8);
static_assert(sizeof(saft::GatherSegment) == 9 * 8);
static_assert(sizeof(saft::SddmmParams) == 15 * 8);
static_assert(sizeof(saft::TopKRows) == 7 * 8);

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::tuple<double, int64_t> topk_magnitude(uintptr_t tensors, int64_t num_tensors, int64_t k,
                                           uintptr_t indices, uintptr_t counts, int num_threads, int isa) {
  const saft::TopKResult result = saft::topk_magnitude_cpu(pointer<const saft::TensorDesc>(tensors),
                                                           num_tensors, k, pointer<saft::index_t>(indices),
                                                           pointer<saft::index_t>(counts), num_threads, isa);
  return {result.threshold, result.num_nonfinite};
}

void topk_magnitude_rows(uintptr_t rows, uintptr_t indices, int num_threads) {
  saft::topk_magnitude_rows_cpu(*pointer<const saft::TopKRows>(rows), pointer<saft::index_t>(indices),
                                num_threads);
}

int64_t sparse_adamw(uintptr_t segments, int64_t num_segments, std::string_view hypers, int num_threads,
                     int isa) {
  std::vector<saft::AdamWHyper> rows(hypers.size() / sizeof(saft::AdamWHyper));
  std::memcpy(rows.data(), hypers.data(), rows.size() * sizeof(saft::AdamWHyper));
  return saft::sparse_adamw_cpu(pointer<const saft::AdamWSegment>(segments), num_segments, rows.data(),
                                num_threads, isa);
}

int64_t gather(uintptr_t segments, int64_t num_segments, int num_threads) {
  return saft::gather_cpu(pointer<const saft::GatherSegment>(segments), num_segments, num_threads);
}

int64_t scatter(uintptr_t segments, int64_t num_segments, int num_threads) {
  return saft::scatter_cpu(pointer<const saft::GatherSegment>(segments), num_segments, num_threads);
}

bool sddmm(std::string_view params, int num_threads, int isa) {
  saft::SddmmParams row;
  std::memcpy(&row, params.data(), sizeof(row));
  return saft::sddmm_cpu(row, num_threads, isa);
}

// Instruction-set levels this processor runs, least first; a name's position is its number.
std::vector<std::string> isas() {
  const std::vector<std::string> names{"baseline", "avx2", "avx512"};
  return {names.begin(), names.begin() + int(saft::best_isa()) + 1};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of saft_kernels; private to saft_kernels.ops.";
  const py::call_guard<py::gil_scoped_release> nogil;
  m.def("topk_magnitude", &topk_magnitude, py::arg("tensors"), py::arg("num_tensors"), py::arg("k"),
        py::arg("indices"), py::arg("counts"), py::arg("num_threads"), py::arg("isa"), nogil);
  m.def("topk_magnitude_rows", &topk_magnitude_rows, py::arg("rows"), py::arg("indices"),
        py::arg("num_threads"), nogil);
  m.def("sparse_adamw", &sparse_adamw, py::arg("segments"), py::arg("num_segments"), py::arg("hypers"),
        py::arg("num_threads"), py::arg("isa"), nogil);
  m.def("gather", &gather, py::arg("segments"), py::arg("num_segments"), py::arg("num_threads"), nogil);
  m.def("scatter", &scatter, py::arg("segments"), py::arg("num_segments"), py::arg("num_threads"), nogil);
  m.def("sddmm", &sddmm, py::arg("params"), py::arg("num_threads"), py::arg("isa"), nogil);
  m.def("isas", [] {
    py::list names;
    for (const std::string& name : isas()) names.append(name);
    return names;
  });
  bind_tensors(m);
#if defined(SAFT_WITH_CUDA)
  bind_cuda(m);
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.attr("has_openmp") =
#if defined(_OPENMP)
      true;
#else
      false;
#endif
}
