// The whole LKD loss, every stage of it, in one call: patches of both networks, their congruence, gradients of the features.
#include "congruence.h"
#include "operators.h"
#include "patches.h"
#include "workspace.h"

namespace kdkernels {
namespace {

template <typename T>
struct Patches {
  Partition partition;
  Buffer<T> rows, norms, grad;

  Patches(const Partition& partition, double eps, bool wanted)
      : partition(partition),
        rows(partition.rows() * partition.length()),
        norms(partition.rows()),
        grad(wanted ? partition.rows() * partition.length() : 0) {
    partition.pack(rows.data(), norms.data(), eps);
  }

  View<T> view() const { return {rows.data(), partition.length(), 1}; }
  T* wanted_grad() const { return grad.size() ? grad.data() : nullptr; }
  Tensor unpack() const {
    if (!grad.size()) return new_compact(partition.features, {0}, kScalarType<T>);
    return partition.unpack(grad.data(), rows.data(), norms.data(), kScalarType<T>);
  }
};

struct Result {
  double loss;
  Tensor grad_student, grad_teacher;
};

template <typename T>
Result run_stage(const Partition& student, const Partition& teacher, double eps, const Coefficients& coefficients,
                 const Plan& plan, bool want_student, bool want_teacher) {
  const Patches<T> x(student, eps, want_student), y(teacher, eps, want_teacher);
  Congruence<T> problem{x.view(),          y.view(),           student.rows(), student.length(),
                        teacher.length(), student.positions(), coefficients,   plan};
  // D_rr of unit rows is 0, or ±1 where one network's patch is dead and the other's is not; its gradient is radial.
  problem.coefficients.diagonal = 0;
  double loss = problem.run(x.wanted_grad(), y.wanted_grad());
  for (int64_t r = 0; r < student.rows(); ++r)
    if ((x.norms.data()[r] == 0) != (y.norms.data()[r] == 0)) loss += coefficients.diagonal;
  return {loss, x.unpack(), y.unpack()};
}

}  // namespace

std::tuple<Tensor, std::vector<Tensor>> local_correlation(
    const std::vector<Tensor>& students, const std::vector<Tensor>& teachers, const std::vector<Tensor>& masks,
    const std::vector<int64_t>& k, const std::vector<double>& coefficients, const std::vector<int64_t>& plans,
    std::optional<double> threshold, bool resize, double eps, const std::vector<int64_t>& wanted) {
  const int64_t stages = students.size();
  std::vector<Tensor> grads(2 * stages);
  double loss = 0;
  bool any_double = false;
  for (int64_t s = 0; s < stages; ++s) {
    const auto mask = masks.empty() ? std::nullopt : std::optional<Tensor>(masks[s]);
    const Partition student(students[s], k[s], mask, threshold, resize);
    const Partition teacher(teachers[s], k[s], mask, threshold, resize);
    const auto run = [&](auto type) {
      return run_stage<decltype(type)>(student, teacher, eps, coefficients_of(&coefficients[4 * s]), plan_of(&plans[3 * s]),
                                       wanted[s], wanted[stages + s]);
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

}  // namespace kdkernels
