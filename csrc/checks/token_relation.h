// What token_relation and token_relation_pairs expect of their arguments.
#pragma once

#include "check.h"

namespace kdkernels {

namespace token_relation_checks {

// Sizes of b x n x c tokens or of b x c x h x w maps.
inline int64_t tokens_of(const Tensor& x) { return x.dim() == 4 ? x.size(2) * x.size(3) : x.size(1); }
inline int64_t channels_of(const Tensor& x) { return x.size(x.dim() == 4 ? 1 : 2); }

inline void features(Check& check, const Argument& argument, const Tensor& x, int64_t heads) {
  check.tensor(argument, x, x.dim() == 4 ? "b c h w" : "b n c");
  check.forget(1);
  check.positive("heads", heads);
  if (channels_of(x) % heads)
    check.fail(argument, " must have a multiple of ", heads, " channels, got ", channels_of(x));
}

// Check that two inputs have equally many channels, or equally many tokens.
inline void same(const Check& check, bool channels, const Argument& argument, const Tensor& x, const Argument& other,
                 const Tensor& of) {
  const auto size = [&](const Tensor& one) { return channels ? channels_of(one) : tokens_of(one); };
  if (size(x) != size(of))
    check.fail(argument, " must have ", other, "'s ", size(of), channels ? " channels, got " : " tokens, got ",
               size(x));
}

inline void mask(Check& check, const Argument& argument, const std::optional<Tensor>& mask, const Tensor& student,
                 const Argument& other, const Tensor& teacher) {
  if (!mask) return;
  same(check, false, other, teacher, "student", student);
  check.bind("n", tokens_of(student));
  check.tensor(argument, *mask, "b n");
  check.forget(1);
}

inline void settings(const Check& check, int64_t clip, double student_temperature, double teacher_temperature,
                     double margin) {
  if (clip < 0 || clip > 3) check.fail("clip must be 0 (none), 1 (both), 2 (teacher) or 3 (teacher_only), got ", clip);
  check.positive("student_temperature", student_temperature);
  check.positive("teacher_temperature", teacher_temperature);
  check.non_negative("margin", margin);
}

}  // namespace token_relation_checks

inline void check_token_relation(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                                 int64_t comparison, int64_t clip, int64_t heads, bool channels, int64_t form,
                                 double student_temperature, double teacher_temperature, double margin,
                                 bool grad_teacher) {
  using namespace token_relation_checks;
  Check check("token_relation");
  features(check, "student", student, heads);
  features(check, "teacher", teacher, heads);
  same(check, channels, "teacher", teacher, "student", student);
  token_relation_checks::mask(check, "mask", mask, student, "teacher", teacher);
  if (comparison < 0 || comparison > 3)
    check.fail("comparison must be 0 (mse), 1 (hinge), 2 (kl) or 3 (cross_entropy), got ", comparison);
  settings(check, clip, student_temperature, teacher_temperature, margin);
  if (form != 0 && form != 1 && form != 7) check.fail("form must be 0 (gram), 1 (mixed) or 7 (feature), got ", form);
  if (form != 0 && (comparison != 0 || clip != 0))
    check.fail("form must be 0 (gram) unless comparison and clip are 0, got ", form);
  if (form == 1 && grad_teacher) check.fail("form must be 0 (gram) or 7 (feature) for the second gradient, got 1");
  if (form == 1 && check.on_gpu()) check.fail("form must be 0 (gram) or 7 (feature) on a GPU, got 1");
}

inline void check_token_relation_pairs(const Tensor& student, const Tensor& student_keys, const Tensor& teacher,
                                       const Tensor& teacher_keys, const std::optional<Tensor>& mask,
                                       const std::optional<Tensor>& key_mask, int64_t comparison, int64_t clip,
                                       int64_t heads, bool channels, double student_temperature,
                                       double teacher_temperature, double margin) {
  using namespace token_relation_checks;
  Check check("token_relation_pairs");
  features(check, "student", student, heads);
  features(check, "student_keys", student_keys, heads);
  features(check, "teacher", teacher, heads);
  features(check, "teacher_keys", teacher_keys, heads);
  same(check, channels, "teacher", teacher, "student", student);
  same(check, channels, "teacher_keys", teacher_keys, "student_keys", student_keys);
  same(check, !channels, "student_keys", student_keys, "student", student);
  same(check, !channels, "teacher_keys", teacher_keys, "teacher", teacher);
  token_relation_checks::mask(check, "mask", mask, student, "teacher", teacher);
  token_relation_checks::mask(check, "key_mask", key_mask, student_keys, "teacher_keys", teacher_keys);
  if (comparison < 0 || comparison > 5)
    check.fail(
        "comparison must be 0 (mse), 1 (hinge), 2 (kl), 3 (cross_entropy), 4 (kl in both directions) or 5 "
        "(cross_entropy in "
        "both directions), got ",
        comparison);
  settings(check, clip, student_temperature, teacher_temperature, margin);
}

}  // namespace kdkernels
