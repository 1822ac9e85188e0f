#include "local_correlation.cuh"

#include "congruence.h"
#include "patches.h"

namespace kdkernels {
namespace {

// One network at one stage.
template <typename T>
struct Network {
  Cut<T> cut;
  Tensor memory;  // rows, then norms
  T *rows, *norms;
  Tensor grad;

  Network(Patching<T>& patching, const Tensor& features, int64_t k, const Mask& mask, bool resize, double eps,
          bool wanted, const Tensor& like)
      : cut(patching.cut(Shape::of(features), k, mask, resize, features)) {
    const int64_t count = features.size(0) * k * k, length = cut.length();
    memory = new_compact(like, {count * (length + 1)}, kScalarType<T>);
    rows = data_of<T>(memory);
    norms = rows + count * length;
    grad = new_compact(like, wanted ? std::vector<int64_t>{count, length} : std::vector<int64_t>{0}, kScalarType<T>);
    patching.pack(cut, features, rows, norms, eps);
  }

  Side<T> side() const { return {rows, cut.length(), data_of<T>(grad)}; }
};

std::optional<Tensor> mask_of(const std::vector<Tensor>& masks, int64_t stage) {
  return masks.empty() ? std::nullopt : std::optional<Tensor>(masks[stage]);
}

struct Problem {
  const std::vector<Tensor>&students, &teachers, &masks;
  const std::vector<int64_t>& k;
  const std::vector<double>& coefficients;
  const std::vector<int64_t>& plans;
  std::optional<double> threshold;
  bool resize;
  double eps;
  const std::vector<int64_t>& wanted;

  bool in_double(int64_t stage) const {
    return students[stage].scalar_type() == ScalarType::Double || teachers[stage].scalar_type() == ScalarType::Double;
  }
};

// The loss of some stages, which is written or added to `loss`, and their gradients.
template <typename T>
void run(const Problem& p, const std::vector<int64_t>& stages, const OnDevice& device, const Tensor& loss,
         bool accumulate, std::vector<Tensor>& grads) {
  const int64_t count = p.students.size();
  Patching<T> patching(device);
  Congruences<T> congruences(device, p.students[0]);
  std::vector<Network<T>> networks;
  Loss<T> ending{};
  Group<Projection<T>> projections;
  int longest = 0;
  for (const int64_t s : stages) {
    const Mask mask{mask_of(p.masks, s), p.threshold};
    for (const bool of_teacher : {false, true}) {
      const Tensor& features = of_teacher ? p.teachers[s] : p.students[s];
      const int64_t slot = s + (of_teacher ? count : 0);
      const Network<T>& network =
          networks.emplace_back(patching, features, p.k[s], mask, p.resize, p.eps, p.wanted[slot], p.students[0]);
      grads[slot] = network.grad;
      longest = std::max(longest, network.cut.length());
      T* const grad = data_of<T>(network.grad);
      const int64_t rows = features.size(0) * network.cut.positions();
      if (grad) projections.add({grad, network.rows, network.norms, grad, network.cut.length()}, rows);
    }
    const Network<T>&x = networks[networks.size() - 2], &y = networks.back();
    const int64_t rows = p.students[s].size(0) * x.cut.positions();
    Coefficients coefficients = coefficients_of(&p.coefficients[4 * s]);
    ending.dead[ending.stages++] = {x.norms, y.norms, rows, coefficients.diagonal};
    coefficients.diagonal = 0;  // its gradient is radial, which the normalisation takes away
    congruences.add(rows, x.cut.positions(), x.side(), y.side(), coefficients, plan_of(&p.plans[3 * s]));
  }
  patching.run();
  congruences.run();
  ending.parts = congruences.part_data();
  ending.count = congruences.parts();
  ending.in_double = loss.scalar_type() == ScalarType::Double;
  ending.result = ending.in_double ? static_cast<void*>(data_of<double>(loss)) : data_of<float>(loss);
  ending.accumulate = accumulate;
  launch(finish_kernel<T>, projections.blocks() + 1, threads_for(longest, 4), 0, device.stream, projections, ending);
}

}  // namespace

std::tuple<Tensor, std::vector<Tensor>> local_correlation(
    const std::vector<Tensor>& students, const std::vector<Tensor>& teachers, const std::vector<Tensor>& masks,
    const std::vector<int64_t>& k, const std::vector<double>& coefficients, const std::vector<int64_t>& plans,
    std::optional<double> threshold, bool resize, double eps, const std::vector<int64_t>& wanted) {
  const Problem problem{students, teachers, masks, k, coefficients, plans, threshold, resize, eps, wanted};
  const OnDevice device(students[0]);
  std::vector<int64_t> of_type[2];  // stages in float32, in float64
  for (size_t s = 0; s < students.size(); ++s) of_type[problem.in_double(s)].push_back(s);
  const Tensor loss = new_compact(students[0], {}, of_type[true].empty() ? ScalarType::Float : ScalarType::Double);
  std::vector<Tensor> grads(2 * students.size());
  bool accumulate = false;
  for (const bool in_double : {false, true})
    for (size_t begin = 0; begin < of_type[in_double].size(); begin += kMostStages) {
      const auto first = of_type[in_double].begin() + begin;
      const std::vector<int64_t> stages(first, std::min(first + kMostStages, of_type[in_double].end()));
      (in_double ? run<double> : run<float>)(problem, stages, device, loss, accumulate, grads);
      accumulate = true;
    }
  return {loss, grads};
}

std::vector<Tensor> local_correlation_backward(const Tensor& grad_loss, const std::vector<Tensor>& grad_rows,
                                               const std::vector<int64_t>& shapes, const std::vector<Tensor>& masks,
                                               const std::vector<int64_t>& k, std::optional<double> threshold,
                                               bool resize) {
  const int64_t stages = k.size();
  const OnDevice device(grad_rows[0]);
  Patching<float> in_float(device);
  Patching<double> in_double(device);
  std::vector<Tensor> grads;
  for (int64_t i = 0; i < 2 * stages; ++i) {
    const Tensor& rows = grad_rows[i];
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
