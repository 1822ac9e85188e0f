// The whole LKD loss of all stages in one call: the patches of both networks, their congruence, and the gradients to the
// features.
#include "../checks/local_correlation.h"
#include "../relations.h"
#include "congruence.h"
#include "patches.h"
#include "workspace.h"

namespace kdkernels {
namespace {

// The gradient of one network: a new tensor of the size of its patches, or nothing.
template <typename T>
Tensor new_gradient(const Partition& partition, const Tensor& like, bool wanted) {
  if (!wanted) return new_compact(like, {0}, kScalarType<T>);
  return new_compact(like, {partition.rows(), partition.length()}, kScalarType<T>);
}

struct Result {
  double loss;
  Tensor grad_student, grad_teacher;
};

template <typename T>
Result run_stage(const Tensor& student, const Tensor& teacher, const Partition& cut_x, const Partition& cut_y,
                 double eps, const Coefficients& coefficients, const Plan& plan, bool want_student, bool want_teacher) {
  const int64_t rows = cut_x.rows();
  const int64_t line_x = spread<T>(cut_x.length()), line_y = spread<T>(cut_y.length());
  T* x = workspace<T, Scratch::rows_x>(rows * line_x);
  T* y = workspace<T, Scratch::rows_y>(rows * line_y);
  T* norms_x = workspace<T, Scratch::norms_x>(rows);
  T* norms_y = workspace<T, Scratch::norms_y>(rows);
  cut_x.pack(student, x, line_x, norms_x, eps);
  cut_y.pack(teacher, y, line_y, norms_y, eps);

  const Tensor grad_student = new_gradient<T>(cut_x, student, want_student);
  const Tensor grad_teacher = new_gradient<T>(cut_y, student, want_teacher);
  T* grad_x = want_student ? grad_student.mutable_data_ptr<T>() : nullptr;
  T* grad_y = want_teacher ? grad_teacher.mutable_data_ptr<T>() : nullptr;
  Congruence<T> problem{{x, line_x, 1}, {y, line_y, 1},    rows,         cut_x.length(),
                        cut_y.length(), cut_x.positions(), coefficients, plan};
  // D_rr of unit rows is 0. It is ±1 if exactly one of the two patches has norm <= eps. Its gradient is radial.
  double own = coefficients.diagonal;
  problem.coefficients.diagonal = 0;
  if (rows == 1) {
    own += coefficients.full + coefficients.intra + coefficients.inter_same;
    problem.coefficients = {0, 0, 0, 0};
  }
  double loss = problem.run(grad_x, grad_y);
  for (int64_t r = 0; r < rows; ++r) {
    if ((norms_x[r] == 0) != (norms_y[r] == 0)) loss += own;
    loss += 0.0 * norms_x[r] * norms_y[r];  // NaN stays NaN even if every pair has weight 0
  }
  if (grad_x) cut_x.denormalise(grad_x, x, line_x, norms_x, grad_x);
  if (grad_y) cut_y.denormalise(grad_y, y, line_y, norms_y, grad_y);
  return {loss, grad_student, grad_teacher};
}

std::optional<Tensor> mask_of(const std::vector<Tensor>& masks, int64_t stage) {
  return masks.empty() ? std::nullopt : std::optional<Tensor>(masks[stage]);
}

}  // namespace

std::tuple<Tensor, std::vector<Tensor>> local_correlation(
    const std::vector<Tensor>& students, const std::vector<Tensor>& teachers, const std::vector<Tensor>& masks,
    const std::vector<int64_t>& k, const std::vector<double>& weights, bool mean, const std::vector<int64_t>& plans,
    std::optional<double> threshold, bool resize, double eps, const std::vector<int64_t>& wanted, bool) {
  check_local_correlation(students, teachers, masks, k, weights, plans, threshold, resize, eps, wanted);
  const int64_t stages = students.size();
  std::vector<Tensor> grads(2 * stages);
  double loss = 0;
  bool any_double = false;
  for (int64_t s = 0; s < stages; ++s) {
    const Partition student(Shape::of(students[s]), k[s], mask_of(masks, s), threshold, resize);
    const Partition teacher(Shape::of(teachers[s]), k[s], mask_of(masks, s), threshold, resize);
    const auto run = [&](auto type) {
      const auto coefficients = coefficients_of<Coefficients>(weights, mean, student.images, student.positions());
      return run_stage<decltype(type)>(students[s], teachers[s], student, teacher, eps, coefficients,
                                       plan_of(&plans[3 * s]), wanted[s], wanted[stages + s]);
    };
    const bool is_double =
        students[s].scalar_type() == ScalarType::Double || teachers[s].scalar_type() == ScalarType::Double;
    const Result result = is_double ? run(double()) : run(float());
    any_double = any_double || is_double;
    loss += result.loss;
    grads[s] = result.grad_student;
    grads[stages + s] = result.grad_teacher;
  }
  return {any_double ? new_scalar<double>(students[0], loss) : new_scalar<float>(students[0], loss), grads};
}

std::vector<Tensor> local_correlation_backward(const Tensor& grad_loss, const std::vector<Tensor>& grad_rows,
                                               const std::vector<int64_t>& shapes, const std::vector<Tensor>& masks,
                                               const std::vector<int64_t>& k, std::optional<double> threshold,
                                               bool resize) {
  check_local_correlation_backward(grad_loss, grad_rows, shapes, masks, k, threshold, resize);
  const double scale =
      with_compute_type(grad_loss, [&](auto type) { return double(*grad_loss.const_data_ptr<decltype(type)>()); });
  const int64_t stages = k.size();
  std::vector<Tensor> grads;
  for (int64_t i = 0; i < 2 * stages; ++i) {
    const Tensor rows = compact(grad_rows[i]);
    grads.push_back(with_compute_type(rows, [&](auto type) {
      using T = decltype(type);
      if (rows.numel() == 0) return new_compact(rows, {0});
      const int64_t side = k[i % stages];
      const Shape shape = Shape::read(rows.size(0) / (side * side), &shapes[i * Shape::kNumbers]);
      const Partition partition(shape, side, mask_of(masks, i % stages), threshold, resize);
      return partition.unpack(rows.const_data_ptr<T>(), T(scale), rows);
    }));
  }
  return grads;
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  // masks: empty, or one per stage. weights: for pairs of one image, pairs of one position, and other pairs. mean: divide each
  // sum by its number of pairs. plans: three form codes per stage. wanted: a flag for the student's features of every stage,
  // then for the teacher's. grad_rows: in the same order, the gradient of the patches before the normalisation.
  m.def(
      "local_correlation(Tensor[] students, Tensor[] teachers, Tensor[] masks, int[] k, float[] weights,"
      " bool mean, int[] plans, float? threshold, bool resize, float eps, int[] wanted, bool tf32=False)"
      " -> (Tensor loss, Tensor[] grad_rows)");
  m.def(
      "local_correlation_backward(Tensor grad_loss, Tensor[] grad_rows, int[] shapes, Tensor[] masks, int[] k,"
      " float? threshold, bool resize) -> Tensor[] grad_features");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("local_correlation", TORCH_BOX(&kdkernels::local_correlation));
  m.impl("local_correlation_backward", TORCH_BOX(&kdkernels::local_correlation_backward));
}
