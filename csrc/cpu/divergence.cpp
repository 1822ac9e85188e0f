// Divergences of softened class probabilities, row by row. The forward kernel reads each row of logits in blocks that stay in the
// first-level cache, and computes maxima, sums of exponentials and a KL divergence. It reads a row again, from the second-level
// cache, for JSD, for moments, and where the sum of a KL divergence has cancelled. The backward kernel reads each row once more
// and writes its gradients. Nothing of the size of a row is kept. Exponentials are computed again, because this is faster than to
// write and read them.
//
// In this file, p and q are the softmax of the exponents a = slope_p (x - max) and b = slope_q (y - max). KL(p, q) is the
// forward divergence if x is the teacher, and the reverse divergence if x is the student. JSD takes x from the teacher.
#include "../divergence.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>

#include "log.h"
#include "logit_rows.h"
#include "parallel.h"
#include "workspace.h"

namespace kdkernels {
namespace {

constexpr int64_t kTileElements = 16384;     // of rows whose classes are no neighbours, and which are copied
constexpr int64_t kTileRows = 16;            // float32 numbers of a cache line
constexpr int64_t kStreamedBytes = 1 << 23;  // larger results leave the caches before they are read
constexpr double kFar = 0.01;                // the terms of a smaller divergence are larger than their sum

// How the terms of a row are computed: `near` in a way that is precise where p and q are nearly equal, `absent` also where logits
// are -inf, and `far` in the fastest way, if the first read of a KL divergence found that nothing cancels.
enum Mode : int64_t { near, absent, far };

// Rows of logits ---------------------------------------------------------------------------------------------------------

int64_t bytes_of(ScalarType type) {
  return with_element_type(type, [](auto element) { return int64_t(sizeof(element)); });
}

// A row of logits whose classes are neighbours.
template <typename T>
struct RowIn {
  const char* data;
  ScalarType type;
  int64_t size = bytes_of(type);

  void prefetch(int64_t j) const { __builtin_prefetch(data + j * size); }  // also past the end, where it does nothing

  // Return elements [begin, begin + count), in place or converted into `buffer`.
  const T* block(int64_t begin, int64_t count, T* buffer) const {
    if (type == kScalarType<T>) return reinterpret_cast<const T*>(data) + begin;
    with_element_type(
        type, [&](auto element) { widen(reinterpret_cast<const decltype(element)*>(data) + begin, 1, count, buffer); });
    return buffer;
  }
};

// Write bytes past the caches. The processor then does not read the lines that it overwrites.
inline void stream(char* out, const char* source, int64_t bytes) {
#if defined(__AVX2__)
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(out) & 31);
  std::memcpy(out, source, head);
  int64_t i = head;
  for (; i + 32 <= bytes; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i)));
  std::memcpy(out + i, source + i, bytes - i);
#else
  std::memcpy(out, source, bytes);
#endif
}

// A row of a gradient whose classes are neighbours. Without data, nothing is written.
template <typename T>
struct RowOut {
  char* data;
  ScalarType type;
  bool streamed;

  void write(int64_t begin, int64_t count, const T* block, T* buffer) const {
    const int64_t size = bytes_of(type);
    char* const out = data + begin * size;
    const char* source = reinterpret_cast<const char*>(block);
    if (type != kScalarType<T>) {
      with_element_type(type, [&](auto element) {
        using E = decltype(element);
        narrow(block, count, reinterpret_cast<E*>(streamed ? reinterpret_cast<char*>(buffer) : out), 1);
      });
      if (!streamed) return;
      source = reinterpret_cast<const char*>(buffer);
    }
    streamed ? stream(out, source, count * size) : void(std::memcpy(out, source, count * size));
  }
};

// A row of both networks -------------------------------------------------------------------------------------------------

template <typename T>
struct Network {
  RowIn<T> row;
  T max = std::numeric_limits<T>::lowest();  // so that -inf - max is -inf
  double sum = 0, slope = 0;
  double centre = 0, deviation = 0,
         count = 0;              // of a row that is standardised: mean, standard deviation, logits above -inf
  double ratio = 0, moment = 0;  // means under the network's distribution, as `total` computes them
};

// What `total` and `write` compute with, for every class.
template <typename T>
struct Constants {
  T max_p, max_q, exponent_p, exponent_q, slope_p, slope_q, gap, inverse_p, inverse_q, log_sums, top_q, beta;
};

