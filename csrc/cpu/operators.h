// The CPU implementations of the native operators; csrc/library.cpp has their schemas and registers them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace kdkernels {

using torch::stable::Tensor;

// Loss, gradient to the student, gradient to the teacher; a gradient that is not wanted is empty.
std::tuple<Tensor, Tensor, Tensor> kd(const Tensor& student, const Tensor& teacher, double temperature, double scale,
                                      bool grad_student, bool grad_teacher);

// The inter-class correlation map of b x K logits, and its gradient.
Tensor icc_map(const Tensor& logits);

Tensor icc_map_backward(const Tensor& grad_map, const Tensor& logits);

// Loss, gradient to the student, gradient to the teacher; a gradient that is not wanted is empty.
std::tuple<Tensor, Tensor, Tensor> icc_loss(const Tensor& student, const Tensor& teacher, bool per_sample, double scale,
                                            bool grad_student, bool grad_teacher);

std::tuple<Tensor, Tensor> patches(const Tensor& features, int64_t k, const std::optional<Tensor>& mask,
                                   std::optional<double> threshold, bool resize, double eps);

Tensor patches_backward(const Tensor& grad_rows, const Tensor& rows, const Tensor& norms,
                        const std::vector<int64_t>& shape, int64_t k, const std::optional<Tensor>& mask,
                        std::optional<double> threshold, bool resize);

std::tuple<Tensor, Tensor, Tensor> congruence(const Tensor& x, const Tensor& y, int64_t positions,
                                              const std::vector<double>& coefficients, const std::vector<int64_t>& plan,
                                              bool want_x, bool want_y, bool tf32);

// kernel: its number in kdkernels/ops/correlation_congruence. plan: three form codes, for the bilinear kernel.
std::tuple<Tensor, Tensor, Tensor> correlation_congruence(const Tensor& student, const Tensor& teacher, int64_t kernel,
                                                          double gamma, int64_t order, bool normalize, double scale,
                                                          const std::vector<int64_t>& plan, bool grad_student,
                                                          bool grad_teacher, bool tf32);

std::tuple<Tensor, Tensor, Tensor> similarity_preserving(const Tensor& student, const Tensor& teacher, double scale,
                                                         bool feature, bool grad_student, bool grad_teacher);

std::tuple<Tensor, std::vector<Tensor>> local_correlation(
    const std::vector<Tensor>& students, const std::vector<Tensor>& teachers, const std::vector<Tensor>& masks,
    const std::vector<int64_t>& k, const std::vector<double>& weights, bool mean, const std::vector<int64_t>& plans,
    std::optional<double> threshold, bool resize, double eps, const std::vector<int64_t>& wanted, bool tf32);

std::vector<Tensor> local_correlation_backward(const Tensor& grad_loss, const std::vector<Tensor>& grad_rows,
                                               const std::vector<int64_t>& shapes, const std::vector<Tensor>& masks,
                                               const std::vector<int64_t>& k, std::optional<double> threshold,
                                               bool resize);

// L x b x b products of the samples of L layers; the gradients are b x depth, in the features' element type.
Tensor gram(const std::vector<Tensor>& features, bool tf32);

std::vector<Tensor> gram_backward(const Tensor& grad, const std::vector<Tensor>& features, bool tf32);

// Loss, and the errors of every sample and pair, b x s_L x t_L, times `scale`: the loss's gradient in the weights.
std::tuple<Tensor, Tensor> feature_mse(const std::vector<Tensor>& projected, const std::vector<Tensor>& targets,
                                       const Tensor& weights, double scale);

std::vector<Tensor> feature_mse_backward(const Tensor& grad_loss, const std::vector<Tensor>& projected,
                                         const std::vector<Tensor>& targets, const Tensor& weights, double scale,
                                         const std::vector<int64_t>& wanted);

// A convolution with 3 x 3 weights over a border of one zero, or the gradient of its inputs; and the gradient of its weights.
Tensor convolution(const Tensor& maps, const Tensor& weight, bool transposed);

Tensor convolution_weight(const Tensor& maps, const Tensor& grad, bool channels_last);

// Loss, gradient to the student, gradient to the teacher; a gradient that is not wanted is empty.
std::tuple<Tensor, Tensor, Tensor> rkd(const Tensor& student, const Tensor& teacher, double distance_weight,
                                       double angle_weight, bool grad_student, bool grad_teacher);

}  // namespace kdkernels
