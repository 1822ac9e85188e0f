#include "divergence.cuh"

#include "host.h"

namespace kdkernels {
namespace {

// A tensor outer x inner x K, or outer x inner, or an empty gradient that is not wanted.
DivergenceRows rows_of(const Tensor& tensor) {
  if (tensor.numel() == 0) return {nullptr, Element::float32, 1, 0, 0, 0};
  return {const_cast<void*>(tensor.const_data_ptr()),
          element_of(tensor),
          tensor.size(1),
          tensor.stride(0),
          tensor.stride(1),
          tensor.dim() == 3 ? tensor.stride(2) : 0};
}

template <typename T>
std::tuple<Tensor, Tensor> run(const Tensor& student, const Tensor& teacher, const Tensor& temperatures, Kind kind,
                               double beta, bool standardize, bool moments) {
  const int64_t outer = student.size(0), inner = student.size(1), classes = student.size(2);
  const OnDevice device(student);
  const Tensor losses = new_compact(student, {outer, inner}, kScalarType<T>);
  const Tensor saved = new_compact(student, {outer, inner, moments ? kSavedMoments : kSavedNumbers}, kScalarType<T>);
  const bool is_jsd = kind == jsd;
  const auto kernel = is_jsd    ? moments ? divergence_kernel<T, true, true> : divergence_kernel<T, true, false>
                      : moments ? divergence_kernel<T, false, true>
                                : divergence_kernel<T, false, false>;
  launch(kernel, outer * inner, threads_for(classes, 4), 0, device.stream, rows_of(kind == reverse ? student : teacher),
         rows_of(kind == reverse ? teacher : student), rows_of(temperatures), classes, beta, standardize,
         data_of<T>(losses), data_of<T>(saved));
  return {losses, saved};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> run_backward(const Tensor& grad_losses, const Tensor& student, const Tensor& teacher,
                                                const Tensor& temperatures, const Tensor& saved, Kind kind, double beta,
                                                bool standardize, bool moments, bool want_student, bool want_teacher,
                                                bool want_temperatures) {
  const int64_t outer = student.size(0), inner = student.size(1), classes = student.size(2);
  const OnDevice device(student);
  const Tensor grad_student = new_gradient(student, want_student), grad_teacher = new_gradient(teacher, want_teacher);
  const Tensor grad_temperatures = new_compact(
      student, want_temperatures ? std::vector<int64_t>{outer, inner} : std::vector<int64_t>{0}, kScalarType<T>);
  const Tensor kept = compact(saved);
  const bool swapped = kind == reverse;
  launch(kind == jsd ? divergence_backward_kernel<T, true> : divergence_backward_kernel<T, false>, outer * inner,
         threads_for(classes, 4), 0, device.stream, rows_of(swapped ? student : teacher),
         rows_of(swapped ? teacher : student), rows_of(temperatures), rows_of(grad_losses), kept.const_data_ptr<T>(),
         moments, classes, beta, standardize, rows_of(swapped ? grad_student : grad_teacher),
         rows_of(swapped ? grad_teacher : grad_student), data_of<T>(grad_temperatures));
  return {grad_student, grad_teacher, grad_temperatures};
}

}  // namespace

std::tuple<Tensor, Tensor> divergence(const Tensor& student, const Tensor& teacher, const Tensor& temperatures,
                                      int64_t kind, double beta, bool standardize, bool moments) {
  check_divergence(student, teacher, temperatures, kind, beta);
  const auto chosen = any_double({student, teacher}) ? run<double> : run<float>;
  return chosen(student, teacher, temperatures, Kind(kind), beta, standardize, moments);
}

std::tuple<Tensor, Tensor, Tensor> divergence_backward(const Tensor& grad_losses, const Tensor& student,
                                                       const Tensor& teacher, const Tensor& temperatures,
                                                       const Tensor& saved, int64_t kind, double beta, bool standardize,
                                                       bool moments, bool grad_student, bool grad_teacher,
                                                       bool to_temperatures) {
  check_divergence_backward(grad_losses, student, teacher, temperatures, saved, kind, beta, standardize, moments,
                            grad_student, grad_teacher, to_temperatures);
  const auto chosen = any_double({student, teacher}) ? run_backward<double> : run_backward<float>;
  return chosen(grad_losses, student, teacher, temperatures, saved, Kind(kind), beta, standardize, moments,
                grad_student, grad_teacher, to_temperatures);
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(KDKERNELS_NAMESPACE, KDKERNELS_DEVICE, m) {
  m.impl("divergence", TORCH_BOX(&kdkernels::divergence));
  m.impl("divergence_backward", TORCH_BOX(&kdkernels::divergence_backward));
}
