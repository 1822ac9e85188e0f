// Relational knowledge distillation from the b x b squared distances only: ⟨x_i − x_j, x_k − x_j⟩ is half of D_ij + D_kj −
// D_ik. Everything is computed in double, because this difference cancels where two samples are close. The kernel computes b³
// angles, one row at a time, and keeps none.
#include <cmath>
#include <vector>

#include "../checks/rkd.h"
#include "elements.h"
#include "gemm.h"
#include "lanes.h"
#include "parallel.h"
#include "tensors.h"
#include "workspace.h"

namespace kdkernels {
namespace {

using V = Vec<double>::type;
constexpr int64_t kLanes = Vec<double>::size;
constexpr int64_t kGrain = 1 << 16;  // elements that are worth another thread

double sum(V lanes) {
  return reduce<double>(lanes, [](V a, V b) { return a + b; });
}

// The derivative of the smooth L1 distance. The distance at u is slope * (u - slope / 2). NaN stays NaN.
V slope_of(V u) {
  const V one = V{} + 1;
  return u > one ? one : u < -one ? -one : u;
}

// One network's embeddings and the matrices computed from them. Lines of b x b matrices are padded with zeros to whole vectors.
class Network {
 public:
  int64_t batch, width, line;
  Buffer<double> rows, squares, inverse, slopes;  // embeddings, D, 1 / √D or 0, dL/dD

  Network(const Tensor& tensor, bool wanted)
      : batch(tensor.size(0)),
        width(tensor.size(1)),
        line(round_up(batch, kLanes)),
        rows(batch * width),
        squares(batch * line),
        inverse(batch * line),
        slopes(wanted ? batch * line : 0) {
    const Elements elements(tensor);
    std::fill_n(squares.data(), batch * line, 0.0);
    std::fill_n(inverse.data(), batch * line, 0.0);
    std::fill_n(slopes.data(), slopes.size(), 0.0);
    for (int64_t i = 0; i < batch; ++i) elements.read<double>(i, 0, width, rows.data() + i * width);
    parallel_blocks(batch, 1, 1 + kGrain / (batch * width), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) measure(i);
    });
  }

  bool wanted() const { return slopes.size() > 0; }

  // Return the mean of the distances that are not 0, and their number.
  std::pair<double, int64_t> mean_distance() const {
    double total = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < batch; ++i)
      for (int64_t j = 0; j < batch; ++j) {
        total += distance(i * line + j);
        count += squares.data()[i * line + j] != 0;
      }
    return {count && total != 0 ? total / count : 1.0, std::max<int64_t>(count, 1)};
  }

  double distance(int64_t entry) const { return squares.data()[entry] * inverse.data()[entry]; }

  // dL/dx_i = Σ_j 2 (S_ij + S_ji) (x_i − x_j), where S are the slopes.
  Tensor gradient(const Tensor& like, ScalarType type) {
    double* s = slopes.data();
    for (int64_t i = 0; i < batch; ++i)
      for (int64_t j = 0; j <= i; ++j) s[i * line + j] = s[j * line + i] = 2 * (s[i * line + j] + s[j * line + i]);
    const Tensor result = new_compact(like, {batch, width}, type);
    const Elements out(result);
    Buffer<double> product(batch * width);
    gemm<double>(batch, width, batch, {s, line, 1}, {rows.data(), width, 1}, product.data(), width, {-1, false, false});
    for (int64_t i = 0; i < batch; ++i) {
      double total = 0;
      for (int64_t j = 0; j < batch; ++j) total += s[i * line + j];
      double* row = product.data() + i * width;
      for (int64_t k = 0; k < width; ++k) row[k] += total * rows.data()[i * width + k];
      out.write<double>(i, 0, width, row);
    }
    return result;
  }

 private:
  // Compute distances from their definition, so that equal samples have distance 0 and close samples lose no digits. The
  // distance of sample i to itself, which is NaN unless the sample is finite, and to the half of the samples that follow it
  // cyclically.
  void measure(int64_t i) {
    for (int64_t after = 0; after <= batch / 2; ++after) {
      const int64_t j = (i + after) % batch;
      if (2 * after == batch && j < i) break;  // sample j computes this one
      const double *a = rows.data() + i * width, *b = rows.data() + j * width;
      V total = {};
      for_vectors<double>(0, width, [&](int64_t k, int64_t count) {
        const V difference = load_first<double>(a + k, count, 0.0) - load_first<double>(b + k, count, 0.0);
        total += difference * difference;
      });
      const double square = sum(total);
      squares.data()[i * line + j] = squares.data()[j * line + i] = square;
      inverse.data()[i * line + j] = inverse.data()[j * line + i] = square != 0 ? 1 / std::sqrt(square) : 0.0;
    }
  }
};

