// Rows of the inter-class correlation map, summed over the samples, and their gradient with respect to the logits.
//
// The kernels compute the exponentials of a few rows for every sample, with classes in the lanes of a vector. If samples fill
// the lanes better, they compute the exponentials of one row with samples in the lanes.
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>
#include <vector>

#include "convert.h"
#include "exp.h"
#include "tensors.h"
#include "workspace.h"

namespace kdkernels::icc {

constexpr int64_t kBlock = 1024;  // terms of a sum before it is added to another sum, which bounds the rounding error
constexpr int kMostRows = 4;
constexpr int64_t kSamples = 8;
constexpr int64_t kGroupedElements = 1 << 15;

template <typename T>
T sum_of(typename Vec<T>::type lanes) {
  using V = typename Vec<T>::type;
  return reduce<T>(lanes, [](V a, V b) { return a + b; });
}

// Fold `a` and `b` in half. The sums of `a` are in the lanes without the bit `step`, the sums of `b` in the lanes with it.
template <typename T, int64_t step>
typename Vec<T>::type fold(typename Vec<T>::type a, typename Vec<T>::type b) {
  vec_detail::exchange<step>(a, b, std::make_integer_sequence<int64_t, Vec<T>::size>());
  return a + b;
}

// Fold R vectors into one. R is a power of two, at most the number of lanes. Lane r has a part of the sum of vector r % R.
template <typename T, int R>
[[gnu::always_inline]] inline typename Vec<T>::type fold_all(const typename Vec<T>::type* rows) {
  if constexpr (R == 1)
    return rows[0];
  else
    return fold<T, R / 2>(fold_all<T, R / 2>(rows), fold_all<T, R / 2>(rows + R / 2));
}

// Return the sums over the lanes of R vectors.
template <typename T, int R>
[[gnu::always_inline]] inline void sums_of(const typename Vec<T>::type* rows, T* out) {
  if constexpr (R == 1 || R > Vec<T>::size) {
    for (int r = 0; r < R; ++r) out[r] = sum_of<T>(rows[r]);
  } else {
    auto sums = fold_all<T, R>(rows);
    for (Integer<T> step = R; step < Vec<T>::size; step *= 2) sums += __builtin_shuffle(sums, lane_numbers<T>() ^ step);
    for (int r = 0; r < R; ++r) out[r] = sums[r];
  }
}

// One network's logits in the compute type: [batch][stride], with zeros behind the last class. On demand also in groups of as
// many samples as a vector has lanes: [groups][classes][lanes].
template <typename T>
class Logits {
  using V = typename Vec<T>::type;
  static constexpr int64_t lanes = Vec<T>::size;

 public:
  int64_t batch, classes, stride, groups;

  Logits(const Tensor& tensor, T* memory, bool grouped = false)
      : batch(tensor.size(0)),
        classes(tensor.size(1)),
        stride(padded(classes)),
        groups(grouped ? padded(batch) / lanes : 0),
        numbers_(memory),
        smallest_(batch),
        largest_(batch) {
    with_element_type(tensor, [&](auto element) {
      read(static_cast<const decltype(element)*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1));
    });
    if (grouped)
      for (int64_t g = 0; g < groups; ++g) fill_group(g);
    else
      for (int64_t s = 0; s < batch; ++s) find_extremes(s);
  }

  static int64_t padded(int64_t count) { return round_up(count, lanes); }
  static int64_t size(const Tensor& tensor, bool grouped = false) {
    const int64_t batch = tensor.size(0), classes = tensor.size(1);
    return batch * padded(classes) + (grouped ? padded(batch) * (padded(classes) + 2) : 0);
  }
  // Return whether samples fill the lanes better than classes, and the exponentials of one row fit into a cache for all
  // samples.
  static bool suits_groups(int64_t batch, int64_t classes) {
    return padded(batch) * classes <= std::min(batch * padded(classes), kGroupedElements);
  }

