// Every native operator: its schema, and where its CPU implementation is registered.
#include <torch/csrc/stable/library.h>

#include "cpu/operators.h"

STABLE_TORCH_LIBRARY(kdkernels, m) {
  // Gradients are those of the loss, in float32 (float64 for float64 inputs); empty when not wanted. tf32: whether factors of
  // float32 products may be rounded to it, which the CPU never does.
  m.def(
      "kd(Tensor student, Tensor teacher, float temperature, float scale, bool grad_student, bool grad_teacher)"
      " -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)");
  m.def("icc_map(Tensor logits) -> Tensor");
  m.def("icc_map_backward(Tensor grad_map, Tensor logits) -> Tensor");
  // KL of the K x K maps, or of every sample's own, averaged; times scale.
  m.def(
      "icc_loss(Tensor student, Tensor teacher, bool per_sample, float scale, bool grad_student, bool grad_teacher)"
      " -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)");
  // Unit patch vectors and the norms they were divided by, 0 for a dead patch. Shapes of features are four numbers: channels,
  // height, width, and whether the channels are neighbours in memory.
  m.def(
      "patches(Tensor features, int k, Tensor? mask, float? threshold, bool resize, float eps)"
      " -> (Tensor rows, Tensor norms)");
  m.def(
      "patches_backward(Tensor grad_rows, Tensor rows, Tensor norms, int[] shape, int k, Tensor? mask,"
      " float? threshold, bool resize) -> Tensor grad_features");
  // coefficients: those of the sums over all pairs, one image's, one position's, the diagonal; plan: three form codes.
  m.def(
      "congruence(Tensor x, Tensor y, int positions, float[] coefficients, int[] plan, bool grad_x, bool grad_y,"
      " bool tf32=False) -> (Tensor loss, Tensor grad_x, Tensor grad_y)");
  // kernel: 0 taylor_rbf, 1 rbf, 2 bilinear, 3 mmd; plan: three form codes, for the bilinear one.
  m.def(
      "correlation_congruence(Tensor student, Tensor teacher, int kernel, float gamma, int order, bool normalize,"
      " float scale, int[] plan, bool grad_student, bool grad_teacher, bool tf32=False)"
      " -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)");
  m.def(
      "similarity_preserving(Tensor student, Tensor teacher, float scale, bool feature, bool grad_student,"
      " bool grad_teacher) -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)");
  // masks: none, or one per stage. weights: of pairs of one image, of one position, and of neither; mean: each sum is divided by
  // its number of pairs. plans: three form codes per stage. wanted and grad_rows: a flag and the gradient of the patches before
  // normalisation for the student's features of every stage, then for the teacher's.
  m.def(
      "local_correlation(Tensor[] students, Tensor[] teachers, Tensor[] masks, int[] k, float[] weights,"
      " bool mean, int[] plans, float? threshold, bool resize, float eps, int[] wanted, bool tf32=False)"
      " -> (Tensor loss, Tensor[] grad_rows)");
  m.def(
      "local_correlation_backward(Tensor grad_loss, Tensor[] grad_rows, int[] shapes, Tensor[] masks, int[] k,"
      " float? threshold, bool resize) -> Tensor[] grad_features");
  // Products of every pair of samples, L x b x b, each layer's features in the order of its dimensions. The gradients are
  // b x depth in that order.
  m.def("gram(Tensor[] features, bool tf32=False) -> Tensor matrices");
  m.def("gram_backward(Tensor grad_matrices, Tensor[] features, bool tf32=False) -> Tensor[] grad_features");
  // scale * Σ weights ∘ errors of pairs of maps, in the order of the weights' last two dimensions, and scale * errors. wanted: a
  // flag for every projected map, then for every target; gradients have their maps' element type.
  m.def(
      "feature_mse(Tensor[] projected, Tensor[] targets, Tensor weights, float scale) -> (Tensor loss, Tensor errors)");
  m.def(
      "feature_mse_backward(Tensor grad_loss, Tensor[] projected, Tensor[] targets, Tensor weights, float scale,"
      " int[] wanted) -> Tensor[] grads");
  // Of maps whose channels, a multiple of 32, are neighbours in memory, and a border of one zero: with 3 x 3 weights, or transposed
  // the gradient of its inputs from that of its outputs; and the gradient of the weights.
  m.def("convolution(Tensor maps, Tensor weight, bool transposed) -> Tensor");
  m.def("convolution_weight(Tensor maps, Tensor grad, bool channels_last) -> Tensor grad_weight");
  m.def(
      "rkd(Tensor student, Tensor teacher, float distance_weight, float angle_weight, bool grad_student,"
      " bool grad_teacher) -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("kd", TORCH_BOX(&kdkernels::kd));
  m.impl("icc_map", TORCH_BOX(&kdkernels::icc_map));
  m.impl("icc_map_backward", TORCH_BOX(&kdkernels::icc_map_backward));
  m.impl("icc_loss", TORCH_BOX(&kdkernels::icc_loss));
  m.impl("patches", TORCH_BOX(&kdkernels::patches));
  m.impl("patches_backward", TORCH_BOX(&kdkernels::patches_backward));
  m.impl("congruence", TORCH_BOX(&kdkernels::congruence));
  m.impl("correlation_congruence", TORCH_BOX(&kdkernels::correlation_congruence));
  m.impl("similarity_preserving", TORCH_BOX(&kdkernels::similarity_preserving));
  m.impl("local_correlation", TORCH_BOX(&kdkernels::local_correlation));
  m.impl("local_correlation_backward", TORCH_BOX(&kdkernels::local_correlation_backward));
  m.impl("gram", TORCH_BOX(&kdkernels::gram));
  m.impl("gram_backward", TORCH_BOX(&kdkernels::gram_backward));
  m.impl("feature_mse", TORCH_BOX(&kdkernels::feature_mse));
  m.impl("feature_mse_backward", TORCH_BOX(&kdkernels::feature_mse_backward));
  m.impl("convolution", TORCH_BOX(&kdkernels::convolution));
  m.impl("convolution_weight", TORCH_BOX(&kdkernels::convolution_weight));
  m.impl("rkd", TORCH_BOX(&kdkernels::rkd));
}
