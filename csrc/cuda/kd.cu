#include "kd.cuh"

#include "../checks/kd.h"
#include "host.h"
#include "reduce.cuh"

namespace kdkernels {
namespace {

template <typename T>
std::tuple<Tensor, Tensor, Tensor> run(const Tensor& student, const Tensor& teacher, double temperature, double scale,
                                       bool want_student, bool want_teacher) {
  const int64_t rows = student.size(0), classes = student.size(1);
  const OnDevice device(student);
  const auto gradient = [&](bool wanted) {
    return new_compact(student, wanted ? std::vector<int64_t>{rows, classes} : std::vector<int64_t>{0}, kScalarType<T>);
  };
  const Tensor loss = new_compact(student, {}, kScalarType<T>);
  const Tensor losses = new_compact(student, {rows}, ScalarType::Double);
  const Tensor grad_student = gradient(want_student), grad_teacher = gradient(want_teacher);
  launch(kd_kernel<T>, rows, threads_for(classes, 4), 0, device.stream, logits_of(student), logits_of(teacher), classes,
         T(1 / temperature), T(scale / (rows * temperature)), data_of<double>(losses), data_of<T>(grad_student),
         data_of<T>(grad_teacher));
  launch(reduce_kernel<T>, 1, kReduceThreads, 0, device.stream, data_of<double>(losses), rows, scale / rows,
         data_of<T>(loss));
  return {loss, grad_student, grad_teacher};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> kd(const Tensor& student, const Tensor& teacher, double temperature, double scale,
                                      bool grad_student, bool grad_teacher) {
  check_kd(student, teacher, temperature, scale);
  const bool in_double = student.scalar_type() == ScalarType::Double || teacher.scalar_type() == ScalarType::Double;
  return (in_double ? run<double> : run<float>)(student, teacher, temperature, scale, grad_student, grad_teacher);
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(KDKERNELS_NAMESPACE, KDKERNELS_DEVICE, m) { m.impl("kd", TORCH_BOX(&kdkernels::kd)); }
