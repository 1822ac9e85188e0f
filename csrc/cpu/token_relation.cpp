// Relations between the tokens of two networks, compared. A group is a head of an image, or a head of the whole batch. Its rows
// are packed, and strips of the two matrices of relations S and T are computed, compared and dropped. The comparison turns a
// strip into slopes, the derivatives of the loss with respect to its relations, and the products of slopes and rows are the
// gradients.
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

#include "../checks/token_relation.h"
#include "congruence.h"
#include "elements.h"
#include "exp.h"
#include "rows.h"
#include "strips.h"
#include "tensors.h"
#include "workspace.h"

namespace kdkernels {
namespace {

constexpr double kEps = 1e-12;    // a row with this norm or less is zero
constexpr int64_t kWhole = 1024;  // up to this number of rows, the relations of a softmax are computed once and kept
constexpr int64_t kRowsOfOneThread = 1024;  // up to this number of rows, one thread computes a whole group
constexpr int64_t kHeight = 256;            // rows of a strip: 512 are as fast, and take twice the memory
constexpr int64_t kStrip = 1 << 20;         // entries of a strip of relations between queries and keys

enum class Comparison : int64_t { mse, hinge, kl, cross_entropy };
constexpr int64_t kBothDirections = 2;  // is added to the code of a softmax comparison of rows and of columns
enum class Clip : int64_t { none, both, teacher, teacher_only };

struct Settings {
  Comparison comparison;
  Clip clip;
  int64_t heads;
  bool batch, channels, normalize, mean;
  Form form;
  double temperatures[2], margin;
  bool both_directions = false;

  bool by_rows() const { return comparison == Comparison::kl || comparison == Comparison::cross_entropy; }
};

// The relations of both networks after clipping, and 0 or 1: whether a relation was kept.
template <typename T>
struct Clipped {
  using V = typename Vec<T>::type;
  V s, t, keep_s, keep_t;

  Clipped(V of_student, V of_teacher, Clip clip) : s(of_student), t(of_teacher) {
    const V zero{}, one = zero + T(1);
    keep_s = keep_t = one;
    if (clip == Clip::none) return;
    keep_t = t < zero ? zero : one;
    if (clip != Clip::teacher_only) keep_s = s < zero ? (clip == Clip::both ? zero : keep_t) : one;
    s = keep_s != zero ? s : zero;
    t = keep_t != zero ? t : zero;
  }
};

// mse and hinge: a term per pair. The slopes are halves of the derivatives of mse, and the derivatives of hinge.
template <typename T>
struct PairTerm {
  using V = typename Vec<T>::type;
  V loss, slope_s, slope_t;

  PairTerm(V of_student, V of_teacher, const Settings& settings) {
    const Clipped<T> relations(of_student, of_teacher, settings.clip);
    const V zero{}, difference = relations.s - relations.t;
    V slope;
    if (settings.comparison == Comparison::mse) {
      loss = difference * difference;
      slope = difference;
    } else {
      const V size = difference < zero ? -difference : difference, beyond = size - T(settings.margin);
      loss = beyond <= zero ? zero : beyond;
      slope = beyond <= zero ? zero : difference < zero ? zero - T(1) : zero + T(1);
    }
    slope_s = slope * relations.keep_s;
    slope_t = -slope * relations.keep_t;
  }

  static double derivative(const Settings& settings) { return settings.comparison == Comparison::mse ? 2 : 1; }
};

// The softmax of a row in both networks: log Σ exp of its logits, and the teacher's expectation of `payoff`.
template <typename T>
struct RowSoftmax {
  typename Vec<T>::type of_student, of_teacher, expected;
};

// With this expectation and the two log Σ exp, the loss of a row is known.
template <typename V>
V payoff(V logit_s, V logit_t, bool kl) {
  return kl ? logit_t - logit_s : -logit_s;
}

// kl and cross_entropy: the terms of a pair in one row. p = exp(log_p) is the student's, q the teacher's. The terms of kl are
// q log(q/p) + p − q, whose sum over a row is the divergence. They are not negative, so they do not cancel.
template <typename T>
struct RowTerm {
  using V = typename Vec<T>::type;
  V loss, slope_s, slope_t;

  RowTerm(V logit_s, V logit_t, const RowSoftmax<T>& row, bool kl) {
    const V log_p = logit_s - row.of_student, log_q = logit_t - row.of_teacher;
    const V p = exp_nonpositive<T>(log_p), q = exp_nonpositive<T>(log_q);
    slope_t = q * (payoff(logit_s, logit_t, kl) - row.expected);
    if (!kl) {
      loss = -q * log_p;
      slope_s = p - q;
      return;
    }
    const V ratio = log_q - log_p, zero{};
    const auto near = (ratio <= T(0.5)) & (ratio >= T(-0.5));
    const V remainder = exp_remainder<T>(near ? ratio : zero);
    loss = near ? q * remainder : q * ratio + (p - q);
    slope_s = near ? q * (remainder - ratio) : p - q;
  }
};

// The logits of both networks: relations divided by temperatures.
template <typename T>
struct Logits {
  using V = typename Vec<T>::type;
  V s, t;
  Clipped<T> relations;