// Of a vector of classes: p, q, and r = log(p / q) up to a constant for the gradient to x. For JSD with m = β p + (1 - β) q,
// u = log(p / m) and v = log(q / m).
template <typename T>
struct Terms {
  using V = typename Vec<T>::type;
  V p, q, below_p, below_q, loss, gradient_q, r, u, v;
};

template <typename T, bool is_jsd, Mode how>
[[gnu::always_inline]] inline Terms<T> terms_of(const Constants<T>& c, const T* x, const T* y, int64_t count) {
  using V = typename Vec<T>::type;
  constexpr bool is_absent = how == absent;
  Terms<T> t;
  const V of_x = load_first<T>(x, count, c.max_p), of_y = load_first<T>(y, count, c.max_q);
  // Subtract before anything is rounded. Near the maximum, the difference is exact.
  t.below_p = of_x - c.max_p, t.below_q = of_y - c.max_q;
  const auto exp2 = how == absent ? exp2_or_zero<T> : exp2_or_least<T>;
  t.p = exp2(t.below_p * c.exponent_p) * c.inverse_p;
  t.q = exp2(t.below_q * c.exponent_q) * c.inverse_q;
  if (count < Vec<T>::size) {
    const auto valid = first_lanes<T>(count);
    t.p = valid ? t.p : V{}, t.q = valid ? t.q : V{};
  }
  const V of_slopes = t.below_p * c.gap;
  V d = (t.below_p - t.below_q) * c.slope_q + of_slopes + c.log_sums;
  const auto no_p = of_x == -T(INFINITY), no_q = of_y == -T(INFINITY);
  const V zero{}, one = zero + T(1);
  if constexpr (is_jsd) {
    if (is_absent) d = no_p ? (no_q ? zero : zero - T(INFINITY)) : no_q ? zero + T(INFINITY) : d;
    // With e = exp(-|d|), the logarithm of m over the larger of p and q is log(1 + w (e - 1)).
    const auto larger_p = d >= zero;
    const V distance = larger_p ? d : -d, of_smaller = larger_p ? one - c.beta : zero + c.beta;
    const V e = exp2_or_zero<T>(distance * -kLog2e<T>);
    const V above = of_smaller * (distance < T(0.5) ? exp_remainder<T>(distance) - distance : e - one);
    const V log = -logarithm<T>(larger<T>(one - of_smaller, one + above), above).log;
    t.u = larger_p ? log : log + d, t.v = larger_p ? log - d : log;
    if (is_absent) t.u = no_p ? one : t.u, t.v = no_q ? one : t.v;  // any number that is not near 0
    // β p (exp(-u) - 1 + u) + (1 - β) q (exp(-v) - 1 + v), where p exp(-u) = q exp(-v) = m. Each term is >= 0.
    const V m = c.beta * t.p + (one - c.beta) * t.q;
    const auto near_p = (t.u < T(0.5)) & (t.u > T(-0.5)), near_q = (t.v < T(0.5)) & (t.v > T(-0.5));
    const V of_p = near_p ? t.p * exp_remainder<T>(t.u) : t.p * t.u - (t.p - m);
    const V of_q = near_q ? t.q * exp_remainder<T>(t.v) : t.q * t.v - (t.q - m);
    t.loss = c.beta * of_p + (one - c.beta) * of_q;
  } else if constexpr (how == far) {
    t.gradient_q = t.q - t.p;
  } else {
    const auto only_p = no_q & ~no_p;
    if (is_absent) d = no_p | ((t.p == zero) & (d < zero)) ? one : d;  // any number, because p is 0
    // KL(p, q) = sum of p d - p + q. Each term is p (exp(-d) - 1 + d) >= 0. So a small divergence is as precise as a large one.
    const V pd = t.p * d;
    const auto small = (d < T(0.5)) & (d > T(-0.5));
    t.loss = small ? t.p * exp_remainder<T>(d) : pd - (t.p - t.q);
    t.gradient_q = small ? t.loss - pd : t.q - t.p;
    if (is_absent) {
      t.loss = only_p ? zero + (c.log_sums + T(INFINITY)) : t.loss;
      t.r = only_p ? zero : d;
    } else {
      // Relative to the class with the largest p. If this p is nearly 1, the divergence is nearly its logarithm, and the
      // difference of both would cancel.
      t.r = (t.below_p - (of_y - c.top_q)) * c.slope_q + of_slopes;
    }
  }
  if (is_absent) t.below_p = no_p ? zero : t.below_p, t.below_q = no_q ? zero : t.below_q;
  return t;
}

