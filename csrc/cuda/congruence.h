// Launches the kernels of congruence, for one pair of row sets or for the pairs of all stages.
#pragma once

#include "comparison.cuh"
#include "congruence.cuh"
#include "host.h"

namespace kdkernels {

// The space in which a loss is computed, numbered as in kdkernels/ops/congruence/plan.py, which chooses it.
enum class Form : int64_t { gram = 0, feature = 7 };

struct Plan {
  Form full, intra, inter_same;
};

inline Coefficients coefficients_of(const double* c) { return {c[0], c[1], c[2], c[3]}; }
inline Plan plan_of(const int64_t* codes) { return {Form(codes[0]), Form(codes[1]), Form(codes[2])}; }

// The compact rows of one network, and their gradient, which is null if it is not wanted. Half-precision rows have
// factors as in Comparison. Their gradient must not be multiplied by anything else.
template <typename T, typename E = T>
struct Side {
  const E* rows;
  int64_t width;
  T* grad;
  const T* factors;
};

// `count` sets of `size` rows. Row r of set b is row b * step + r * stride of all rows.
struct Sets {
  int64_t count, size, step, stride;
};

// Losses of any number of pairs of row sets. Products are collected by their dependencies. Products that do not depend
// on each other share a launch. Half-precision rows, with numbers E, have only kernel comparisons.
template <typename T, typename E = T>
class Congruences {
 public:
  // tf32: whether products in the Gram form may be rounded to tf32. The feature form subtracts large sums and needs
  // more digits.
  Congruences(const OnDevice& device, const Tensor& like, bool tf32) : device_(device), like_(like), tf32_(tf32) {}

  // Row r of x and y belongs to image r / positions and position r % positions. For half-precision rows, the plan of
  // the sum over all pairs must be the Gram form, and its coefficient must not be 0.
  void add(int64_t rows, int64_t positions, const Side<T, E>& x, const Side<T, E>& y, const Coefficients& coefficients,
           const Plan& plan);

  // Sum the squared differences of two kernel matrices instead. The memory that `kernel` names is the same for every
  // strip.
  void add_kernel(int64_t rows, const Side<T, E>& x, const Side<T, E>& y, const Comparison<T, E>& kernel);

  // Launch everything. The blocks leave `parts()` numbers on the device, and their sum is the loss.
  void run();
  int64_t parts() const { return parts_count_; }
  const double* part_data() const { return data_of<double>(parts_); }

 private:
  // A round of launches. Its fields run in this order, and each field is one launch.
  struct Round {
    Problems<Gram<T>> grams;
    Problems<Comparison<T, E>> comparisons;
    Problems<Product<T>> products;
    Problems<Fold<T>> folds;
    Problems<Product<T, E>> gradients;   // S X and X P
    Problems<Product<T, E>> transposed;  // Sᵀ X
    Problems<Diagonal<T>> diagonals;
  };

  Round& round(size_t i) {
    if (rounds_.size() <= i) rounds_.resize(i + 1);
    return rounds_[i];
  }
  T* new_memory(int64_t count);
  int64_t new_parts(int64_t count) { return std::exchange(parts_count_, parts_count_ + count); }

  // A strip of a symmetric matrix S: `lines` rows from `first` on, and the columns from `first` to the end.
  struct Strip {
    T* entries;
    int64_t first, lines, columns, count;  // count: the number of sets, one matrix each
  };
  // S X for the rows of the strip, and Sᵀ X for the rows below it.
  void add_gradient(Round& round, const Sets& sets, const Strip& strip, const Side<T, E>& side, T scale);

  // In any form, for rows that are not half precision.
  void add_sums(int64_t rows, int64_t positions, const Side<T>& x, const Side<T>& y, const Coefficients& coefficients,
                const Plan& plan);
  void add_gram(const Sets& sets, int64_t positions, const Side<T>& x, const Side<T>& y, const Coefficients& weights);
  void add_feature(const Sets& sets, const Side<T>& x, const Side<T>& y, double coefficient);
  T* add_norm(Round& round, const Sets& sets, const Side<T>& a, const Side<T>& b, double coefficient, bool keep,
              T** transposed);
  void add_diagonal(int64_t rows, const Side<T>& x, const Side<T>& y, double coefficient);

  const OnDevice& device_;
  const Tensor& like_;
  const bool tf32_;
  std::vector<Tensor> memory_;
  std::vector<Round> rounds_;
  size_t next_ = 0;       // the round of the current pair
  bool written_ = false;  // whether its gradients have been written
  int64_t parts_count_ = 0;
  Tensor parts_;
};

}  // namespace kdkernels