  Logits(V of_student, V of_teacher, const Settings& settings) : relations(of_student, of_teacher, settings.clip) {
    s = relations.s * T(1 / settings.temperatures[0]);
    t = relations.t * T(1 / settings.temperatures[1]);
  }
};

// Sums over the logits of a row: the largest, and relative to it Σ exp of both networks and Σ exp(logit_t) · payoff.
template <typename T>
struct RowSums {
  T largest_s, largest_t;
  double sum_s, sum_t, weighted;

  RowSums(const T* of_student, const T* of_teacher, int64_t length, const Settings& settings) {
    using V = typename Vec<T>::type;
    const bool kl = settings.comparison == Comparison::kl;
    const V lowest = V{} + std::numeric_limits<T>::lowest();
    V most_s = lowest, most_t = lowest;
    const auto logits = [&](int64_t j, int64_t count) {
      return Logits<T>(load_first<T>(of_student + j, count, 0), load_first<T>(of_teacher + j, count, 0), settings);
    };
    for_vectors<T>(0, length, [&](int64_t j, int64_t count) {
      const Logits<T> each = logits(j, count);
      const auto inside = first_lanes<T>(count);
      most_s = larger<T>(inside ? each.s : lowest, most_s);
      most_t = larger<T>(inside ? each.t : lowest, most_t);
    });
    const auto maximum = [](V a, V b) { return larger<T>(a, b); };
    largest_s = reduce<T>(most_s, maximum);
    largest_t = reduce<T>(most_t, maximum);
    // Short runs are added in T, and the runs in double.
    constexpr int64_t lanes = Vec<T>::size, run = 32 * lanes;
    sum_s = sum_t = weighted = 0;
    for (int64_t begin = 0; begin < length; begin += run) {
      V of_s{}, of_t{}, more{};
      for_vectors<T>(begin, std::min(length, begin + run), [&](int64_t j, int64_t count) {
        const Logits<T> each = logits(j, count);
        const auto inside = first_lanes<T>(count);
        const V weight = exp_nonpositive<T>(each.t - largest_t);
        of_s += inside ? exp_nonpositive<T>(each.s - largest_s) : V{};
        of_t += inside ? weight : V{};
        more += inside ? weight * payoff(each.s, each.t, kl) : V{};
      });
      for (int64_t lane = 0; lane < lanes; ++lane) {
        sum_s += of_s[lane];
        sum_t += of_t[lane];
        weighted += more[lane];
      }
    }
  }
};

// The row sums of symmetric matrices, from strips of their upper triangles. Every row has a slot, and there are a few more, so
// that whole vectors can be read.
template <typename T>
class Softmaxes {
  using V = typename Vec<T>::type;
  using Wide = typename Doubles<T>::type;

 public:
  std::vector<T> of_student, of_teacher, expected;  // as in RowSoftmax

  Softmaxes(int64_t rows, const Settings& settings)
      : of_student(rows + Vec<T>::size),
        of_teacher(of_student),
        expected(of_student),
        settings_(settings),
        largest_s_(rows + Vec<T>::size, std::numeric_limits<T>::lowest()),
        largest_t_(largest_s_),
        sum_s_(rows + Vec<T>::size),
        sum_t_(sum_s_),
        weighted_(sum_s_) {}

  // Add strips of a matrix that is not symmetric. Its columns have the softmaxes.
  void add_columns_of(const Strip<T, 2>& strip) { add_columns<true>(strip); }

  void add(const Strip<T, 2>& strip) {
    add_columns<false>(strip);
    strip.for_rows([&](int64_t i) {
      const auto [s, t] = strip.at(i, i);
      const RowSums<T> sums(s, t, strip.columns - i, settings_);
      const int64_t r = strip.begin + i;
      merge(largest_s_[r], sums.largest_s, {&sum_s_[r]}, {sums.sum_s});
      merge(largest_t_[r], sums.largest_t, {&sum_t_[r], &weighted_[r]}, {sums.sum_t, sums.weighted});
    });
  }

  void finish() {
    for (size_t r = 0; r + Vec<T>::size < of_student.size(); ++r) {
      of_student[r] = T(largest_s_[r] + std::log(sum_s_[r]));
      of_teacher[r] = T(largest_t_[r] + std::log(sum_t_[r]));
      expected[r] = T(weighted_[r] / sum_t_[r]);
    }
  }

  RowSoftmax<T> row(int64_t r) const { return {V{} + of_student[r], V{} + of_teacher[r], V{} + expected[r]}; }
  RowSoftmax<T> rows(int64_t r) const {
    return {load<T>(of_student.data() + r), load<T>(of_teacher.data() + r), load<T>(expected.data() + r)};
  }

 private:
  // Add sums that are relative to another maximum.
  static void merge(T& largest, T other, std::vector<double*> sums, std::vector<double> more) {
    const T both = other > largest || other != other ? other : largest;
    const double before = std::exp(double(largest) - both), now = std::exp(double(other) - both);
    for (size_t k = 0; k < sums.size(); ++k) *sums[k] = *sums[k] * before + more[k] * now;
    largest = both;
  }

