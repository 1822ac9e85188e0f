// What feature_mse and feature_mse_backward expect of their arguments.
#pragma once

#include "check.h"

namespace kdkernels {
namespace feature_mse_checks {

inline void pairs(Check& check, const std::vector<Tensor>& projected, const std::vector<Tensor>& targets,
                  const Tensor& weights, double scale) {
  check.tensor("weights", weights, "b s_L t_L");
  const int64_t pairs = weights.size(1) * weights.size(2);
  check.holds("projected", projected, pairs, "maps, one for each of a sample's weights");
  check.holds("targets", targets, pairs, "maps, one for each of a sample's weights");
  for (int64_t p = 0; p < pairs; ++p) {
    const Argument own("projected", p), target("targets", p);
    check.forget(3);
    check.tensor(own, projected[p], "b c h_S w_S");
    check.tensor(target, targets[p], "b c h_T w_T");
    for (const auto& [argument, maps] : {std::pair(&own, &projected[p]), std::pair(&target, &targets[p])}) {
      const int64_t size = maps->numel() / maps->size(0);
      check.fits(*argument, {2, pairs, size});
      check.fits_gpu(*argument, "numbers in a sample", size);
    }
  }
  check.finite("scale", scale);
}

}  // namespace feature_mse_checks

inline void check_feature_mse(const std::vector<Tensor>& projected, const std::vector<Tensor>& targets,
                              const Tensor& weights, double scale) {
  Check check("feature_mse");
  feature_mse_checks::pairs(check, projected, targets, weights, scale);
}

inline void check_feature_mse_backward(const Tensor& grad_loss, const std::vector<Tensor>& projected,
                                       const std::vector<Tensor>& targets, const Tensor& weights, double scale,
                                       const std::vector<int64_t>& wanted) {
  Check check("feature_mse_backward");
  feature_mse_checks::pairs(check, projected, targets, weights, scale);
  check.tensor("grad_loss", grad_loss, "", Types::full_float);
  check.flags("wanted", wanted, 2 * int64_t(projected.size()));
}

}  // namespace kdkernels
