// A sample of the CPU kernels against plain loops in double: matrix products of odd sizes, and exp. Prints the largest error
// of each. It needs no PyTorch at run time, so an emulator runs it on another machine.
#include <cmath>
#include <cstdio>
#include <random>
#include <type_traits>
#include <vector>

#include "exp.h"
#include "gemm.h"

extern "C" AOTITorchError torch_get_num_threads(uint32_t* count) {
  *count = 3;  // The products are then split into blocks, which run one after the other.
  return 0;
}

extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc body, void* context) {
  body(begin, end, context);
  return 0;
}

namespace {

using namespace kdkernels;
std::mt19937 generator{std::random_device{}()};

template <typename T>
std::vector<T> draw(int64_t count) {
  std::normal_distribution<T> normal;
  std::vector<T> values(count);
  for (T& value : values) value = normal(generator);
  return values;
}

// |found - exact| / |exact| in the Euclidean norm.
template <typename T>
double product_error(int64_t m, int64_t n, int64_t k, bool transposed) {
  const std::vector<T> a = draw<T>(m * k), b = draw<T>(k * n);
  std::vector<T> c(m * n, std::nan(""));
  const View<T> left{a.data(), k, 1};
  const View<T> right = transposed ? View<T>{b.data(), 1, k} : View<T>{b.data(), n, 1};
  gemm(m, n, k, left, right, c.data(), n);
  double error = 0, norm = 0;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double exact = 0;
      for (int64_t l = 0; l < k; ++l) exact += double(*left.at(i, l)) * double(*right.at(l, j));
      error += std::pow(c[i * n + j] - exact, 2);
      norm += exact * exact;
    }
  return std::sqrt(error / norm);
}

template <typename T>
double exp_error() {
  double worst = 0;
  for (double start = -80; start < 0; start += 0.37) {
    typename Vec<T>::type x;
    for (int lane = 0; lane < Vec<T>::size; ++lane) x[lane] = T(start - lane * 0.01);
    const auto found = exp_nonpositive<T>(x);
    for (int lane = 0; lane < Vec<T>::size; ++lane)
      worst = std::max(worst, std::abs(found[lane] / std::exp(double(x[lane])) - 1));
  }
  return worst;
}

template <typename T>
void report(const char* type) {
  double worst = 0;
  for (const bool transposed : {false, true})
    for (const auto [m, n, k] :
         {std::array<int64_t, 3>{1, 1, 1}, {7, 9, 5}, {64, 33, 300}, {97, 130, 31}, {5, 1100, 3}})
      worst = std::max(worst, product_error<T>(m, n, k, transposed));
  std::printf("%s product %.3g\n%s exp %.3g\n", type, worst, type, exp_error<T>());
}

}  // namespace

int main() {
  report<float>("float32");
  report<double>("float64");
}
