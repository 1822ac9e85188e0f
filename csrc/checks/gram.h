// What gram and gram_backward expect of their arguments.
#pragma once

#include "check.h"

namespace kdkernels {
namespace gram_checks {

inline void features(Check& check, const std::vector<Tensor>& features) {
  check.not_empty("features", features);
  const int64_t layers = features.size();
  for (int64_t l = 0; l < layers; ++l) {
    const Argument argument("features", l);
    check.tensor(argument, features[l], "b ...");
    const int64_t batch = features[l].size(0), depth = features[l].numel() / batch;
    check.fits(argument, {layers, batch, batch});
    check.fits(argument, {layers, depth});
    check.fits_gpu(argument, "samples", batch);
    check.fits_gpu(argument, "features of a sample", depth);
  }
}

}  // namespace gram_checks

inline void check_gram(const std::vector<Tensor>& features) {
  Check check("gram");
  gram_checks::features(check, features);
}

inline void check_gram_backward(const Tensor& grad_matrices, const std::vector<Tensor>& features) {
  Check check("gram_backward");
  gram_checks::features(check, features);
  check.bind("L", features.size());
  check.tensor("grad_matrices", grad_matrices, "L b b", Types::full_float);
  // Layers in float32 take a float64 gradient, because autograd leaves out float64 layers that need no gradient.
  for (size_t i = 0; i < features.size(); ++i)
    if (features[i].scalar_type() == torch::headeronly::ScalarType::Double)
      check.same_type("grad_matrices", grad_matrices, {"features", int64_t(i)}, features[i]);
}

}  // namespace kdkernels