template <typename T>
class Row {
 public:
  using V = typename Vec<T>::type;

  // `buffers` has room for five blocks.
  Row(const RowIn<T>& x, const RowIn<T>& y, int64_t classes, double temperature, Kind kind, double beta, T* buffers)
      : p_{x}, q_{y}, classes_(classes), temperature_(temperature), kind_(kind), beta_(beta), buffers_(buffers) {}

  // Return the divergence, and save what the gradients need.
  double forward(bool standardize, bool moments, T* saved) {
    for (Network<T>* network : {&p_, &q_}) {
      if (standardize) measure(*network);
      network->slope = slope_of(*network, standardize);
    }
    exponentials();
    double loss = NAN;
    Mode mode = near;
    if (temperature_ > 0 && std::isfinite(temperature_)) {
      if (moments && kind_ != jsd) find_top();
      // The sum of p log(p / q) has terms of both signs. If they cancel, only the sum of terms >= 0 is precise.
      const double ratio = kLn2<double> * cross_ / p_.sum, constant = std::log(q_.sum / p_.sum);
      loss = ratio + constant;
      if (!moments && kind_ != jsd && loss > kFar && 16 * loss > std::abs(ratio) + std::abs(constant) &&
          std::isfinite(loss)) {
        mode = far;
      } else {
        loss = kind_ == jsd ? total<true, near>(moments) : total<false, near>(moments);
        if (!std::isfinite(loss)) {
          mode = absent;
          loss = kind_ == jsd ? total<true, absent>(moments) : total<false, absent>(moments);
        }
      }
    }
    const bool broken = std::isnan(loss);  // then all gradients of the row are NaN
    saved[Saved::max_p] = p_.max, saved[Saved::max_q] = q_.max;
    saved[Saved::sum_p] = broken ? T(NAN) : T(p_.sum), saved[Saved::sum_q] = broken ? T(NAN) : T(q_.sum);
    saved[Saved::mode] = T(mode);
    if (moments) {
      saved[Saved::top_q] = top_q_;
      saved[Saved::mean_p] = T(p_.ratio), saved[Saved::mean_q] = T(q_.ratio);
      saved[Saved::moment_p] = T(p_.moment), saved[Saved::moment_q] = T(q_.moment);
      saved[Saved::centre_p] = T(p_.centre), saved[Saved::centre_q] = T(q_.centre);
      saved[Saved::deviation_p] = T(p_.deviation), saved[Saved::deviation_q] = T(q_.deviation);
      saved[Saved::count_p] = T(p_.count), saved[Saved::count_q] = T(q_.count);
    }
    return loss;
  }

  // Write factor times the gradients, and return factor times the gradient to the temperature.
  double backward(const T* saved, double factor, bool standardize, bool moments, const RowOut<T>* out_p,
                  const RowOut<T>* out_q) {
    p_.max = saved[Saved::max_p], q_.max = saved[Saved::max_q];
    p_.sum = saved[Saved::sum_p], q_.sum = saved[Saved::sum_q];
    if (moments) {
      top_q_ = saved[Saved::top_q];
      p_.ratio = saved[Saved::mean_p], q_.ratio = saved[Saved::mean_q];
      p_.moment = saved[Saved::moment_p], q_.moment = saved[Saved::moment_q];
      p_.centre = saved[Saved::centre_p], q_.centre = saved[Saved::centre_q];
      p_.deviation = saved[Saved::deviation_p], q_.deviation = saved[Saved::deviation_q];
      p_.count = saved[Saved::count_p], q_.count = saved[Saved::count_q];
    }
    p_.slope = slope_of(p_, standardize), q_.slope = slope_of(q_, standardize);
    if (out_p && out_q)
      write<true, true>(saved, factor, standardize, out_p, out_q);
    else if (out_p)
      write<true, false>(saved, factor, standardize, out_p, out_q);
    else if (out_q)
      write<false, true>(saved, factor, standardize, out_p, out_q);
    return -factor * (p_.moment + q_.moment) / temperature_;
  }

 private:
  double slope_of(const Network<T>& network, bool standardize) const {
    return 1 / (temperature_ * (standardize ? network.deviation + kStandardEps : 1));
  }