  // Entry (i, j) above the diagonal belongs to row j as well. Every entry belongs to column j of a whole matrix.
  template <bool whole>
  void add_columns(const Strip<T, 2>& strip) {
    constexpr int64_t rows = 16;
    const bool kl = settings_.comparison == Comparison::kl;
    const V lowest = V{} + std::numeric_limits<T>::lowest();
    parallel_blocks(strip.columns, Vec<T>::size, 1 + (1 << 15) / strip.count, [&](int64_t j0, int64_t j1) {
      for (int64_t i0 = 0; i0 < strip.count; i0 += rows)
        for_vectors<T>(whole ? j0 : std::max(j0, i0 / Vec<T>::size * Vec<T>::size), j1, [&](int64_t j, int64_t count) {
          const int64_t end = std::min(strip.count, i0 + rows), r = strip.begin + j;
          const auto above = [&](int64_t i) { return lane_numbers<T>() > Integer<T>(whole ? -1 : i - j); };
          const auto logits = [&](int64_t i) {
            const auto [s, t] = strip.at(i, j);
            return Logits<T>(load_first<T>(s, count, 0), load_first<T>(t, count, 0), settings_);
          };
          const V before_s = load<T>(&largest_s_[r]), before_t = load<T>(&largest_t_[r]);
          V most_s = before_s, most_t = before_t;
          for (int64_t i = i0; i < end; ++i) {
            const Logits<T> each = logits(i);
            most_s = larger<T>(above(i) ? each.s : lowest, most_s);
            most_t = larger<T>(above(i) ? each.t : lowest, most_t);
          }
          V s{}, t{}, w{};
          for (int64_t i = i0; i < end; ++i) {
            const Logits<T> each = logits(i);
            const V e = exp_nonpositive<T>(each.t - most_t);
            s += above(i) ? exp_nonpositive<T>(each.s - most_s) : V{};
            t += above(i) ? e : V{};
            w += above(i) ? e * payoff(each.s, each.t, kl) : V{};
          }
          const V factor_s = exp_nonpositive<T>(before_s - most_s), factor_t = exp_nonpositive<T>(before_t - most_t);
          add_to(sum_s_, r, factor_s, s);
          add_to(sum_t_, r, factor_t, t);
          add_to(weighted_, r, factor_t, w);
          store<T>(&largest_s_[r], most_s);
          store<T>(&largest_t_[r], most_t);
        });
    });
  }

  static void add_to(std::vector<double>& sums, int64_t r, V factor, V more) {
    Wide sum;
    std::memcpy(&sum, &sums[r], sizeof(sum));
    sum = sum * __builtin_convertvector(factor, Wide) + __builtin_convertvector(more, Wide);
    std::memcpy(&sums[r], &sum, sizeof(sum));
  }

  Settings settings_;
  std::vector<T> largest_s_, largest_t_;
  std::vector<double> sum_s_, sum_t_, weighted_;
};

// The rows of one input in one group, and the gradient to them, which is null if it is not wanted. Both are compact.
template <typename T>
struct Side {
  Operand<T> rows;
  T* gradient;
};

// Relations of one input with itself. All return the loss.
template <typename T>
class Symmetric {
  using V = typename Vec<T>::type;

 public:
  Symmetric(int64_t rows, const Side<T>& student, const Side<T>& teacher, double factor, const Settings& settings)
      : rows_(rows),
        x_(student),
        y_(teacher),
        grad_x_{x_.gradient, x_.rows.width},
        grad_y_{y_.gradient, y_.rows.width},
        factor_(factor),
        settings_(settings) {}

  double run() {
    if (settings_.comparison == Comparison::mse && settings_.clip == Clip::none) return squares();
    return settings_.by_rows() ? by_rows() : by_pairs();
  }

 private:
  double squares() const {
    const Congruence<T> problem{x_.rows.rows,
                                y_.rows.rows,
                                rows_,
                                x_.rows.width,
                                y_.rows.width,
                                1,
                                {factor_, 0, 0, 0},
                                {settings_.form, Form::gram, Form::gram}};
    return problem.run(grad_x_.data, grad_y_.data);
  }

  // Every pair occurs twice, except on the diagonal.
  double by_pairs() {
    const double alpha = 2 * factor_ * PairTerm<T>::derivative(settings_);
    Strips<T, 2> strips(rows_, std::min(kHeight, strip_height(rows_)), {{{&x_.rows, nullptr}, {&y_.rows, nullptr}}},
                        targets(alpha, alpha));
    return factor_ * strips.run([&](int64_t, int64_t length, const std::array<T*, 2>& entries) {
      double diagonal = 0;
      const double total = sum_vectors<T>(0, length, [&](int64_t j, int64_t count) {
        const PairTerm<T> term(load_first<T>(entries[0] + j, count, 0), load_first<T>(entries[1] + j, count, 0),
                               settings_);
        if (j == 0) diagonal = term.loss[0];
        if (grad_x_.data) store_first<T>(entries[0] + j, term.slope_s, count);
        if (grad_y_.data) store_first<T>(entries[1] + j, term.slope_t, count);
        return term.loss;
      });
      return 2 * total - diagonal;
    });
  }

