// Python entry points: raw addresses in, everything validated by amg.kernels beforehand.
#include <pybind11/pybind11.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <cstdint>
#include <string>

#include "cpu_level.h"
#include "guided_step/guided_step.h"
#include "nl2/nl2.h"
#include "top1_cosine/top1_cosine.h"

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

void topk_cosine(Address queries, Address rows, Address codes, Address scales, Address errors, Address similarity,
                 Address row, std::int64_t batch, std::int64_t count, std::int64_t dimension, std::int64_t k, int dtype,
                 int num_threads) {
  const amg::CosineArgs args{
      pointer<const double>(queries), pointer<const void>(rows),   pointer<const std::int8_t>(codes),
      pointer<const float>(scales),   pointer<const float>(errors), pointer<float>(similarity),
      pointer<std::int64_t>(row),     batch,                        count,
      dimension,                      k,                            static_cast<amg::DType>(dtype),
      num_threads};
  py::gil_scoped_release release;
  amg::topk_cosine(args);
}

void encode_rows(Address rows, int dtype, std::int64_t count, std::int64_t dimension, Address codes, Address scales,
                 Address errors, int num_threads) {
  py::gil_scoped_release release;
  amg::encode_rows(pointer<const void>(rows), static_cast<amg::DType>(dtype), count, dimension,
                   pointer<std::int8_t>(codes), pointer<float>(scales), pointer<float>(errors), num_threads);
}

void nl2(Address queries, Address rows, Address value, Address row, Address distance, Address denominator,
         std::int64_t batch, std::int64_t count, std::int64_t pixels, std::int64_t k, double alpha, int dtype,
         int num_threads) {
  const amg::Nl2Args args{
      pointer<const double>(queries), pointer<const void>(rows), pointer<float>(value),
      pointer<std::int64_t>(row),     pointer<float>(distance),  pointer<float>(denominator),
      batch,                          count,                     pixels,
      k,                              alpha,                     static_cast<amg::DType>(dtype),
      num_threads};
  py::gil_scoped_release release;
  amg::nl2(args);
}

// GCC has had this call of OpenMP 5.0 since version 9, and still calls itself 4.5.
void release_threads() {
#if defined(_OPENMP) && (_OPENMP >= 201811 || __GNUC__ >= 9)
  omp_pause_resource_all(omp_pause_soft);
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of amg; call them through amg.kernels, which validates the arguments";
  m.def("cpu_level", [] { return std::string(amg::level_name(amg::cpu_level())); });
  m.def("detected_level", [] { return std::string(amg::level_name(amg::detected_level())); });
  m.def("guided_step", &guided_step);
  m.def("topk_cosine", &topk_cosine);
  m.def("encode_rows", &encode_rows);
  m.def("nl2", &nl2);
  m.def("release_threads", &release_threads);
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
}
