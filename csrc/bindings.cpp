// Python entry points: raw addresses in, everything validated by amg.kernels beforehand.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu_level.h"
#include "guided_step/guided_step.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Addresses in the order of GuidedStepArgs; 0 stands for a tensor that is not there.
void guided_step(Address sample, Address eps_uncond, Address eps_cond, Address eps_neighbour, Address similarity_grad,
                 Address similarity, Address noise, Address coefficients, std::int64_t coefficient_stride,
                 Address prev_sample, Address x0_hat, Address signals, std::int64_t batch, std::int64_t size,
                 int dtype, int grad_dtype, int num_threads) {
  const amg::GuidedStepArgs args{
      pointer<const void>(sample),        pointer<const void>(eps_uncond),      pointer<const void>(eps_cond),
      pointer<const void>(eps_neighbour), pointer<const void>(similarity_grad), pointer<const float>(similarity),
      pointer<const void>(noise),         pointer<const float>(coefficients),   coefficient_stride,
      pointer<void>(prev_sample),         pointer<void>(x0_hat),                pointer<float>(signals),
      batch,                              size,                                 static_cast<amg::DType>(dtype),
      static_cast<amg::DType>(grad_dtype), num_threads};
  py::gil_scoped_release release;
  amg::guided_step(args);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of amg; call them through amg.kernels, which validates the arguments";
  m.def("cpu_level", [] { return std::string(amg::level_name(amg::cpu_level())); });
  m.def("detected_level", [] { return std::string(amg::level_name(amg::detected_level())); });
  m.def("guided_step", &guided_step);
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
}