  // Pair (i, j) has a term in row i and a term in row j.
  double by_rows() {
    const bool kl = settings_.comparison == Comparison::kl;
    const int64_t height = rows_ <= kWhole ? rows_ : std::min(kHeight, strip_height(rows_));
    Strips<T, 2> strips(rows_, height, {{{&x_.rows, nullptr}, {&y_.rows, nullptr}}},
                        targets(factor_ / settings_.temperatures[0], factor_ / settings_.temperatures[1]));
    Softmaxes<T> softmaxes(rows_, settings_);
    strips.for_each([&](const Strip<T, 2>& strip) { softmaxes.add(strip); });
    softmaxes.finish();
    return factor_ * strips.run([&](int64_t r, int64_t length, const std::array<T*, 2>& entries) {
      const RowSoftmax<T> row = softmaxes.row(r);
      double diagonal = 0;
      const double total = sum_vectors<T>(0, length, [&](int64_t j, int64_t count) {
        const Logits<T> logits(load_first<T>(entries[0] + j, count, 0), load_first<T>(entries[1] + j, count, 0),
                               settings_);
        const RowTerm<T> own(logits.s, logits.t, row, kl), other(logits.s, logits.t, softmaxes.rows(r + j), kl);
        if (j == 0) diagonal = other.loss[0];
        const Clipped<T>& kept = logits.relations;
        if (grad_x_.data) store_first<T>(entries[0] + j, (own.slope_s + other.slope_s) * kept.keep_s, count);
        if (grad_y_.data) store_first<T>(entries[1] + j, (own.slope_t + other.slope_t) * kept.keep_t, count);
        return own.loss + other.loss;
      });
      return total - diagonal;
    });
  }

  std::vector<Target<T>> targets(double of_x, double of_y) {
    std::vector<Target<T>> result;
    if (grad_x_.data) result.push_back({x_.rows, &grad_x_, T(of_x), 0});
    if (grad_y_.data) result.push_back({y_.rows, &grad_y_, T(of_y), 1});
    return result;
  }

  int64_t rows_;
  Side<T> x_, y_;
  Gradient<T> grad_x_, grad_y_;
  double factor_;
  Settings settings_;
};

// Relations of queries with keys. A strip holds whole rows, so nothing is computed twice. The softmaxes of columns need all
// strips before the first loss, so for both directions, strips are computed twice.
template <typename T>
class Pairs {
  using V = typename Vec<T>::type;

 public:
  int64_t rows, columns;
  std::array<Side<T>, 2> student, teacher;  // queries and keys
  double factor, factor_of_columns;
  Settings settings;

  double run() const {
    const int64_t height = std::min(rows, std::clamp<int64_t>(round_up(kStrip / columns, 32), 32, 512));
    const int64_t line = spread<T>(columns);
    T* memory = workspace<T, Scratch::strip>(2 * height * line);
    Strip<T, 2> strip{0, 0, columns, line, {memory, memory + height * line}};
    std::vector<RowSoftmax<T>> of_rows(settings.both_directions ? rows : 0);
    std::optional<Softmaxes<T>> of_columns;
    if (settings.both_directions) {
      of_columns.emplace(columns, settings);
      for (int64_t begin = 0; begin < rows; begin += height) {
        relate(begin, height, strip);
        of_columns->add_columns_of(strip);
        for_rows(strip, [&](int64_t i, T* s, T* t) { of_rows[begin + i] = softmax(s, t); });
      }
      of_columns->finish();
    }
    Buffer<double> losses(height);
    double loss = 0;
    for (int64_t begin = 0; begin < rows; begin += height) {
      if (!settings.both_directions || height < rows) relate(begin, height, strip);
      for_rows(strip, [&](int64_t i, T* s, T* t) {
        losses.data()[i] = settings.both_directions ? row(s, t, of_rows[begin + i], *of_columns) : row(s, t);
      });
      loss = std::accumulate(losses.data(), losses.data() + strip.count, loss);
      for (int64_t k = 0; k < 2; ++k) add_gradients(begin, strip.count, {strip.entries[k], line, 1}, k);
    }
    return factor * loss;
  }

 private:
  // Compute the relations of up to `height` rows.
  void relate(int64_t begin, int64_t height, Strip<T, 2>& strip) const {
    strip.count = std::min(height, rows - begin);
    for (int64_t k = 0; k < 2; ++k) {
      const auto& [queries, keys] = k == 0 ? student : teacher;
      gemm<T>(strip.count, columns, queries.rows.width, queries.rows.rows.from(begin, 0), keys.rows.rows.transposed(),
              strip.entries[k], strip.line);
    }
  }

  template <typename F>
  void for_rows(const Strip<T, 2>& strip, const F& f) const {
    strip.for_rows([&](int64_t i) {
      const auto [s, t] = strip.at(i, 0);
      f(i, s, t);
    });
  }

  RowSoftmax<T> softmax(const T* of_student, const T* of_teacher) const {
    const RowSums<T> sums(of_student, of_teacher, columns, settings);
    return {V{} + T(sums.largest_s + std::log(sums.sum_s)), V{} + T(sums.largest_t + std::log(sums.sum_t)),
            V{} + T(sums.weighted / sums.sum_t)};
  }