  const T* sample(int64_t s) const { return numbers_ + s * stride; }
  const T* group(int64_t g) const { return numbers_ + batch * stride + g * (stride + 2) * lanes; }
  // Return the logits that have the largest products with the logits `z`.
  V partners(int64_t g, V z) const {
    const T* extremes = group(g) + stride * lanes;
    return z >= T(0) ? load<T>(extremes + lanes) : load<T>(extremes);
  }
  // Return the class whose logit has the largest product with z.
  int64_t partner(int64_t s, T z) const { return z >= 0 ? largest_[s] : smallest_[s]; }
  bool finite(int64_t s) const { return smallest_[s] >= 0; }
  bool finite() const {
    for (int64_t s = 0; s < batch; ++s)
      if (!finite(s)) return false;
    return true;
  }

 private:
  template <typename Element>
  void read(const Element* source, int64_t row, int64_t column) {
    for (int64_t s = 0; s < batch; ++s) {
      T* out = numbers_ + s * stride;
      widen(source + s * row, column, classes, out);
      std::fill(out + classes, out + stride, T(0));
    }
  }

  void find_extremes(int64_t s) {
    const T* z = sample(s);
    V smallest = V{} + z[0], largest = smallest, nan{};
    for_vectors<T>(0, classes, [&](int64_t j, int64_t count) {
      const V z_j = load_first<T>(z + j, count, z[0]);
      smallest = lesser(smallest, z_j);
      largest = greater(largest, z_j);
      nan += z_j * T(0);
    });
    const bool finite = sum_of<T>(nan) == 0;
    smallest_[s] = finite ? std::find(z, z + classes, reduce<T>(smallest, lesser)) - z : -1;
    largest_[s] = finite ? std::find(z, z + classes, reduce<T>(largest, greater)) - z : -1;
  }

  // The smallest and the largest logits stand behind the classes. Missing samples are zeros.
  void fill_group(int64_t g) {
    T* out = numbers_ + (group(g) - numbers_);
    for (int64_t j = 0; j < classes; j += lanes)
      transpose_block<T>(sample(g * lanes) + j, stride, std::min(lanes, batch - g * lanes), 1, out + j * lanes, lanes);
    find_extremes_of_group(g, out);
  }

  void find_extremes_of_group(int64_t g, T* out) {
    V smallest = load<T>(out), largest = smallest, nan{};
    Mask<T> at_smallest{}, at_largest{};
    for (int64_t j = 0; j < classes; ++j) {
      const V z_j = load<T>(out + j * lanes);
      const Mask<T> below = z_j < smallest;
      const Mask<T> above = z_j > largest;
      const Mask<T> here = Mask<T>{} + Integer<T>(j);
      smallest = below ? z_j : smallest;
      largest = above ? z_j : largest;
      at_smallest = below ? here : at_smallest;
      at_largest = above ? here : at_largest;
      nan += z_j * T(0);
    }
    store<T>(out + stride * lanes, smallest);
    store<T>(out + (stride + 1) * lanes, largest);
    for (int64_t s = g * lanes; s < std::min(batch, (g + 1) * lanes); ++s) {
      const int64_t lane = s - g * lanes;
      smallest_[s] = nan[lane] == 0 ? at_smallest[lane] : -1;
      largest_[s] = nan[lane] == 0 ? at_largest[lane] : -1;
    }
  }

  static V lesser(V a, V b) { return a < b ? a : b; }
  static V greater(V a, V b) { return a > b ? a : b; }

  T* numbers_;
  std::vector<int64_t> smallest_, largest_;  // classes; -1 if not all logits are finite
};

// A - max A for a row z_i z of A, from the difference of the logits. Products of confident logits are in the hundreds. If they
// were rounded first, the difference would lose its digits. Products of the largest logits would overflow.
template <typename T>
struct BelowMax {
  using V = typename Vec<T>::type;

  V factor, factor_log2e, partner;

  BelowMax(V factor, V partner) : factor(factor), factor_log2e(factor * kLog2e<T>), partner(partner) {}
  V operator()(V z_j) const { return (z_j - partner) * factor; }
  // The power of 2 that is its exponential.
  V exponent(V z_j) const { return (z_j - partner) * factor_log2e; }
  double exactly(T z_j) const { return (double(z_j) - partner[0]) * factor[0]; }
};

// R rows of one sample's A = z zᵀ.
template <typename T, int R>
struct Products {
  using V = typename Vec<T>::type;

