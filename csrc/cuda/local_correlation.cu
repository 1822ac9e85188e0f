#include "local_correlation.cuh"

#include <map>

#include "../checks/local_correlation.h"
#include "../relations.h"
#include "congruence.h"
#include "patches.h"

namespace kdkernels {
namespace {

// One network in one stage. Its rows have numbers E.
template <typename T, typename E>
struct Network {
  Cut<T> cut;
  Tensor memory;  // rows, then norms, then factors
  E* rows;
  T *norms, *factors = nullptr;
  Tensor grad;

  Network(Patching<T, E>& patching, const Tensor& features, int64_t k, const Mask& mask, bool resize, double eps,
          bool wanted, const Tensor& like)
      : cut(patching.cut(Shape::of(features), k, mask, resize, features)) {
    const int64_t count = features.size(0) * k * k, length = cut.length();
    const int64_t of_rows = numbers_for<T, E>(count * length);
    memory = new_compact(like, {of_rows + 2 * count}, kScalarType<T>);
    rows = reinterpret_cast<E*>(data_of<T>(memory));
    norms = data_of<T>(memory) + of_rows;
    if constexpr (kIsHalf<E>) factors = norms + count;
    grad = new_compact(like, wanted ? std::vector<int64_t>{count, length} : std::vector<int64_t>{0}, kScalarType<T>);
    patching.pack(cut, features, rows, norms, factors, eps);
  }

  Side<T, E> side() const { return {rows, cut.length(), data_of<T>(grad), factors}; }
};

std::optional<Tensor> mask_of(const std::vector<Tensor>& masks, int64_t stage) {
  return masks.empty() ? std::nullopt : std::optional<Tensor>(masks[stage]);
}

struct Problem {
  const std::vector<Tensor>&students, &teachers, &masks;
  const std::vector<int64_t>& k;
  const std::vector<double>& weights;
  bool mean;
  const std::vector<int64_t>& plans;
  std::optional<double> threshold;
  bool resize;
  double eps;
  const std::vector<int64_t>& wanted;
  bool tf32;

  Coefficients coefficients(int64_t stage) const {
    return coefficients_of<Coefficients>(weights, mean, students[stage].size(0), k[stage] * k[stage]);
  }

  bool in_double(int64_t stage) const {
    return students[stage].scalar_type() == ScalarType::Double || teachers[stage].scalar_type() == ScalarType::Double;
  }

  // Return whether rows keep half precision: elements are only moved, and the Gram form multiplies them. The products
  // of the feature form run along the rows, whose norms differ.
  bool kept(int64_t stage) const {
    const Tensor &student = students[stage], &teacher = teachers[stage];
    const int64_t side = k[stage];
    const auto whole = [&](const Tensor& maps) { return maps.size(2) % side == 0 && maps.size(3) % side == 0; };
    return student.scalar_type() == teacher.scalar_type() && masks.empty() && whole(student) && whole(teacher) &&
           coefficients(stage).full != 0 && Form(plans[3 * stage]) == Form::gram;
  }