  // Turn relations into slopes. terms(s, t, j) returns a loss and two slopes.
  template <typename Terms>
  double each(T* of_student, T* of_teacher, const Terms& terms) const {
    return sum_vectors<T>(0, columns, [&](int64_t j, int64_t count) {
      const V s = load_first<T>(of_student + j, count, 0), t = load_first<T>(of_teacher + j, count, 0);
      const auto [loss, slope_s, slope_t] = terms(s, t, j);
      store_first<T>(of_student + j, slope_s, count);
      store_first<T>(of_teacher + j, slope_t, count);
      return loss;
    });
  }

  // Turn a row of relations into its loss and its slopes.
  double row(T* of_student, T* of_teacher) const {
    if (!settings.by_rows())
      return each(of_student, of_teacher, [&](V s, V t, int64_t) {
        const PairTerm<T> term(s, t, settings);
        return std::tuple(term.loss, term.slope_s, term.slope_t);
      });
    const bool kl = settings.comparison == Comparison::kl;
    const RowSoftmax<T> own = softmax(of_student, of_teacher);
    return each(of_student, of_teacher, [&](V s, V t, int64_t) {
      const Logits<T> logits(s, t, settings);
      const RowTerm<T> term(logits.s, logits.t, own, kl);
      return std::tuple(term.loss, term.slope_s * logits.relations.keep_s, term.slope_t * logits.relations.keep_t);
    });
  }

  // The same for the softmaxes of rows and of columns. Each has half of the loss.
  double row(T* of_student, T* of_teacher, const RowSoftmax<T>& own, const Softmaxes<T>& of_columns) const {
    const bool kl = settings.comparison == Comparison::kl;
    const T weight = T(0.5), other_weight = T(0.5 * factor_of_columns / factor);
    return each(of_student, of_teacher, [&](V s, V t, int64_t j) {
      const Logits<T> logits(s, t, settings);
      const RowTerm<T> term(logits.s, logits.t, own, kl), other(logits.s, logits.t, of_columns.rows(j), kl);
      const Clipped<T>& kept = logits.relations;
      return std::tuple(weight * term.loss + other_weight * other.loss,
                        (weight * term.slope_s + other_weight * other.slope_s) * kept.keep_s,
                        (weight * term.slope_t + other_weight * other.slope_t) * kept.keep_t);
    });
  }

  void add_gradients(int64_t begin, int64_t count, View<T> slopes, int64_t network) const {
    const auto& [queries, keys] = network == 0 ? student : teacher;
    const double derivative =
        settings.by_rows() ? 1 / settings.temperatures[network] : PairTerm<T>::derivative(settings);
    const T alpha = T(factor * derivative);
    const int64_t width = queries.rows.width;
    if (queries.gradient)
      gemm<T>(count, width, columns, slopes, keys.rows.rows, queries.gradient + begin * width, width, {alpha, false});
    if (keys.gradient)
      gemm<T>(columns, width, count, slopes.transposed(), queries.rows.rows.from(begin, 0), keys.gradient, width,
              {alpha, begin > 0});
  }
};

// The tokens of one input, b x n x c or b x c x h x w, in any strides.
struct Tokens {
  Tensor tensor;
  int64_t images, count, channels;

  explicit Tokens(const Tensor& x)
      : tensor(x),
        images(x.size(0)),
        count(token_relation_checks::tokens_of(x)),
        channels(token_relation_checks::channels_of(x)) {}

  int64_t channel_stride() const { return tensor.stride(tensor.dim() == 4 ? 1 : 2); }

  // Token `position` of the batch begins at this element.
  int64_t offset(int64_t position) const {
    const int64_t token = position % count, first = position / count * tensor.stride(0);
    if (tensor.dim() == 3) return first + token * tensor.stride(1);
    return first + token / tensor.size(3) * tensor.stride(2) + token % tensor.size(3) * tensor.stride(3);
  }

  // A gradient in the memory format of the samples.
  template <typename T>
  Tensor new_gradient(bool wanted) const {
    using torch::headeronly::MemoryFormat;
    if (!wanted) return new_compact(tensor, {0}, kScalarType<T>);
    const auto sizes = tensor.sizes();
    return torch::stable::empty(std::vector<int64_t>(sizes.begin(), sizes.end()), kScalarType<T>, std::nullopt,
                                tensor.device(), std::nullopt,
                                channels_last() ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  }

 private:
  bool channels_last() const {
    if (tensor.dim() != 4 || channels == 1 || count == 1) return false;
    const auto has = [&](int64_t d, int64_t stride) { return tensor.size(d) == 1 || tensor.stride(d) == stride; };
    return has(1, 1) && has(3, channels) && has(2, channels * tensor.size(3));
  }
};

// Call f(t, k) for tokens t and channels k, in an order that reads neighbours of memory together.
template <typename F>
void for_tokens(int64_t tokens, int64_t channels, bool channels_inside, const F& f) {
  constexpr int64_t block = 16, chunk = 64;
  parallel_blocks(tokens, block, 1 + (1 << 15) / channels, [&](int64_t begin, int64_t end) {
    if (channels_inside) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t k = 0; k < channels; ++k) f(t, k);
      return;
    }
    for (int64_t t0 = begin; t0 < end; t0 += block)
      for (int64_t k0 = 0; k0 < channels; k0 += chunk)
        for (int64_t k = k0; k < std::min(channels, k0 + chunk); ++k)
          for (int64_t t = t0; t < std::min(end, t0 + block); ++t) f(t, k);
  });
}

// One input of one network: its tokens, their gradient, and scratch memory for the rows of a group.
template <typename T, Scratch rows_memory, Scratch gradient_memory, Scratch norms_memory>
class Input {
 public:
  Input(const Tensor& x, bool wanted, const Settings& settings)
      : tokens_(x), gradient_(tokens_.new_gradient<T>(wanted)), wanted_(wanted), settings_(settings) {}