  const T* z;
  int64_t classes;
  T factor[R];
  int64_t top[R];  // the class whose logit has the largest product with the factor

  Products(const Logits<T>& logits, int64_t s, int64_t first) : z(logits.sample(s)), classes(logits.classes) {
    for (int r = 0; r < R; ++r) {
      factor[r] = classes == 1 ? T(0) : z[first + r];  // the softmax of one number is exactly 1
      top[r] = logits.partner(s, factor[r]);
    }
  }

  BelowMax<T> below_max(int r) const { return {V{} + factor[r], V{} + z[top[r]]}; }
  std::array<BelowMax<T>, R> below_max() const { return below_max(std::make_integer_sequence<int, R>()); }

  // Compute exp(A - max A) in rows of `stride`, with zeros behind the last class, and the inverse sums.
  [[gnu::always_inline]] void exponentials(T* out, int64_t stride, T* inverse_sums) const {
    const auto below = below_max();
    V sums[R] = {};
    int64_t j = 0;
    while (j + Vec<T>::size <= classes) {
      V block[R] = {};
      for (const int64_t end = std::min(classes, j + kBlock); j + Vec<T>::size <= end; j += Vec<T>::size) {
        const V z_j = load<T>(z + j);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const V e = exp2_nonpositive<T>(below[r].exponent(z_j));
          store<T>(out + r * stride + j, e);
          block[r] += e;
        }
      }
      for (int r = 0; r < R; ++r) sums[r] += block[r];
    }
    if (j < classes) {
      const auto inside = first_lanes<T>(classes - j);
      const V z_j = load<T>(z + j);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const V e = inside ? exp2_nonpositive<T>(below[r].exponent(z_j)) : V{};
        store<T>(out + r * stride + j, e);
        sums[r] += e;
      }
    }
    T totals[R];
    sums_of<T, R>(sums, totals);
    for (int r = 0; r < R; ++r) inverse_sums[r] = 1 / totals[r];
  }

  // Add the share of dA to the sample's gradient: z_r dA_r to all logits, and dA_r · z to logit r. dA(j, r) does not have its
  // factor scales[r] yet.
  template <typename F>
  [[gnu::always_inline]] void spread(int64_t first, int64_t stride, const T* scales, T* grad,
                                     const F& d_products) const {
    V rows[R] = {}, factors[R];
    for (int r = 0; r < R; ++r) factors[r] = V{} + factor[r] * scales[r];
    for (int64_t begin = 0; begin < stride; begin += kBlock) {
      V block[R] = {};
      for (int64_t j = begin; j < std::min(stride, begin + kBlock); j += Vec<T>::size) {
        const V z_j = load<T>(z + j);
        V column = load<T>(grad + j);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const V d = d_products(j, r);
          column += d * factors[r];
          block[r] += d * z_j;
        }
        store<T>(grad + j, column);
      }
      for (int r = 0; r < R; ++r) rows[r] += block[r];
    }
    T totals[R];
    sums_of<T, R>(rows, totals);
    for (int r = 0; r < R; ++r) grad[first + r] += totals[r] * scales[r];
  }

  // Given the exponentials and negative = -dL/dP, the sample's gradient is dA = P (mean - (negative - top)), where mean = P ·
  // (negative - top). `top` is `negative` of the largest entry. With it, nothing cancels if this entry is nearly 1.
  [[gnu::always_inline]] void means(int64_t stride, const T* e, const T* inverse, const T* negative, V* out) const {
    V dots[R] = {}, tops[R];
    for (int r = 0; r < R; ++r) tops[r] = V{} + negative[r * stride + top[r]];
    for (int64_t begin = 0; begin < stride; begin += kBlock) {
      V block[R] = {};
      for (int64_t j = begin; j < std::min(stride, begin + kBlock); j += Vec<T>::size)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const int64_t at = r * stride + j;
          block[r] += load<T>(e + at) * (load<T>(negative + at) - tops[r]);
        }
      for (int r = 0; r < R; ++r) dots[r] += block[r];
    }
    T totals[R];
    sums_of<T, R>(dots, totals);
    for (int r = 0; r < R; ++r) out[r] = V{} + totals[r] * inverse[r];
  }

  void pull_back(int64_t first, int64_t stride, const T* e, const T* inverse, const T* negative, const V* means,
                 T* grad) const {
    V mean[R], tops[R];
    for (int r = 0; r < R; ++r) {
      mean[r] = means[r];
      tops[r] = V{} + negative[r * stride + top[r]];
    }
    spread(first, stride, inverse, grad, [&](int64_t j, int r) {
      const int64_t at = r * stride + j;
      return load<T>(e + at) * (mean[r] - (load<T>(negative + at) - tops[r]));
    });
  }

 private:
  template <int... r>
  std::array<BelowMax<T>, R> below_max(std::integer_sequence<int, r...>) const {
    return {below_max(r)...};
  }
};

