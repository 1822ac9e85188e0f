#include "dist.cuh"

#include "../checks/dist.h"
#include "host.h"

namespace kdkernels {
namespace {

template <typename T>
std::tuple<Tensor, Tensor, Tensor> run(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                                       double beta, double gamma, double temperature, bool want_student,
                                       bool want_teacher) {
  const int64_t rows = student.size(0), classes = student.size(1);
  const OnDevice device(student);
  const auto gradient = [&](bool wanted) {
    return new_compact(student, wanted ? std::vector<int64_t>{rows, classes} : std::vector<int64_t>{0}, kScalarType<T>);
  };
  const Tensor loss = new_compact(student, {}, kScalarType<T>);
  const Tensor grads[] = {gradient(want_student), gradient(want_teacher)};
  constexpr int64_t of_line = sizeof(DistLine) / sizeof(double);
  const Tensor lines = new_compact(student, {(rows + classes) * of_line + 2}, ScalarType::Double);
  const Tensor numbers =
      new_compact(student, {2 * rows * classes + classes * int64_t(sizeof(DistCentre<T>) / sizeof(T))}, kScalarType<T>);
  double* const weights = data_of<double>(lines);
  auto* const of_rows = reinterpret_cast<DistLine*>(weights + 2);
  DistLine* const of_columns = of_rows + rows;
  T* const q = data_of<T>(numbers);
  auto* const centres = reinterpret_cast<DistCentre<T>*>(q + 2 * rows * classes);
  const Probabilities<T> probabilities{{q, q + rows * classes}, rows, classes};
  const bool* counts = mask ? mask->const_data_ptr<bool>() : nullptr;
  const T inverse_temperature = T(1 / temperature);
  const double scale = temperature * temperature;
  const int threads = threads_for(classes, 4);
  launch(dist_rows_kernel<T>, rows, threads, 0, device.stream, logits_of(student), logits_of(teacher), counts,
         mask ? mask->stride(0) : int64_t(0), inverse_temperature, probabilities, of_rows);
  launch(dist_columns_kernel<T>, (classes + kCentreColumns - 1) / kCentreColumns, kCentreColumns * kCentreLines, 0,
         device.stream, probabilities, of_columns, centres);
  launch(dist_loss_kernel<T>, 1, kReduceThreads, 0, device.stream, static_cast<const DistLine*>(of_rows), rows,
         static_cast<const DistLine*>(of_columns), classes, scale * beta, scale * gamma, data_of<T>(loss), weights);
  for (int network = 0; network < 2; ++network)
    if (network == 0 ? want_student : want_teacher)
      launch(dist_gradient_kernel<T>, rows, threads, 0, device.stream, probabilities,
             static_cast<const DistLine*>(of_rows), static_cast<const DistLine*>(of_columns),
             static_cast<const DistCentre<T>*>(centres), static_cast<const double*>(weights), network,
             inverse_temperature, data_of<T>(grads[network]));
  return {loss, grads[0], grads[1]};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> dist(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                                        double beta, double gamma, double temperature, bool grad_student,
                                        bool grad_teacher) {
  check_dist(student, teacher, mask, beta, gamma, temperature);
  return (any_double({student, teacher}) ? run<double> : run<float>)(student, teacher, mask, beta, gamma, temperature,
                                                                     grad_student, grad_teacher);
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(KDKERNELS_NAMESPACE, KDKERNELS_DEVICE, m) { m.impl("dist", TORCH_BOX(&kdkernels::dist)); }