// weight * mean_ij ℓ(d_ij / mean(d)).
double distance_term(double weight, Network& student, Network& teacher) {
  const int64_t batch = student.batch, line = student.line;
  const auto [mean_s, count_s] = student.mean_distance();
  const auto [mean_t, count_t] = teacher.mean_distance();
  const double factor = weight / (double(batch) * batch);
  double loss = 0, along_s = 0, along_t = 0;  // Σ slope * distance: the gradient through the means
  const auto slope_at = [&](int64_t entry) {
    const double u = student.distance(entry) / mean_s - teacher.distance(entry) / mean_t;
    const double slope = u > 1 ? 1 : u < -1 ? -1 : u;
    return std::make_pair(slope, slope * (u - slope / 2));
  };
  const auto for_each = [&](const auto& f) {
    for (int64_t i = 0; i < batch; ++i)
      for (int64_t j = 0; j < batch; ++j) f(i * line + j);
  };
  for_each([&](int64_t entry) {
    const auto [slope, value] = slope_at(entry);
    loss += value;
    along_s += slope * student.distance(entry);
    along_t += slope * teacher.distance(entry);
  });
  const auto pass_on = [&](Network& network, double sign, double mean, int64_t count, double along) {
    if (network.wanted())
      for_each([&](int64_t entry) {
        if (network.squares.data()[entry] == 0) return;
        const double of_distance = slope_at(entry).first / mean - along / (mean * mean * count);
        network.slopes.data()[entry] += sign * factor * of_distance * network.inverse.data()[entry] / 2;
      });
  };
  pass_on(student, 1, mean_s, count_s, along_s);
  pass_on(teacher, -1, mean_t, count_t, along_t);
  return factor * loss;
}

// One network's angles at x_j between x_i and all x_k, with k in the lanes.
struct Angles {
  const double *from_i, *from_j, *inverse_j;  // D_ik, D_jk and 1 / √D_jk
  double square, inverse;                     // D_ij and 1 / √D_ij

  Angles(const Network& network, int64_t i, int64_t j)
      : from_i(network.squares.data() + i * network.line),
        from_j(network.squares.data() + j * network.line),
        inverse_j(network.inverse.data() + j * network.line),
        square(from_j[i]),
        inverse(inverse_j[i]) {}

  V scale(int64_t k) const { return inverse * load<double>(inverse_j + k); }
  V cosine(int64_t k) const { return (square + load<double>(from_j + k) - load<double>(from_i + k)) * 0.5 * scale(k); }
};

// The slopes of one network in row i of D, from the slopes of the angles. D_ij and D_jk have equal rank, and both are counted
// for x_i.
struct Slopes {
  double* row;
  V products = {}, cosines = {};

  void add(int64_t k, V slope, V scale, V cosine) {
    const V part = slope * scale;
    products += part;
    cosines += slope * cosine;
    store<double>(row + k, load<double>(row + k) - 0.5 * part);
  }
  void finish(int64_t j, double square) {
    if (square != 0) row[j] += sum(products) - sum(cosines) / square;
  }
};

// weight * mean_ijk ℓ(cos ∠ x_i x_j x_k). Each i has its own row of slopes, so no two threads write to the same place.
double angle_term(double weight, Network& student, Network& teacher) {
  const int64_t batch = student.batch, line = student.line;
  const double factor = weight / (double(batch) * batch * batch);
  std::vector<double> losses(batch);
  parallel_blocks(batch, 1, 1 + kGrain / (batch * batch), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      V loss = {};
      for (int64_t j = 0; j < batch; ++j) {
        const Angles s(student, i, j), t(teacher, i, j);
        Slopes of_student{student.slopes.data() + i * line}, of_teacher{teacher.slopes.data() + i * line};
        for (int64_t k = 0; k < line; k += kLanes) {
          const V cosine_s = s.cosine(k), cosine_t = t.cosine(k), u = cosine_s - cosine_t, slope = slope_of(u);
          loss += slope * (u - 0.5 * slope);
          if (student.wanted()) of_student.add(k, factor * slope, s.scale(k), cosine_s);
          if (teacher.wanted()) of_teacher.add(k, -factor * slope, t.scale(k), cosine_t);
        }
        if (student.wanted()) of_student.finish(j, s.square);
        if (teacher.wanted()) of_teacher.finish(j, t.square);
      }
      losses[i] = sum(loss);
    }
  });
  double loss = 0;
  for (const double row : losses) loss += row;
  return factor * loss;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> rkd(const Tensor& student, const Tensor& teacher, double distance_weight,
                                       double angle_weight, bool grad_student, bool grad_teacher) {
  check_rkd(student, teacher, distance_weight, angle_weight);
  Network own(student, grad_student), other(teacher, grad_teacher);
  const double loss = distance_term(distance_weight, own, other) + angle_term(angle_weight, own, other);
  const bool in_double = any_double({student, teacher});
  const ScalarType type = in_double ? ScalarType::Double : ScalarType::Float;
  return {in_double ? new_scalar<double>(student, loss) : new_scalar<float>(student, loss),
          grad_student ? own.gradient(student, type) : new_compact(student, {0}, type),
          grad_teacher ? other.gradient(teacher, type) : new_compact(teacher, {0}, type)};
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def(
      "rkd(Tensor student, Tensor teacher, float distance_weight, float angle_weight, bool grad_student,"
      " bool grad_teacher) -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("rkd", TORCH_BOX(&kdkernels::rkd)); }