  // Call f(begin, count, x, y) for the blocks of the row.
  template <typename F>
  void blocks(const F& f) const {
    for (int64_t begin = 0; begin < classes_; begin += kSumBlock) {
      const int64_t count = std::min(kSumBlock, classes_ - begin);
      f(begin, count, p_.row.block(begin, count, buffers_), q_.row.block(begin, count, buffers_ + kSumBlock));
    }
  }

  // Ask for what the loop reads a block later. The processor's own prefetching ends at each page of 4 KiB, which is a block.
  void prefetch(int64_t j) const { p_.row.prefetch(j + kSumBlock), q_.row.prefetch(j + kSumBlock); }

  // Mean and standard deviation of the logits above -inf.
  void measure(Network<T>& network) const {
    double sums[2] = {}, count = 0;
    for (const int pass : {0, 1}) {
      const T centre = T(network.centre);
      for (int64_t begin = 0; begin < classes_; begin += kSumBlock) {
        const int64_t size = std::min(kSumBlock, classes_ - begin);
        const T* x = network.row.block(begin, size, buffers_);
        V block{}, counted{};
        for_vectors<T>(0, size, [&](int64_t j, int64_t lanes) {
          const V value = load_first<T>(x + j, lanes, -T(INFINITY));
          const auto missing = value == -T(INFINITY);
          const V shifted = missing ? V{} : value - centre;
          block += pass ? shifted * shifted : shifted;
          counted += missing ? V{} : V{} + T(1);
        });
        sums[pass] += lane_sum<T>(block);
        if (!pass) count += lane_sum<T>(counted);
      }
      if (!pass) network.count = count, network.centre = sums[0] / count;
    }
    network.deviation = std::sqrt(sums[1] / std::max(count - 1, 1.0));
  }

  // In one pass, maxima, sums of the exponentials below them, and the sum of exp(a) (a - b) over the exponents of p and q. The
  // last sum is in units of ln 2.
  void exponentials() {
    // Return by how much the largest exponent rises.
    const auto rise = [](Network<T>& network, T max) {
      if (!(max > network.max)) return 0.0;
      const double by = (double(max) - double(network.max)) * network.slope;
      network.max = max;
      network.sum *= std::exp(-by);
      return by;
    };
    const T exponent_p = T(p_.slope * kLog2e<double>), exponent_q = T(q_.slope * kLog2e<double>);
    blocks([&](int64_t begin, int64_t count, const T* x, const T* y) {
      const double before = p_.sum, by_p = rise(p_, max_of<T>(x, 0, count, p_.max)),
                   by_q = rise(q_, max_of<T>(y, 0, count, q_.max));
      if (by_p > 0) cross_ = std::exp(-by_p) * (cross_ - by_p * kLog2e<double> * before);
      cross_ += by_q * kLog2e<double> * p_.sum;
      V sums_p{}, sums_q{}, cross{};
      for_vectors<T>(0, count, [&](int64_t j, int64_t lanes) {
        prefetch(begin + j);
        const V a = (load_first<T>(x + j, lanes, p_.max) - p_.max) * exponent_p;
        const V b = (load_first<T>(y + j, lanes, q_.max) - q_.max) * exponent_q;
        V of_p = exp2_or_least<T>(a), of_q = exp2_or_least<T>(b);
        if (lanes < Vec<T>::size) {
          const auto valid = first_lanes<T>(lanes);
          of_p = valid ? of_p : V{}, of_q = valid ? of_q : V{};
        }
        sums_p += of_p, sums_q += of_q, cross += of_p * (a - b);
      });
      p_.sum += lane_sum<T>(sums_p), q_.sum += lane_sum<T>(sums_q), cross_ += lane_sum<T>(cross);
    });
    for (Network<T>* network : {&p_, &q_})
      if (network->sum < 0.5) network->sum = NAN;  // all logits are -inf. Otherwise, the largest exponential is 1.
  }

  // The logit of q in the class with the largest p.
  void find_top() {
    bool found = false;
    blocks([&](int64_t, int64_t count, const T* x, const T* y) {
      if (found) return;
      const int64_t j = position_of(x, count, p_.max);
      found = j < count;
      if (found) top_q_ = y[j];
    });
  }

  Constants<T> constants() const {
    return {p_.max,
            q_.max,
            T(p_.slope * kLog2e<double>),
            T(q_.slope * kLog2e<double>),
            T(p_.slope),
            T(q_.slope),
            T(p_.slope - q_.slope),
            T(1 / p_.sum),
            T(1 / q_.sum),
            T(std::log(q_.sum / p_.sum)),
            top_q_,
            T(beta_)};
  }

