// Registers the CUDA implementations of the native operators, whose schemas are in csrc/library.cpp.
#include <torch/csrc/stable/library.h>

#include "../cpu/operators.h"

#ifdef KDKERNELS_EMULATED
STABLE_TORCH_LIBRARY_IMPL(kdkernels_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
#endif
  m.impl("kd", TORCH_BOX(&kdkernels::kd));
  m.impl("icc_map", TORCH_BOX(&kdkernels::icc_map));
  m.impl("icc_map_backward", TORCH_BOX(&kdkernels::icc_map_backward));
  m.impl("icc_loss", TORCH_BOX(&kdkernels::icc_loss));
  m.impl("patches", TORCH_BOX(&kdkernels::patches));
  m.impl("patches_backward", TORCH_BOX(&kdkernels::patches_backward));
  m.impl("congruence", TORCH_BOX(&kdkernels::congruence));
  m.impl("correlation_congruence", TORCH_BOX(&kdkernels::correlation_congruence));
  m.impl("local_correlation", TORCH_BOX(&kdkernels::local_correlation));
  m.impl("local_correlation_backward", TORCH_BOX(&kdkernels::local_correlation_backward));
  m.impl("gram", TORCH_BOX(&kdkernels::gram));
  m.impl("gram_backward", TORCH_BOX(&kdkernels::gram_backward));
  m.impl("feature_mse", TORCH_BOX(&kdkernels::feature_mse));
  m.impl("feature_mse_backward", TORCH_BOX(&kdkernels::feature_mse_backward));
}
