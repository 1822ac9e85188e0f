// Launches the kernels of congruence, for one pair of row sets or for those of every stage.
#pragma once

#include "comparison.cuh"
#include "congruence.cuh"
#include "host.h"

namespace kdkernels {

// In which space a loss is computed, by the numbers of kdkernels/ops/congruence/plan.py. Mixed becomes the cheaper of the two.
enum class Form : int64_t { gram = 0, mixed = 1, feature = 7 };

struct Plan {
  Form full, intra, inter_same;
};

// Mixed is settled for a loss of so many rows and widths.
Form settled(Form form, int64_t rows, int64_t x, int64_t y);

inline Coefficients coefficients_of(const double* c) { return {c[0], c[1], c[2], c[3]}; }
inline Plan plan_of(const int64_t* codes) { return {Form(codes[0]), Form(codes[1]), Form(codes[2])}; }

// The rows of one network, one after the other, and where their gradient goes; nowhere if it is null. Rows of half precision
// have factors as Comparison does, and their gradient is to be multiplied by nothing else.
template <typename T, typename E = T>
struct Side {
  const E* rows;
  int64_t width;
  T* grad;
  const T* factors;
};

// `count` sets of `size` rows: row r of set b is row b * step + r * stride of all.
struct Sets {
  int64_t count, size, step, stride;
};

// Losses of any number of pairs of row sets. Their products are collected by the order in which they depend on each other, and
// those that do not share a launch. Rows of half precision, numbers E, are compared by their kernels alone.
template <typename T, typename E = T>
class Congruences {
 public:
  // tf32: whether products in the Gram form may be rounded to it. What the feature form subtracts needs more.
  Congruences(const OnDevice& device, const Tensor& like, bool tf32) : device_(device), like_(like), tf32_(tf32) {}

  // Row r of x and y belongs to image r / positions and position r % positions. Rows of half precision must have the Gram form as
  // their plan for the sum over all pairs, and a coefficient for it.
  void add(int64_t rows, int64_t positions, const Side<T, E>& x, const Side<T, E>& y, const Coefficients& coefficients,
           const Plan& plan);

  // Sum the squared differences of two kernel matrices instead; what `kernel` names is the same for every strip.
  void add_kernel(int64_t rows, const Side<T, E>& x, const Side<T, E>& y, const Comparison<T, E>& kernel);

  // Launch everything. The sum of `parts()` numbers, which the blocks leave on the device, is the loss.
  void run();
  int64_t parts() const { return parts_count_; }
  const double* part_data() const { return data_of<double>(parts_); }

 private:
  // What can run at the same time, in the order of its fields.
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

  // A strip of a symmetric matrix S: rows `first` on, `lines` of them, against the columns from there to the end.
  struct Strip {
    T* entries;
    int64_t first, lines, columns, count;  // of so many sets, one matrix each
  };
  // S X for the strip's rows and Sᵀ X for those below it.
  void add_gradient(Round& round, const Sets& sets, const Strip& strip, const Side<T, E>& side, T scale);

  // In whichever form, of rows that are not of half precision.
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
  size_t next_ = 0;       // round of the pair at hand
  bool written_ = false;  // whether its gradients hold something already
  int64_t parts_count_ = 0;
  Tensor parts_;
};

}  // namespace kdkernels