  const Tensor& gradient() const { return gradient_; }
  int64_t width() const { return tokens_.channels / settings_.heads; }

  // The gradient of masked tokens is 0.
  void clear() const {
    if (wanted_) std::fill_n(gradient_.mutable_data_ptr<T>(), gradient_.numel(), T(0));
  }

  // Pack the rows of a head of some tokens, and normalise them.
  Side<T> side(const std::vector<int64_t>& positions, int64_t head, bool whole) const {
    const int64_t tokens = positions.size(), channels = width(), size = tokens * channels;
    const int64_t rows = settings_.channels ? channels : tokens, length = settings_.channels ? tokens : channels;
    T* packed = memory<rows_memory>(rows_, size, rows);
    pack(positions, head, packed);
    if (settings_.normalize) {
      T* norms = workspace<T, norms_memory>(rows);
      parallel_blocks(rows, 1, 1 + (1 << 15) / length, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) norms[r] = normalise(packed + r * length, length, kEps);
      });
    }
    T* out = nullptr;
    if (wanted_)
      out = in_place(whole) ? gradient_.mutable_data_ptr<T>() + positions[0] * channels
                            : memory<gradient_memory>(gradient_rows_, size, rows);
    return {{{packed, length, 1}, length}, out};
  }

  // Take the gradient to the packed rows back to the tokens.
  void take_back(const Side<T>& side, const std::vector<int64_t>& positions, int64_t head, bool whole) const {
    if (!wanted_) return;
    const int64_t tokens = positions.size(), channels = width(), length = side.rows.width;
    const int64_t rows = settings_.channels ? channels : tokens;
    if (settings_.normalize) {
      const T* norms = workspace<T, norms_memory>(rows);
      parallel_blocks(rows, 1, 1 + (1 << 14) / length, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          T* gradient = side.gradient + r * length;
          denormalise_row(gradient, side.rows.rows.at(r, 0), norms[r], length, gradient);
        }
      });
    }
    if (in_place(whole)) return;
    const Tokens of_gradient(gradient_);
    const std::vector<int64_t> offsets = offsets_of(of_gradient, positions);
    const int64_t stride = of_gradient.channel_stride(), token = settings_.channels ? 1 : channels,
                  channel = settings_.channels ? tokens : 1;
    T* out = gradient_.mutable_data_ptr<T>() + head * channels * stride;
    for_tokens(tokens, channels, stride == 1,
               [&](int64_t t, int64_t k) { out[offsets[t] + k * stride] = side.gradient[t * token + k * channel]; });
  }

 private:
  // Threads that work on small groups keep their own scratch memory. The memory of a large group is freed at the end.
  template <Scratch use>
  static T* memory(Buffer<T>& own, int64_t size, int64_t rows) {
    if (rows <= kRowsOfOneThread) return workspace<T, use>(size);
    if (own.size() < size) own = Buffer<T>(size);
    return own.data();
  }

  static std::vector<int64_t> offsets_of(const Tokens& tokens, const std::vector<int64_t>& positions) {
    std::vector<int64_t> offsets(positions.size());
    for (size_t t = 0; t < positions.size(); ++t) offsets[t] = tokens.offset(positions[t]);
    return offsets;
  }

  // Whether the rows of the gradient are the tokens of the gradient tensor, with nothing between them.
  bool in_place(bool whole) const {
    return whole && !settings_.channels && settings_.heads == 1 &&
           (tokens_.channels == 1 || Tokens(gradient_).channel_stride() == 1);
  }

  void pack(const std::vector<int64_t>& positions, int64_t head, T* packed) const {
    const std::vector<int64_t> offsets = offsets_of(tokens_, positions);
    const int64_t tokens = positions.size(), channels = width(), stride = tokens_.channel_stride();
    with_element_type(tokens_.tensor, [&](auto type) {
      using E = decltype(type);
      const E* data = static_cast<const E*>(tokens_.tensor.const_data_ptr()) + head * channels * stride;
      if (settings_.channels)
        for_tokens(tokens, channels, stride == 1,
                   [&](int64_t t, int64_t k) { packed[k * tokens + t] = T(data[offsets[t] + k * stride]); });
      else if (stride == 1)
        parallel_blocks(tokens, 1, 1 + (1 << 15) / channels, [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; ++t) widen(data + offsets[t], 1, channels, packed + t * channels);
        });
      else
        for_tokens(tokens, channels, false,
                   [&](int64_t t, int64_t k) { packed[t * channels + k] = T(data[offsets[t] + k * stride]); });
    });
  }

  Tokens tokens_;
  Tensor gradient_;
  bool wanted_;
  Settings settings_;
  mutable Buffer<T> rows_, gradient_rows_;
};