  // The type of the rows. Half precision is kept in all stages or in none, because it is not worth separate launches.
  std::vector<Element> row_types() const {
    std::vector<Element> types, floats;
    bool alike = true;
    for (size_t s = 0; s < students.size(); ++s) {
      floats.push_back(in_double(s) ? Element::float64 : Element::float32);
      types.push_back(in_double(s) || !kept(s) ? floats[s] : element_of(students[s]));
      alike = alike && types[s] == types[0];
    }
    return alike ? types : floats;
  }
};

// Write or add the loss of some stages to `loss`, and compute their gradients. The rows have numbers E.
template <typename T, typename E = T>
void run(const Problem& p, const std::vector<int64_t>& stages, const OnDevice& device, const Tensor& loss,
         bool accumulate, std::vector<Tensor>& grads) {
  const int64_t count = p.students.size();
  Patching<T, E> patching(device);
  Congruences<T, E> congruences(device, p.students[0], p.tf32);
  std::vector<Network<T, E>> networks;
  Loss<T> ending{};
  Group<Projection<T, E>> projections;
  int longest = 0;
  for (const int64_t s : stages) {
    const Mask mask{mask_of(p.masks, s), p.threshold};
    for (const bool of_teacher : {false, true}) {
      const Tensor& features = of_teacher ? p.teachers[s] : p.students[s];
      const int64_t slot = s + (of_teacher ? count : 0);
      const Network<T, E>& network =
          networks.emplace_back(patching, features, p.k[s], mask, p.resize, p.eps, p.wanted[slot], p.students[0]);
      grads[slot] = network.grad;
      longest = std::max(longest, network.cut.length());
      T* const grad = data_of<T>(network.grad);
      const int64_t rows = features.size(0) * network.cut.positions();
      if (grad) projections.add({grad, network.rows, network.norms, network.factors, grad, network.cut.length()}, rows);
    }
    const Network<T, E>&x = networks[networks.size() - 2], &y = networks.back();
    const int64_t rows = p.students[s].size(0) * x.cut.positions();
    Coefficients coefficients = p.coefficients(s);
    ending.dead[ending.stages++] = {x.norms, y.norms, rows, coefficients.diagonal};
    coefficients.diagonal = 0;  // its gradient is radial, and the normalisation removes it
    congruences.add(rows, x.cut.positions(), x.side(), y.side(), coefficients, plan_of(&p.plans[3 * s]));
  }
  patching.run();
  congruences.run();
  ending.parts = congruences.part_data();
  ending.count = congruences.parts();
  ending.in_double = loss.scalar_type() == ScalarType::Double;
  ending.result = ending.in_double ? static_cast<void*>(data_of<double>(loss)) : data_of<float>(loss);
  ending.accumulate = accumulate;
  launch(finish_kernel<T, E>, projections.blocks() + 1, threads_for(longest, 4), 0, device.stream, projections, ending);
}

}  // namespace

std::tuple<Tensor, std::vector<Tensor>> local_correlation(
    const std::vector<Tensor>& students, const std::vector<Tensor>& teachers, const std::vector<Tensor>& masks,
    const std::vector<int64_t>& k, const std::vector<double>& weights, bool mean, const std::vector<int64_t>& plans,
    std::optional<double> threshold, bool resize, double eps, const std::vector<int64_t>& wanted, bool tf32) {
  check_local_correlation(students, teachers, masks, k, weights, plans, threshold, resize, eps, wanted);
  const Problem problem{students, teachers, masks, k, weights, mean, plans, threshold, resize, eps, wanted, tf32};
  const OnDevice device(students[0]);
  const std::vector<Element> types = problem.row_types();
  std::map<Element, std::vector<int64_t>> of_type;
  for (size_t s = 0; s < students.size(); ++s) of_type[types[s]].push_back(s);
  const Tensor loss =
      new_compact(students[0], {}, of_type.count(Element::float64) ? ScalarType::Double : ScalarType::Float);
  std::vector<Tensor> grads(2 * students.size());
  bool accumulate = false;
  for (const auto& [type, all] : of_type)
    for (size_t begin = 0; begin < all.size(); begin += kMostStages) {
      const auto first = all.begin() + begin;
      const std::vector<int64_t> stages(first, std::min(first + kMostStages, all.end()));
      const auto run_in = type == Element::float64    ? run<double>
                          : type == Element::bfloat16 ? run<float, BFloat16>
                          : type == Element::float16  ? run<float, Half>
                                                      : run<float>;
      run_in(problem, stages, device, loss, accumulate, grads);
      accumulate = true;
    }
  return {loss, grads};
}

std::vector<Tensor> local_correlation_backward(const Tensor& grad_loss, const std::vector<Tensor>& grad_rows,
                                               const std::vector<int64_t>& shapes, const std::vector<Tensor>& masks,
                                               const std::vector<int64_t>& k, std::optional<double> threshold,
                                               bool resize) {
  check_local_correlation_backward(grad_loss, grad_rows, shapes, masks, k, threshold, resize);
  const int64_t stages = k.size();
  const OnDevice device(grad_rows[0]);
  Patching<float> in_float(device);
  Patching<double> in_double(device);
  std::vector<Tensor> grads, compact_rows;  // the copies live until the kernels have been launched
  for (const Tensor& rows : grad_rows) compact_rows.push_back(compact(rows));
  for (int64_t i = 0; i < 2 * stages; ++i) {
    const Tensor& rows = compact_rows[i];
    const auto unpack = [&](auto& patching, auto type) {
      using T = decltype(type);
      if (rows.numel() == 0) return new_compact(rows, {0});
      const int64_t side = k[i % stages];
      const Shape shape = Shape::read(rows.size(0) / (side * side), &shapes[i * Shape::kNumbers]);
      const Cut<T> cut = patching.cut(shape, side, {mask_of(masks, i % stages), threshold}, resize, rows);
      return patching.unpack(cut, shape, rows.const_data_ptr<T>(), &grad_loss, rows);
    };
    grads.push_back(rows.scalar_type() == ScalarType::Double ? unpack(in_double, double()) : unpack(in_float, float()));
  }
  in_float.run();
  in_double.run();
  return grads;
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(KDKERNELS_NAMESPACE, KDKERNELS_DEVICE, m) {
  m.impl("local_correlation", TORCH_BOX(&kdkernels::local_correlation));
  m.impl("local_correlation_backward", TORCH_BOX(&kdkernels::local_correlation_backward));
}
