// Python entry points: raw addresses in, everything validated by amg.kernels beforehand.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu_level.h"
#include "guided_step/guided_step.h"
#include "near_pairs/near_pairs.h"
#include "nl2/nl2.h"
#include "top1_cosine/top1_cosine.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Addresses in the order of StepTensors; 0 stands for a tensor that is not there. sizes: batch, elements a sample;
// widths: of a row of coefficients, its stride, states; dtypes: of sample, network, gradient.
void guided_step(const std::array<Address, 15>& tensors, const std::array<std::int64_t, 4>& counts,
                 const std::array<std::int64_t, 2>& sizes, const std::array<std::int64_t, 3>& widths,
                 const std::array<int, 3>& dtypes, int num_threads) {
  const auto [sample, uncond, cond, neighbour, gradient, similarity, noise, coefficients, rows, state, output_scale,
              prev_sample, x0_hat, signals, flags] = tensors;
  const amg::GuidedStepArgs args{
      pointer<const void>(sample),
      {pointer<const void>(uncond), pointer<const void>(cond), pointer<const void>(neighbour), pointer<const void>(gradient)},
      pointer<const float>(similarity),
      pointer<const void>(noise),
      pointer<const float>(coefficients),
      pointer<const std::int32_t>(rows),
      pointer<float>(state),
      pointer<const float>(output_scale),
      pointer<void>(prev_sample),
      pointer<void>(x0_hat),
      pointer<float>(signals),
      pointer<std::int32_t>(flags),
      {counts[0], counts[1], counts[2], counts[3]},
      sizes[0],
      sizes[1],
      widths[0],
      widths[1],
      static_cast<int>(widths[2]),
      static_cast<amg::DType>(dtypes[0]),
      static_cast<amg::DType>(dtypes[1]),
      static_cast<amg::DType>(dtypes[2]),
      num_threads};
  py::gil_scoped_release release;
  amg::guided_step(args);
}

// Addresses: queries, the same in the basis of the codes, rows, codes, scales, errors, squares, limits (0 for those of
// the last five that are not there), similarity, row; sizes: batch, rows, dimension, k, columns of a panel.
void topk_cosine(const std::array<Address, 10>& tensors, const std::array<std::int64_t, 5>& sizes, int dtype, int num_threads) {
  const auto [queries, turned, rows, codes, scales, errors, squares, limits, similarity, row] = tensors;
  const auto [batch, count, dimension, k, width] = sizes;
  const amg::CosineArgs args{
      pointer<const double>(queries), pointer<const double>(turned), pointer<const void>(rows),
      pointer<const std::int8_t>(codes), pointer<const float>(scales), pointer<const float>(errors),
      pointer<const std::int32_t>(squares), pointer<const float>(limits), pointer<float>(similarity),
      pointer<std::int64_t>(row), batch, count, dimension, k, width, static_cast<amg::DType>(dtype), num_threads};
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

// Every near pair: left, right, closeness, a tensor's worth each, copied into addresses that `allocate` gives for a number.
void near_pairs(Address rows, Address others, Address sketches, Address codes, Address scales, Address errors,
                const std::array<std::int64_t, 3>& sizes, int dtype, double reach, float least, bool earlier,
                int num_threads, const py::function& allocate) {
  const amg::PairArgs args{
      pointer<const void>(rows),  pointer<const void>(others), pointer<const float>(sketches), pointer<const std::int8_t>(codes),
      pointer<const float>(scales), pointer<const float>(errors), sizes[0],                      sizes[1],
      sizes[2],                   static_cast<amg::DType>(dtype), reach,                       least,
      earlier,                    num_threads};
  std::vector<amg::NearPair> pairs;
  {
    py::gil_scoped_release release;
    pairs = amg::near_pairs(args);
  }
  const auto [left, right, closeness] = allocate(pairs.size()).cast<std::array<Address, 3>>();
  for (std::size_t at = 0; at < pairs.size(); ++at) {
    pointer<std::int64_t>(left)[at] = pairs[at].left;
    pointer<std::int64_t>(right)[at] = pairs[at].right;
    pointer<float>(closeness)[at] = pairs[at].closeness;
  }
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
  m.def("near_pairs", &near_pairs);
  m.def("release_threads", &release_threads);
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
}
