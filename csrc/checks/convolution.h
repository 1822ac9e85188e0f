// What convolution and convolution_weight expect of their arguments.
#pragma once

#include "check.h"

namespace kdkernels {
namespace convolution_checks {

constexpr int64_t kChannels = 32;  // channels must be a multiple of this

inline void channels(const Check& check, const Argument& argument, int64_t count) {
  if (count % kChannels) check.fail(argument, " must have a multiple of 32 channels, got ", count);
}

inline void channels_last(Check& check, const Argument& argument, const Tensor& maps, const char* shape) {
  check.tensor(argument, maps, shape, Types::full_float);
  channels(check, argument, maps.size(1));
  if (maps.stride(1) != 1) {
    const auto strides = maps.strides();
    check.fail(argument, " must be channels_last, with stride 1 between channels, got strides ",
               Check::Shape{strides.data(), 4});
  }
}

}  // namespace convolution_checks

inline void check_convolution(const Tensor& maps, const Tensor& weight, bool transposed) {
  Check check("convolution");
  convolution_checks::channels_last(check, "maps", maps, "n c h w");
  check.tensor("weight", weight, transposed ? "c k 3 3" : "k c 3 3", Types::full_float);
  check.same_type("weight", weight, "maps", maps);
  convolution_checks::channels(check, "weight", weight.size(transposed ? 1 : 0));
  check.fits("weight", {maps.size(0), weight.size(transposed ? 1 : 0), maps.size(2), maps.size(3)});
}

inline void check_convolution_weight(const Tensor& maps, const Tensor& grad) {
  Check check("convolution_weight");
  convolution_checks::channels_last(check, "maps", maps, "n c h w");
  convolution_checks::channels_last(check, "grad", grad, "n k h w");
  check.same_type("grad", grad, "maps", maps);
  check.fits("grad", {grad.size(1), maps.size(1), 9});
}

}  // namespace kdkernels