template <typename T>
using Student = Input<T, Scratch::rows_x, Scratch::gradient_x, Scratch::norms_x>;
template <typename T>
using Teacher = Input<T, Scratch::rows_y, Scratch::gradient_y, Scratch::norms_y>;
template <typename T>
using StudentKeys = Input<T, Scratch::keys_x, Scratch::gradient_keys_x, Scratch::norms_keys_x>;
template <typename T>
using TeacherKeys = Input<T, Scratch::keys_y, Scratch::gradient_keys_y, Scratch::norms_keys_y>;

// The tokens that count, in every image, or in the batch.
std::vector<std::vector<int64_t>> kept(const Tokens& tokens, const std::optional<Tensor>& mask, bool batch) {
  std::vector<std::vector<int64_t>> result(batch ? 1 : tokens.images);
  std::vector<double> counts(mask ? tokens.count : 0);
  for (int64_t i = 0; i < tokens.images; ++i) {
    if (mask) Elements(*mask).read(i, 0, tokens.count, counts.data());
    for (int64_t p = 0; p < tokens.count; ++p)
      if (!mask || counts[p] != 0) result[batch ? 0 : i].push_back(i * tokens.count + p);
  }
  return result;
}

// Rows of a group with these tokens. Without tokens, it has none.
int64_t rows_of(const std::vector<int64_t>& positions, int64_t width, const Settings& settings) {
  return settings.channels && !positions.empty() ? width : int64_t(positions.size());
}

