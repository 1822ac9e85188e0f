#include "correlation_congruence.cuh"

#include <cmath>

#include "../checks/correlation_congruence.h"
#include "../relations.h"
#include "congruence.h"

namespace kdkernels {
namespace {

// One network: its rows, with numbers E, and their gradients.
template <typename T, typename E>
struct Network {
  int64_t count, width, pitch;
  // memory: rows, norms, terms, factors; grad_memory: [rows][pitch]; grad, the result: [rows][width]
  Tensor memory, grad_memory, grad;
  E* rows;
  T *norms, *terms, *factors = nullptr;

  Network(const Tensor& embeddings, Metric metric, bool wanted, const Tensor& like)
      : count(embeddings.size(0)), width(embeddings.size(1)) {
    constexpr int64_t together = 16 / sizeof(T);
    pitch = metric == Metric::rbf && !kIsHalf<E> ? width + together : width;
    const int64_t of_rows = numbers_for<T, E>(count * pitch);
    memory = new_compact(like, {of_rows + 3 * count}, kScalarType<T>);
    rows = reinterpret_cast<E*>(data_of<T>(memory));
    norms = data_of<T>(memory) + of_rows;
    terms = norms + count;
    if constexpr (kIsHalf<E>) factors = terms + count;
    grad = new_compact(like, wanted ? std::vector<int64_t>{count, width} : std::vector<int64_t>{0}, kScalarType<T>);
    grad_memory = wanted && pitch > width ? new_compact(like, {count, pitch}, kScalarType<T>) : grad;
  }
  Side<T, E> side() const { return {rows, pitch, data_of<T>(grad_memory), factors}; }
};

// The compute type is T, and rows have numbers E.
template <typename T, typename E = T>
std::tuple<Tensor, Tensor, Tensor> run(const Tensor& student, const Tensor& teacher, Metric metric, double gamma,
                                       int64_t order, bool normalize, double scale, const Plan& plan, bool grad_student,
                                       bool grad_teacher, bool tf32) {
  const OnDevice device(student);
  const Network<T, E> x(student, metric, grad_student, student), y(teacher, metric, grad_teacher, student);
  const int64_t count = x.count;
  const bool with_terms = metric == Metric::rbf || metric == Metric::mmd;

  Problems<Embedding<T, E>> embeddings;
  Problems<Centring<T>> centrings, squares;
  for (const auto& [network, tensor] : {std::pair(&x, &student), std::pair(&y, &teacher)}) {
    const int width = int(network->width), pitch = int(network->pitch);
    embeddings.push_back({{tensor->const_data_ptr(), element_of(*tensor), tensor->stride(0), tensor->stride(1), width,
                           pitch, normalize, network->rows, network->norms, network->factors,
                           with_terms ? network->terms : nullptr, metric == Metric::mmd},
                          count});
    if constexpr (!kIsHalf<E>) {
      if (metric != Metric::rbf || normalize) continue;
      const Centring<T> centring{network->rows, network->terms, count, width, pitch};
      centrings.push_back({centring, (network->width + kCentreColumns - 1) / kCentreColumns});
      squares.push_back({centring, count});
    }
  }
  launch(embed_kernel<T, E>, embeddings, kEmbeddingThreads, 0, device.stream);
  launch(centre_kernel<T>, centrings, kCentreColumns * kCentreLines, 0, device.stream);
  launch(square_kernel<T>, squares, kEmbeddingThreads, 0, device.stream);

  const Tensor loss = new_compact(student, {}, kScalarType<T>);
  Congruences<T, E> congruences(device, student, tf32);
  Tensor parts;
  const double* part_data = nullptr;
  int64_t part_count = count;
  if (metric == Metric::mmd) {
    parts = new_compact(student, {count}, ScalarType::Double);
    part_data = data_of<double>(parts);
    const Means<T> means{x.terms,      y.terms,     count, scale, data_of<T>(x.grad), data_of<T>(y.grad),
                         int(x.width), int(y.width)};
    launch(mean_kernel<T>, count, kEmbeddingThreads, 0, device.stream, means, data_of<double>(parts));
  } else {
    const Coefficients coefficients{scale, 0, 0, 0};
    if (metric == Metric::bilinear)
      congruences.add(count, 1, x.side(), y.side(), coefficients, plan);
    else
      congruences.add_kernel(count, x.side(), y.side(),
                             {metric, T(gamma), T(std::exp(-2 * gamma)), int(nonzero_terms(gamma, order)), 1,
                              int(x.width), int(y.width), coefficients, x.terms, y.terms});
    congruences.run();
    part_data = congruences.part_data();
    part_count = congruences.parts();
  }

  Group<Return<T, E>> returns;
  for (const Network<T, E>* network : {&x, &y})
    if (T* const out = data_of<T>(network->grad))
      returns.add({data_of<T>(network->grad_memory), network->rows, network->norms, network->factors, out,
                   int(network->width), int(network->pitch), normalize},
                  count);
  launch(return_kernel<T, E>, returns.blocks() + 1, kEmbeddingThreads, 0, device.stream, returns, part_data, part_count,
         data_of<T>(loss));
  return {loss, x.grad, y.grad};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> correlation_congruence(const Tensor& student, const Tensor& teacher, int64_t kernel,
                                                          double gamma, int64_t order, bool normalize, double scale,
                                                          const std::vector<int64_t>& plan, bool grad_student,
                                                          bool grad_teacher, bool tf32) {
  check_correlation_congruence(student, teacher, kernel, gamma, order, scale, plan, grad_teacher);
  const Metric metric = Metric(kernel);
  const auto as = [&](auto run) {
    return run(student, teacher, metric, gamma, order, normalize, scale, plan_of(plan.data()), grad_student,
               grad_teacher, tf32);
  };
  const ScalarType type = student.scalar_type();
  if (type == ScalarType::Double || teacher.scalar_type() == ScalarType::Double) return as(run<double>);
  // Half precision cannot be kept in three cases. Means are not products. Distances between rows that are not unit
  // vectors need moved rows. The products of the feature form run along the batch, where norms differ.
  const bool products_of_rows = metric == Metric::taylor_rbf || (metric == Metric::rbf && normalize) ||
                                (metric == Metric::bilinear && Form(plan[0]) == Form::gram);
  if (products_of_rows && type == teacher.scalar_type()) {
    if (type == ScalarType::BFloat16) return as(run<float, BFloat16>);
    if (type == ScalarType::Half) return as(run<float, Half>);
  }
  return as(run<float>);
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(KDKERNELS_NAMESPACE, KDKERNELS_DEVICE, m) {
  m.impl("correlation_congruence", TORCH_BOX(&kdkernels::correlation_congruence));
}
