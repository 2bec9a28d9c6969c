// Python entry points: raw addresses in, everything validated by amg.kernels beforehand.
#include <pybind11/pybind11.h>

#include "cpu_level.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of amg; call them through amg.kernels, which validates the arguments";
  m.def("cpu_level", [] { return std::string(amg::level_name(amg::cpu_level())); });
  m.def("detected_level", [] { return std::string(amg::level_name(amg::detected_level())); });
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
}