// The exponentials of R rows of one network, for all samples. If they do not fit in the cache, only for some samples.
template <typename T>
struct Correlations {
  T* exponentials;
  T* inverse_sums;  // batch x R
  bool kept;

  T* of(int64_t s, int R, int64_t stride) const { return exponentials + (kept ? s : s % kSamples) * R * stride; }
};

// Entries of the student's map that float cannot hold, and the exponentials of each entry for every sample.
template <typename T>
struct Colds {
  int64_t batch;
  std::vector<int64_t> positions = {};  // in the R rows
  std::vector<T> exponentials = {};     // [positions][batch]

  void put(int64_t s, T* rows) const {
    for (size_t i = 0; i < positions.size(); ++i) rows[positions[i]] = exponentials[i * batch + s];
  }
};

template <typename T, int R>
struct MapRows {
  using V = typename Vec<T>::type;
  static constexpr int count = R;

  const Logits<T>& logits;
  int64_t first;
  Correlations<T> memory;

  // Rows [first, first + R) of the map, times b.
  void add_up(T* map) const {
    const int64_t stride = logits.stride;
    std::fill(map, map + R * stride, T(0));
    for_samples([&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s)
        Products<T, R>(logits, s, first).exponentials(memory.of(s, R, stride), stride, memory.inverse_sums + s * R);
      for (int r = 0; r < R; ++r)
        for (int64_t j = 0; j < stride; j += Vec<T>::size) {
          T* entry = map + r * stride + j;
          const T* e = memory.of(begin, R, stride) + r * stride + j;
          V sum = load<T>(entry);
          for (int64_t s = begin; s < end; ++s, e += R * stride) sum += load<T>(e) * memory.inverse_sums[s * R + r];
          store<T>(entry, sum);
        }
    });
  }

  // Add the gradients of all samples, given R rows of -dL/dP, which all samples share.
  void pull_back(const T* negative, const Colds<T>& colds, T* grad) const {
    const int64_t stride = logits.stride;
    for_samples([&](int64_t begin, int64_t end) {
      V means[kSamples][R];
      for (int64_t s = begin; s < end; ++s) {
        const Products<T, R> products(logits, s, first);
        T* e = memory.of(s, R, stride);
        if (!memory.kept) products.exponentials(e, stride, memory.inverse_sums + s * R);
        colds.put(s, e);
        products.means(stride, e, memory.inverse_sums + s * R, negative, means[s - begin]);
      }
      for (int64_t s = begin; s < end; ++s)
        Products<T, R>(logits, s, first)
            .pull_back(first, stride, memory.of(s, R, stride), memory.inverse_sums + s * R, negative, means[s - begin],
                       grad + s * stride);
    });
  }

 private:
  // A few samples at a time, because the latency of one sample's sums is hidden by the other samples.
  template <typename F>
  void for_samples(const F& f) const {
    for (int64_t begin = 0; begin < logits.batch; begin += kSamples) f(begin, std::min(begin + kSamples, logits.batch));
  }
};

// One row, with the samples of a group in the lanes. Gradients have the layout of the groups.
template <typename T>
struct GroupedMapRow {
  using V = typename Vec<T>::type;
  static constexpr int count = 1;
  static constexpr int64_t lanes = Vec<T>::size;

  const Logits<T>& logits;
  int64_t first;
  Correlations<T> memory;