  // Return the divergence. With moments, also compute for both networks the mean of r (KL), or of u and v (JSD), and the sum of
  // exponents times the gradient to them.
  template <bool is_jsd, Mode how>
  double total(bool moments) {
    return moments ? total<is_jsd, how, true>() : total<is_jsd, how, false>();
  }

  template <bool is_jsd, Mode how, bool moments>
  double total() {
    const Constants<T> c = constants();
    double loss = 0, ratio_p = 0, ratio_q = 0, exponent_p = 0, exponent_q = 0, moment_p = 0, moment_q = 0;
    blocks([&](int64_t, int64_t count, const T* x, const T* y) {
      V losses{}, ratios_p{}, ratios_q{}, exponents_p{}, exponents_q{}, moments_p{}, moments_q{};
      for_vectors<T>(0, count, [&](int64_t j, int64_t lanes) {
        const Terms<T> t = terms_of<T, is_jsd, how>(c, x + j, y + j, lanes);
        losses += t.loss;
        if constexpr (moments) {
          const V a = t.below_p * c.slope_p, b = t.below_q * c.slope_q;
          const V of_p = t.p * (is_jsd ? t.u : t.r);
          ratios_p += of_p, exponents_p += t.p * a, moments_p += of_p * a;
          if constexpr (is_jsd)
            ratios_q += t.q * t.v, exponents_q += t.q * b, moments_q += t.q * t.v * b;
          else
            moments_q += lanes == Vec<T>::size || first_lanes<T>(lanes) ? t.gradient_q * b : V{};
        }
      });
      loss += lane_sum<T>(losses);
      if constexpr (moments) {
        ratio_p += lane_sum<T>(ratios_p), exponent_p += lane_sum<T>(exponents_p), moment_p += lane_sum<T>(moments_p);
        ratio_q += lane_sum<T>(ratios_q), exponent_q += lane_sum<T>(exponents_q), moment_q += lane_sum<T>(moments_q);
      }
    });
    p_.ratio = ratio_p, q_.ratio = ratio_q;
    p_.moment = (is_jsd ? beta_ : 1) * (moment_p - ratio_p * exponent_p);
    q_.moment = is_jsd ? (1 - beta_) * (moment_q - ratio_q * exponent_q) : moment_q;
    return loss;
  }

  template <bool to_p, bool to_q>
  void write(const T* saved, double factor, bool standardize, const RowOut<T>* out_p, const RowOut<T>* out_q) const {
    switch (Mode(saved[Saved::mode])) {
      case far:
        return write<false, far, to_p, to_q>(factor, standardize, out_p, out_q);
      case absent:
        return kind_ == jsd ? write<true, absent, to_p, to_q>(factor, standardize, out_p, out_q)
                            : write<false, absent, to_p, to_q>(factor, standardize, out_p, out_q);
      default:
        return kind_ == jsd ? write<true, near, to_p, to_q>(factor, standardize, out_p, out_q)
                            : write<false, near, to_p, to_q>(factor, standardize, out_p, out_q);
    }
  }

  template <bool is_jsd, Mode how, bool to_p, bool to_q>
  void write(double factor, bool standardize, const RowOut<T>* out_p, const RowOut<T>* out_q) const {
    const Constants<T> c = constants();
    const T factor_p = T(factor * p_.slope * (is_jsd ? beta_ : 1)), ratio_p = T(p_.ratio);
    const T factor_q = T(factor * q_.slope * (is_jsd ? 1 - beta_ : 1)), ratio_q = T(q_.ratio);
    // The gradient of the standard deviation.
    const auto spread_of = [&](const Network<T>& network) {
      const double deviation = network.deviation;
      return !standardize || deviation == 0
                 ? T(0)
                 : T(factor * network.moment /
                     (std::max(network.count - 1, 1.0) * deviation * (deviation + kStandardEps)));
    };
    const T spread_p = spread_of(p_), spread_q = spread_of(q_), centre_p = T(p_.centre), centre_q = T(q_.centre);
    T *const block_p = buffers_ + 2 * kSumBlock, *const block_q = buffers_ + 3 * kSumBlock,
             *const narrow = buffers_ + 4 * kSumBlock;
    blocks([&](int64_t begin, int64_t count, const T* x, const T* y) {
      for_vectors<T>(0, count, [&](int64_t j, int64_t lanes) {
        prefetch(begin + j);
        const Terms<T> t = terms_of<T, is_jsd, how>(c, x + j, y + j, lanes);
        if constexpr (to_p) store_first<T>(block_p + j, factor_p * t.p * ((is_jsd ? t.u : t.r) - ratio_p), lanes);
        if constexpr (to_q)
          store_first<T>(block_q + j, factor_q * (is_jsd ? t.q * (t.v - ratio_q) : t.gradient_q), lanes);
      });
      if (standardize) {
        const auto add = [&](const T* z, T centre, T spread, T* out) {
          for (int64_t j = 0; j < count; ++j) out[j] -= z[j] == -T(INFINITY) ? T(0) : spread * (z[j] - centre);
        };
        if (out_p) add(x, centre_p, spread_p, block_p);
        if (out_q) add(y, centre_q, spread_q, block_q);
      }
      if (out_p) out_p->write(begin, count, block_p, narrow);
      if (out_q) out_q->write(begin, count, block_q, narrow);
    });
  }

