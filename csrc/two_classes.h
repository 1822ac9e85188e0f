// The divergence of two probabilities, the label's and its complement's, for both devices.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define KDKERNELS_BOTH __host__ __device__
#else
#define KDKERNELS_BOTH
#endif

namespace kdkernels {

// KL of (p, 1 - p) from (q, 1 - q), where `teacher` and `student` are the margins log(p / (1 - p)) and log(q / (1 - q)). No
// probability is rounded before its complement is taken, so a p of 1 - 1e-40 has all its digits.
struct TwoClasses {
  double divergence = 0;
  double student = 0, teacher = 0;  // the slopes with respect to the margins: q - p, and p (1 - p) (teacher - student)

  KDKERNELS_BOTH TwoClasses() {}
  KDKERNELS_BOTH TwoClasses(double of_student, double of_teacher) {
    const double difference = of_teacher - of_student;
    const double p = sigmoid(of_teacher), q = sigmoid(of_student);
    const double p_rest = sigmoid(-of_teacher), q_rest = sigmoid(-of_student);
    divergence = term(p, q, log_ratio(-of_student, -of_teacher, p_rest, difference)) +
                 term(p_rest, q_rest, log_ratio(of_student, of_teacher, p, -difference));
    // The difference of two sigmoids as a product.
    student = difference > 0 ? p * q_rest * expm1(-difference) : -q * p_rest * expm1(difference);
    teacher = p * p_rest == 0 ? 0 : p * p_rest * difference;
  }

 private:
  KDKERNELS_BOTH static double sigmoid(double x) { return x < 0 ? exp(x) / (1 + exp(x)) : 1 / (1 + exp(-x)); }
  KDKERNELS_BOTH static double softplus(double x) { return (x > 0 ? x : 0) + log1p(exp(x > 0 ? -x : x)); }

  // softplus(a) - softplus(b) = log(1 + sigmoid(b) (exp(a - b) - 1)).
  KDKERNELS_BOTH static double log_ratio(double a, double b, double sigmoid_b, double difference) {
    return fabs(difference) <= 1 ? log1p(sigmoid_b * expm1(difference)) : softplus(a) - softplus(b);
  }

  // p log(p / q) - p + q with d = log(p / q). It is p (exp(-d) - 1 + d) >= 0.
  KDKERNELS_BOTH static double term(double p, double q, double d) {
    if (p == 0) return q;
    if (!(fabs(d) < 0.5)) return p * d - (p - q);
    double series = 1;  // Horner: 1/2 d² (1 - d/3 (1 - d/4 (...)))
    for (int i = 15; i >= 3; --i) series = 1 - d * series / i;
    return 0.5 * p * d * d * series;
  }
};

}  // namespace kdkernels
