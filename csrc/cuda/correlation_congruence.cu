#include "correlation_congruence.cuh"

#include <cmath>

#include "congruence.h"

namespace kdkernels {
namespace {

// One network: its rows, and where their gradients go.
template <typename T>
struct Network {
  int64_t count, width, pitch;
  Tensor memory, grad_memory, grad;  // grad_memory has rows of `pitch`, the result rows of `width`
  T *rows, *norms, *terms;

  Network(const Tensor& embeddings, Metric metric, bool wanted, const Tensor& like)
      : count(embeddings.size(0)), width(embeddings.size(1)) {
    constexpr int64_t together = 16 / sizeof(T);
    pitch = metric == Metric::rbf ? width + together : width;
    memory = new_compact(like, {count * (pitch + 2)}, kScalarType<T>);
    rows = data_of<T>(memory);
    norms = rows + count * pitch;
    terms = norms + count;
    grad = new_compact(like, wanted ? std::vector<int64_t>{count, width} : std::vector<int64_t>{0}, kScalarType<T>);
    grad_memory = wanted && pitch > width ? new_compact(like, {count, pitch}, kScalarType<T>) : grad;
  }
  Side<T> side() const { return {rows, pitch, data_of<T>(grad_memory)}; }
};

template <typename T>
std::tuple<Tensor, Tensor, Tensor> run(const Tensor& student, const Tensor& teacher, Metric metric, double gamma,
                                       int64_t order, bool normalize, double scale, const Plan& plan, bool grad_student,
                                       bool grad_teacher) {
  const OnDevice device(student);
  const Network<T> x(student, metric, grad_student, student), y(teacher, metric, grad_teacher, student);
  const int64_t count = x.count;
  const bool with_terms = metric == Metric::rbf || metric == Metric::mmd;

  Problems<Embedding<T>> embeddings;
  Problems<Centring<T>> centrings, squares;
  for (const auto& [network, tensor] : {std::pair(&x, &student), std::pair(&y, &teacher)}) {
    const int width = int(network->width), pitch = int(network->pitch);
    embeddings.push_back(
        {{tensor->const_data_ptr(), element_of(*tensor), tensor->stride(0), tensor->stride(1), width, pitch, normalize,
          network->rows, network->norms, with_terms ? network->terms : nullptr, metric == Metric::mmd},
         count});
    if (metric != Metric::rbf || normalize) continue;
    const Centring<T> centring{network->rows, network->terms, count, width, pitch};
    centrings.push_back({centring, (network->width + kCentreColumns - 1) / kCentreColumns});
    squares.push_back({centring, count});
  }
  launch(embed_kernel<T>, embeddings, kEmbeddingThreads, 0, device.stream);
  launch(centre_kernel<T>, centrings, kCentreColumns * kCentreLines, 0, device.stream);
  launch(square_kernel<T>, squares, kEmbeddingThreads, 0, device.stream);

  const Tensor loss = new_compact(student, {}, kScalarType<T>);
  Congruences<T> congruences(device, student);
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
    if (metric == Metric::bilinear)
      congruences.add(count, 1, x.side(), y.side(), {scale, 0, 0, 0}, plan);
    else
      congruences.add_kernel(
          count, x.side(), y.side(),
          {metric, T(gamma), T(std::exp(-2 * gamma)), int(order), int(x.width), int(y.width), x.terms, y.terms, scale},
          T(4 * scale));
    congruences.run();
    part_data = congruences.part_data();
    part_count = congruences.parts();
  }

  Group<Return<T>> returns;
  for (const Network<T>* network : {&x, &y})
    if (T* const out = data_of<T>(network->grad))
      returns.add({data_of<T>(network->grad_memory), network->rows, network->norms, out, int(network->width),
                   int(network->pitch), normalize},
                  count);
  launch(return_kernel<T>, returns.blocks() + 1, kEmbeddingThreads, 0, device.stream, returns, part_data, part_count,
         data_of<T>(loss));
  return {loss, x.grad, y.grad};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> correlation_congruence(const Tensor& student, const Tensor& teacher, int64_t kernel,
                                                          double gamma, int64_t order, bool normalize, double scale,
                                                          const std::vector<int64_t>& plan, bool grad_student,
                                                          bool grad_teacher) {
  STD_TORCH_CHECK(student.dim() == 2 && teacher.dim() == 2 && student.size(0) == teacher.size(0) &&
                      student.numel() > 0 && teacher.numel() > 0,
                  "correlation_congruence: student must be n x d_S and teacher n x d_T, not empty");
  const bool in_double = student.scalar_type() == ScalarType::Double || teacher.scalar_type() == ScalarType::Double;
  return (in_double ? run<double> : run<float>)(student, teacher, Metric(kernel), gamma, order, normalize, scale,
                                                plan_of(plan.data()), grad_student, grad_teacher);
}

}  // namespace kdkernels