  Network<T> p_, q_;
  int64_t classes_;
  double temperature_;
  Kind kind_;
  double beta_, cross_ = 0;
  T top_q_ = 0;
  T* buffers_;
};

// Tensors ----------------------------------------------------------------------------------------------------------------

// Logits or a gradient, outer x inner x K. If the classes are no neighbours, tiles of rows are copied: their classes are then.
template <typename T>
struct Matrix {
  char* data;
  ScalarType type;
  int64_t size, inner, classes, outer_stride, inner_stride, column;
  bool streamed = false;

  explicit Matrix(const Tensor& tensor)
      : data(static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()))),
        type(tensor.scalar_type()),
        size(bytes_of(type)),
        inner(tensor.size(1)),
        classes(tensor.size(2)),
        outer_stride(tensor.stride(0)),
        inner_stride(tensor.stride(1)),
        column(tensor.stride(2)) {}

  bool direct() const { return column == 1; }
  char* row(int64_t i) const { return data + (i / inner * outer_stride + i % inner * inner_stride) * size; }

  void read(int64_t begin, int64_t rows, T* tile) const {
    each(begin, rows, [&](auto* element, int64_t place) { tile[place] = static_cast<T>(*element); });
  }
  void write(int64_t begin, int64_t rows, const T* tile) const {
    each(begin, rows, [&](auto* element, int64_t place) {
      *element = static_cast<std::remove_reference_t<decltype(*element)>>(tile[place]);
    });
  }

 private:
  // Class by class, because neighbouring rows are usually neighbours in memory.
  template <typename F>
  void each(int64_t begin, int64_t rows, const F& f) const {
    with_element_type(type, [&](auto kind) {
      using E = decltype(kind);
      for (int64_t j = 0; j < classes; ++j)
        for (int64_t i = 0; i < rows; ++i) f(reinterpret_cast<E*>(row(begin + i)) + j * column, i * classes + j);
    });
  }
};

// Call f(i, x, y) for the rows of both networks, on all threads. `after(begin, rows)` follows every tile of rows.
template <typename T, typename F, typename After>
void for_rows(const Matrix<T>& x, const Matrix<T>& y, int64_t rows, const F& f, const After& after) {
  const int64_t classes = x.classes, tile = std::clamp<int64_t>(kTileElements / classes, 1, kTileRows);
  parallel_blocks(rows, tile, std::max<int64_t>(kLogitsPerThread / classes, 1), [&](int64_t begin, int64_t end) {
    T* const of_x = x.direct() ? nullptr : workspace<T, Scratch::student_logits>(tile * classes);
    T* const of_y = y.direct() ? nullptr : workspace<T, Scratch::teacher_logits>(tile * classes);
    for (int64_t first = begin; first < end; first += tile) {
      const int64_t count = std::min(tile, end - first);
      if (of_x) x.read(first, count, of_x);
      if (of_y) y.read(first, count, of_y);
      const auto row = [&](const Matrix<T>& matrix, T* copy, int64_t i) {
        return copy ? RowIn<T>{reinterpret_cast<const char*>(copy + (i - first) * classes), kScalarType<T>}
                    : RowIn<T>{matrix.row(i), matrix.type};
      };
      for (int64_t i = first; i < first + count; ++i) f(i, first, row(x, of_x, i), row(y, of_y, i));
      after(first, count);
    }
  });
}