  // As in MapRows.
  void add_up(T* map) const {
    for (int64_t g = 0; g < logits.groups; ++g) exponentials(g);
    const int64_t groups = logits.groups, size = logits.classes * lanes;
    const T* inverse = memory.inverse_sums;
    for (int64_t j = 0; j < logits.classes; j += lanes) {
      V sums[lanes] = {};
      const int64_t width = std::min(lanes, logits.classes - j);
      for (int64_t g = 0; g < groups; ++g) {
        const T* e = memory.exponentials + g * size + j * lanes;
        const V share = load<T>(inverse + g * lanes);
        if (width == lanes)  // constant offsets keep the sums in registers
#pragma GCC unroll 16
          for (int64_t i = 0; i < lanes; ++i) sums[i] += load<T>(e + i * lanes) * share;
        else
#pragma GCC unroll 16
          for (int64_t i = 0; i < lanes; ++i) sums[i] += load<T>(e + std::min(i, width - 1) * lanes) * share;
      }
      store_first<T>(map + j, fold_all<T, lanes>(sums), width);
    }
  }

  void pull_back(const T* negative, const Colds<T>& colds, T* grad) const {
    for (int64_t g = 0; g < logits.groups; ++g) {
      const V factor = factors(g), inverse = load<T>(memory.inverse_sums + g * lanes), tops = tops_of(g, negative);
      const T* z = logits.group(g);
      T *e = of(g), *out = grad + g * logits.classes * lanes;
      put(g, colds);
      const V mean =
          sum_over_classes([&](int64_t j) { return load<T>(e + j * lanes) * (negative[j] - tops); }) * inverse;
      const V row = sum_over_classes([&](int64_t j) {
        const V d = load<T>(e + j * lanes) * (mean - (negative[j] - tops));
        store<T>(out + j * lanes, load<T>(out + j * lanes) + d * (factor * inverse));
        return d * load<T>(z + j * lanes);
      });
      store<T>(out + first * lanes, load<T>(out + first * lanes) + row * inverse);
    }
  }

 private:
  T* of(int64_t g) const { return memory.exponentials + g * logits.classes * lanes; }
  V factors(int64_t g) const { return load<T>(logits.group(g) + first * lanes); }

  void exponentials(int64_t g) const {
    const BelowMax<T> below(factors(g), logits.partners(g, factors(g)));
    const T* z = logits.group(g);
    T* out = of(g);
    const V sum = sum_over_classes([&](int64_t j) {
      const V e = exp2_nonpositive<T>(below.exponent(load<T>(z + j * lanes)));
      store<T>(out + j * lanes, e);
      return e;
    });
    // Missing samples contribute nothing.
    store<T>(memory.inverse_sums + g * lanes, first_lanes<T>(logits.batch - g * lanes) ? T(1) / sum : V{});
  }

  // `negative` of the class with the largest product, for every sample.
  V tops_of(int64_t g, const T* negative) const {
    const V factor = factors(g);
    V tops{};
    for (int64_t s = g * lanes; s < std::min(logits.batch, (g + 1) * lanes); ++s)
      tops[s - g * lanes] = negative[logits.partner(s, factor[s - g * lanes])];
    return tops;
  }

  void put(int64_t g, const Colds<T>& colds) const {
    for (size_t i = 0; i < colds.positions.size(); ++i)
      for (int64_t s = g * lanes; s < std::min(logits.batch, (g + 1) * lanes); ++s)
        of(g)[colds.positions[i] * lanes + s - g * lanes] = colds.exponentials[i * logits.batch + s];
  }

  template <typename F>
  [[gnu::always_inline]] V sum_over_classes(const F& f) const {
    V sum{};
    const int64_t classes = logits.classes;
    for (int64_t begin = 0; begin < classes; begin += kBlock) {
      const int64_t end = std::min(classes, begin + kBlock);
      V parts[4] = {};  // four independent sums hide the latency of an addition
      int64_t j = begin;
      for (; j + 4 <= end; j += 4)
#pragma GCC unroll 4
        for (int64_t i = 0; i < 4; ++i) parts[i] += f(j + i);
      for (; j < end; ++j) parts[0] += f(j);
      sum += (parts[0] + parts[1]) + (parts[2] + parts[3]);
    }
    return sum;
  }
};

}  // namespace kdkernels::icc