// Run f(image, head, factor, factor of columns) on every group, and return the sum. The factors of a group without rows or
// columns are not needed.
template <typename Sizes, typename F>
double over_groups(int64_t images, const Settings& settings, const Sizes& sizes, const F& f) {
  double terms = 0, terms_of_columns = 0;
  int64_t most = 0;
  for (int64_t i = 0; i < images; ++i) {
    const auto [rows, columns] = sizes(i);
    terms += settings.by_rows() ? double(columns > 0 ? rows : 0) : double(rows) * columns;
    terms_of_columns += rows > 0 ? columns : 0;
    most = std::max({most, rows, columns});
  }
  if (terms == 0) return 0;
  const double factor = settings.mean ? 1 / (terms * settings.heads) : 1;
  const double factor_of_columns = settings.mean ? 1 / (terms_of_columns * settings.heads) : 1;
  const int64_t groups = images * settings.heads;
  Buffer<double> losses(groups);
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const auto [rows, columns] = sizes(g / settings.heads);
      losses.data()[g] =
          rows > 0 && columns > 0 ? f(g / settings.heads, g % settings.heads, factor, factor_of_columns) : 0;
    }
  };
  // Few large groups are computed one after the other by all threads, so that only one of them is packed.
  if (most <= kRowsOfOneThread)
    parallel_blocks(groups, 1, 1, run);
  else
    run(0, groups);
  return std::accumulate(losses.data(), losses.data() + groups, 0.0);
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> run(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                                       const Settings& settings, bool grad_student, bool grad_teacher) {
  const Student<T> x(student, grad_student, settings);
  const Teacher<T> y(teacher, grad_teacher, settings);
  const auto of_x = kept(Tokens(student), mask, settings.batch), of_y = kept(Tokens(teacher), mask, settings.batch);
  const bool whole = !mask;
  if (!whole) {
    x.clear();
    y.clear();
  }
  const auto rows = [&](int64_t i) { return rows_of(of_x[i], x.width(), settings); };
  const double loss = over_groups(
      of_x.size(), settings, [&](int64_t i) { return std::pair(rows(i), rows(i)); },
      [&](int64_t i, int64_t head, double factor, double) {
        const Side<T> own = x.side(of_x[i], head, whole), other = y.side(of_y[i], head, whole);
        const double loss = Symmetric<T>(rows(i), own, other, factor, settings).run();
        x.take_back(own, of_x[i], head, whole);
        y.take_back(other, of_y[i], head, whole);
        return loss;
      });
  return {new_scalar<T>(student, loss), x.gradient(), y.gradient()};
}

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
FiveTensors run_pairs(const std::array<Tensor, 4>& inputs, const std::optional<Tensor>& mask,
                      const std::optional<Tensor>& key_mask, const Settings& settings,
                      const std::array<bool, 4>& wanted) {
  const auto& [student, student_keys, teacher, teacher_keys] = inputs;
  const Student<T> x(student, wanted[0], settings);
  const StudentKeys<T> x_keys(student_keys, wanted[1], settings);
  const Teacher<T> y(teacher, wanted[2], settings);
  const TeacherKeys<T> y_keys(teacher_keys, wanted[3], settings);
  const auto of_x = kept(Tokens(student), mask, settings.batch), of_y = kept(Tokens(teacher), mask, settings.batch);
  const auto of_x_keys = kept(Tokens(student_keys), key_mask, settings.batch),
             of_y_keys = kept(Tokens(teacher_keys), key_mask, settings.batch);
  const bool whole = !mask, whole_keys = !key_mask;
  if (!whole || !whole_keys) {  // an image without keys gives no gradient to its queries either
    x.clear();
    y.clear();
    x_keys.clear();
    y_keys.clear();
  }
  const auto sizes = [&](int64_t i) {
    return std::pair(rows_of(of_x[i], x.width(), settings), rows_of(of_x_keys[i], x_keys.width(), settings));
  };
  const double loss =
      over_groups(of_x.size(), settings, sizes, [&](int64_t i, int64_t head, double factor, double factor_of_columns) {
        const Side<T> own = x.side(of_x[i], head, whole), own_keys = x_keys.side(of_x_keys[i], head, whole_keys),
                      other = y.side(of_y[i], head, whole), other_keys = y_keys.side(of_y_keys[i], head, whole_keys);
        const auto [rows, columns] = sizes(i);
        const double loss =
            Pairs<T>{rows, columns, {own, own_keys}, {other, other_keys}, factor, factor_of_columns, settings}.run();
        x.take_back(own, of_x[i], head, whole);
        x_keys.take_back(own_keys, of_x_keys[i], head, whole_keys);
        y.take_back(other, of_y[i], head, whole);
        y_keys.take_back(other_keys, of_y_keys[i], head, whole_keys);
        return loss;
      });
  return {new_scalar<T>(student, loss), x.gradient(), x_keys.gradient(), y.gradient(), y_keys.gradient()};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> token_relation(const Tensor& student, const Tensor& teacher,
                                                  const std::optional<Tensor>& mask, int64_t comparison, int64_t clip,
                                                  int64_t heads, bool batch, bool channels, bool normalize, bool mean,
                                                  int64_t form, double student_temperature, double teacher_temperature,
                                                  double margin, bool grad_student, bool grad_teacher) {
  check_token_relation(student, teacher, mask, comparison, clip, heads, channels, form, student_temperature,
                       teacher_temperature, margin, grad_teacher);
  const Settings settings{Comparison(comparison),
                          Clip(clip),
                          heads,
                          batch,
                          channels,
                          normalize,
                          mean,
                          Form(form),
                          {student_temperature, teacher_temperature},
                          margin};
  return (any_double({student, teacher}) ? run<double> : run<float>)(student, teacher, mask, settings, grad_student,
                                                                     grad_teacher);
}

FiveTensors token_relation_pairs(const Tensor& student, const Tensor& student_keys, const Tensor& teacher,
                                 const Tensor& teacher_keys, const std::optional<Tensor>& mask,
                                 const std::optional<Tensor>& key_mask, int64_t comparison, int64_t clip, int64_t heads,
                                 bool batch, bool channels, bool normalize, bool mean, double student_temperature,
                                 double teacher_temperature, double margin, bool grad_student, bool grad_student_keys,
                                 bool grad_teacher, bool grad_teacher_keys) {
  check_token_relation_pairs(student, student_keys, teacher, teacher_keys, mask, key_mask, comparison, clip, heads,
                             channels, student_temperature, teacher_temperature, margin);
  const bool both_directions = comparison > int64_t(Comparison::cross_entropy);
  const Settings settings{Comparison(both_directions ? comparison - kBothDirections : comparison),
                          Clip(clip),
                          heads,
                          batch,
                          channels,
                          normalize,
                          mean,
                          Form::gram,
                          {student_temperature, teacher_temperature},
                          margin,
                          both_directions};
  const std::array<Tensor, 4> inputs = {student, student_keys, teacher, teacher_keys};
  return (any_double({student, student_keys, teacher, teacher_keys})
              ? run_pairs<double>
              : run_pairs<float>)(inputs, mask, key_mask, settings,
                                  {grad_student, grad_student_keys, grad_teacher, grad_teacher_keys});
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  // comparison: 0 mse, 1 hinge, 2 kl, 3 cross_entropy; of pairs, 4 and 5 are the mean of 2 and 3 over the rows' softmaxes and
  // the columns' softmaxes. clip: 0 none, 1 both, 2 teacher, 3 teacher_only. form: a form code for mse.
  m.def(
      "token_relation(Tensor student, Tensor teacher, Tensor? mask, int comparison, int clip, int heads, bool batch,"
      " bool channels, bool normalize, bool mean, int form, float student_temperature, float teacher_temperature,"
      " float margin, bool grad_student, bool grad_teacher) -> (Tensor loss, Tensor grad_student, Tensor "
      "grad_teacher)");
  m.def(
      "token_relation_pairs(Tensor student, Tensor student_keys, Tensor teacher, Tensor teacher_keys, Tensor? mask,"
      " Tensor? key_mask, int comparison, int clip, int heads, bool batch, bool channels, bool normalize, bool mean,"
      " float student_temperature, float teacher_temperature, float margin, bool grad_student, bool grad_student_keys,"
      " bool grad_teacher, bool grad_teacher_keys) -> (Tensor loss, Tensor grad_student, Tensor grad_student_keys,"
      " Tensor grad_teacher, Tensor grad_teacher_keys)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("token_relation", TORCH_BOX(&kdkernels::token_relation));
  m.impl("token_relation_pairs", TORCH_BOX(&kdkernels::token_relation_pairs));
}
