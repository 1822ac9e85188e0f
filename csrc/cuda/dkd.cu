#include "dkd.cuh"

#include "../checks/dkd.h"
#include "host.h"

namespace kdkernels {
namespace {

template <typename T>
std::tuple<Tensor, Tensor, Tensor> run(const Tensor& student, const Tensor& teacher, const Tensor& labels,
                                       const DkdSettings& settings, bool want_student, bool want_teacher) {
  const int64_t rows = student.size(0), classes = student.size(1);
  const OnDevice device(student);
  const auto gradient = [&](bool wanted) {
    return new_compact(student, wanted ? std::vector<int64_t>{rows, classes} : std::vector<int64_t>{0}, kScalarType<T>);
  };
  const Tensor loss = new_compact(
      student, settings.reduction == 2 ? std::vector<int64_t>{rows} : std::vector<int64_t>{}, kScalarType<T>);
  const Tensor losses = new_compact(student, {rows + 1}, ScalarType::Double);
  const Tensor grad_student = gradient(want_student), grad_teacher = gradient(want_teacher);
  double* const of_rows = data_of<double>(losses);
  double* const count = of_rows + rows;
  const int64_t* of_labels = labels.const_data_ptr<int64_t>();
  const int64_t stride = labels.stride(0);
  launch(count_labels_kernel, 1, kReduceThreads, 0, device.stream, of_labels, stride, rows, settings.ignore_index,
         count);
  launch(dkd_kernel<T>, rows, threads_for(classes, 4), 0, device.stream, logits_of(student), logits_of(teacher),
         of_labels, stride, static_cast<const double*>(count), classes, settings, of_rows, data_of<T>(grad_student),
         data_of<T>(grad_teacher));
  launch(reduce_dkd_kernel<T>, 1, kReduceThreads, 0, device.stream, static_cast<const double*>(of_rows), rows,
         static_cast<const double*>(count), settings, data_of<T>(loss));
  return {loss, grad_student, grad_teacher};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> dkd(const Tensor& student, const Tensor& teacher, const Tensor& labels, double alpha,
                                       double beta, double temperature, int64_t reduction, int64_t ignore_index,
                                       bool grad_student, bool grad_teacher) {
  check_dkd(student, teacher, labels, alpha, beta, temperature, reduction);
  const DkdSettings settings{alpha, beta, temperature, reduction, ignore_index};
  return (any_double({student, teacher}) ? run<double> : run<float>)(student, teacher, labels, settings, grad_student,
                                                                     grad_teacher);
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(KDKERNELS_NAMESPACE, KDKERNELS_DEVICE, m) { m.impl("dkd", TORCH_BOX(&kdkernels::dkd)); }