// The temperature or another number of each row.
struct Numbers {
  const void* data;
  bool in_double;
  int64_t inner, outer_stride, inner_stride;

  explicit Numbers(const Tensor& tensor)
      : data(tensor.const_data_ptr()),
        in_double(tensor.scalar_type() == ScalarType::Double),
        inner(tensor.size(1)),
        outer_stride(tensor.stride(0)),
        inner_stride(tensor.stride(1)) {}

  double operator[](int64_t i) const {
    const int64_t place = i / inner * outer_stride + i % inner * inner_stride;
    return in_double ? static_cast<const double*>(data)[place] : static_cast<const float*>(data)[place];
  }
};

template <typename T>
std::tuple<Tensor, Tensor> run(const Tensor& student, const Tensor& teacher, const Tensor& temperatures, Kind kind,
                               double beta, bool standardize, bool moments) {
  const int64_t outer = student.size(0), inner = student.size(1), numbers = moments ? kSavedMoments : kSavedNumbers;
  const Matrix<T> x(kind == reverse ? student : teacher), y(kind == reverse ? teacher : student);
  const Numbers temperature(temperatures);
  const Tensor losses = new_compact(student, {outer, inner}, kScalarType<T>);
  const Tensor saved = new_compact(student, {outer, inner, numbers}, kScalarType<T>);
  T *const loss = losses.mutable_data_ptr<T>(), *const kept = saved.mutable_data_ptr<T>();
  const auto row = [&](int64_t i, int64_t, const RowIn<T>& of_x, const RowIn<T>& of_y) {
    const double here = temperature[i];
    T* const of_row = kept + i * numbers;
    if (here == 0) {
      loss[i] = 0;
      std::fill_n(of_row, numbers, T(0));
      return;
    }
    T* const buffers = workspace<T, Scratch::row>(5 * kSumBlock);
    loss[i] = T(Row<T>(of_x, of_y, x.classes, here, kind, beta, buffers).forward(standardize, moments, of_row));
  };
  for_rows<T>(x, y, outer * inner, row, [](int64_t, int64_t) {});
  return {losses, saved};
}

// Ask for pages of 2 MiB for a large result. The first write to each page of 4 KiB takes longer than its gradient does.
void use_huge_pages(const Tensor& tensor) {
#if defined(__linux__)
  const int64_t bytes = tensor.numel() * bytes_of(tensor.scalar_type()), page = 4096;
  if (bytes <= kStreamedBytes) return;
  const intptr_t begin = reinterpret_cast<intptr_t>(tensor.mutable_data_ptr());
  const intptr_t first = round_up(begin, page), end = (begin + bytes) / page * page;
  madvise(reinterpret_cast<void*>(first), size_t(end - first), MADV_HUGEPAGE);  // a hint, which may fail
#endif
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> run_backward(const Tensor& grad_losses, const Tensor& student, const Tensor& teacher,
                                                const Tensor& temperatures, const Tensor& saved, Kind kind, double beta,
                                                bool standardize, bool moments, bool want_student, bool want_teacher,
                                                bool want_temperatures) {
  const int64_t outer = student.size(0), inner = student.size(1), classes = student.size(2);
  const Tensor grad_student = new_gradient(student, want_student), grad_teacher = new_gradient(teacher, want_teacher);
  const Tensor grad_temperatures = new_compact(
      student, want_temperatures ? std::vector<int64_t>{outer, inner} : std::vector<int64_t>{0}, kScalarType<T>);
  use_huge_pages(grad_student);
  use_huge_pages(grad_teacher);
  const bool swapped = kind == reverse;
  const Matrix<T> x(swapped ? student : teacher), y(swapped ? teacher : student);
  const bool want_x = swapped ? want_student : want_teacher, want_y = swapped ? want_teacher : want_student;
  std::optional<Matrix<T>> out_x, out_y;
  if (want_x) out_x.emplace(swapped ? grad_student : grad_teacher);
  if (want_y) out_y.emplace(swapped ? grad_teacher : grad_student);
  for (auto* out : {&out_x, &out_y})
    if (*out) (*out)->streamed = outer * inner * classes * (*out)->size > kStreamedBytes;
  const Numbers temperature(temperatures), factor(grad_losses);
  const Tensor numbers_of_rows = compact(saved);
  const int64_t numbers = saved.size(2), tile = std::clamp<int64_t>(kTileElements / classes, 1, kTileRows);
  const T* const kept = numbers_of_rows.const_data_ptr<T>();
  T* const to_temperature = want_temperatures ? grad_temperatures.mutable_data_ptr<T>() : nullptr;
  const auto copied = [](const std::optional<Matrix<T>>& out) { return out && !out->direct(); };

  const auto row = [&](int64_t i, int64_t first, const RowIn<T>& of_x, const RowIn<T>& of_y) {
    T* const tiles =
        copied(out_x) || copied(out_y) ? workspace<T, Scratch::partial_gradients>(2 * tile * classes) : nullptr;
    const auto place = [&](const std::optional<Matrix<T>>& out, int64_t which) {
      if (!out) return RowOut<T>{nullptr, kScalarType<T>, false};
      if (out->direct()) return RowOut<T>{out->row(i), out->type, out->streamed};
      return RowOut<T>{reinterpret_cast<char*>(tiles + (which * tile + i - first) * classes), kScalarType<T>, false};
    };
    const RowOut<T> to_x = place(out_x, 0), to_y = place(out_y, 1);
    const double here = temperature[i];
    if (here == 0) {
      for (const RowOut<T>& to : {to_x, to_y})
        if (to.data) std::memset(to.data, 0, classes * bytes_of(to.type));
      if (to_temperature) to_temperature[i] = 0;
      return;
    }
    Row<T> both(of_x, of_y, classes, here, kind, beta, workspace<T, Scratch::row>(5 * kSumBlock));
    const double result = both.backward(kept + i * numbers, factor[i], standardize, moments,
                                        to_x.data ? &to_x : nullptr, to_y.data ? &to_y : nullptr);
    if (to_temperature) to_temperature[i] = T(result);
  };
  const auto after = [&](int64_t first, int64_t count) {
    if (!copied(out_x) && !copied(out_y)) return;
    T* const tiles = workspace<T, Scratch::partial_gradients>(2 * tile * classes);
    if (copied(out_x)) out_x->write(first, count, tiles);
    if (copied(out_y)) out_y->write(first, count, tiles + tile * classes);
  };
  for_rows<T>(x, y, outer * inner, row, after);
  return {grad_student, grad_teacher, grad_temperatures};
}

}  // namespace

std::tuple<Tensor, Tensor> divergence(const Tensor& student, const Tensor& teacher, const Tensor& temperatures,
                                      int64_t kind, double beta, bool standardize, bool moments) {
  check_divergence(student, teacher, temperatures, kind, beta);
  const auto chosen = any_double({student, teacher}) ? run<double> : run<float>;
  return chosen(student, teacher, temperatures, Kind(kind), beta, standardize, moments);
}

std::tuple<Tensor, Tensor, Tensor> divergence_backward(const Tensor& grad_losses, const Tensor& student,
                                                       const Tensor& teacher, const Tensor& temperatures,
                                                       const Tensor& saved, int64_t kind, double beta, bool standardize,
                                                       bool moments, bool grad_student, bool grad_teacher,
                                                       bool to_temperatures) {
  check_divergence_backward(grad_losses, student, teacher, temperatures, saved, kind, beta, standardize, moments,
                            grad_student, grad_teacher, to_temperatures);
  const auto chosen = any_double({student, teacher}) ? run_backward<double> : run_backward<float>;
  return chosen(grad_losses, student, teacher, temperatures, saved, Kind(kind), beta, standardize, moments,
                grad_student, grad_teacher, to_temperatures);
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  // losses: outer x inner, one per row. saved: numbers of each row for the backward kernel, more of them with moments. A row with
  // the temperature 0 does not count. kind: 0 forward KL, 1 reverse KL, 2 JSD with the weight beta of the teacher.
  m.def(
      "divergence(Tensor student, Tensor teacher, Tensor temperatures, int kind, float beta, bool standardize,"
      " bool moments) -> (Tensor losses, Tensor saved)");
  m.def(
      "divergence_backward(Tensor grad_losses, Tensor student, Tensor teacher, Tensor temperatures, Tensor saved,"
      " int kind, float beta, bool standardize, bool moments, bool grad_student, bool grad_teacher,"
      " bool to_temperatures) -> (Tensor grad_student, Tensor grad_teacher, Tensor grad_temperatures)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("divergence", TORCH_BOX(&kdkernels::divergence));
  m.impl("divergence_backward", TORCH_BOX(&kdkernels::divergence_backward));
}
