// Inter-class correlation: P = softmax of the rows of every sample's A = z zᵀ, their mean M over the samples, and
// divergences.
//
// A team of lanes holds a piece of one row of the map and processes all samples. If the row is not longer than the
// piece, the exponentials of the softmax's denominator are still in registers when the entries need them. So the map
// takes one exponential per entry and sample. The gradient takes two more: the same teams make one pass by rows of P,
// and a second kernel makes one pass by columns. The derivatives with respect to the map are held for some rows at a
// time. Logarithms have base 2.
#pragma once

#include "group.cuh"
#include "logits.cuh"
#include "tuning.cuh"

namespace kdkernels {

constexpr int kIccWarps = kIccThreads / kWarp;
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// Entries of the student's map below kLost have lost digits. This matters if the teacher's entry is not below kFaint.
// Such an entry is called cold, and its logarithm is kept.
template <typename T>
inline constexpr T kLost = sizeof(T) == sizeof(float) ? T(0x1p-80) : T(0x1p-900);
template <typename T>
inline constexpr T kFaint = sizeof(T) == sizeof(float) ? T(0x1p-60) : T(0x1p-200);

// Neighbours in memory that are read together.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize] = {};

  static __device__ Pack load(const T* data) { return *reinterpret_cast<const Pack*>(data); }
};

// The part of a row that a lane holds.
template <typename T>
inline constexpr int kIccPacks = sizeof(T) == sizeof(float) ? 8 : 2;
template <typename T>
inline constexpr int kIccHeld = kIccPacks<T> * Pack<T>::kSize;

// The smallest and largest logit of a sample, and the first classes that have them.
template <typename T>
struct Extremes {
  T smallest, largest;
  int at_smallest, at_largest;
};

// Per row i of one sample's P. `top` is the derivative of the largest entry. `mean` is the mean derivative of the row,
// minus `top`. Before these are known, `mean` is the mean of the logits, minus the logit of the largest entry.
template <typename T>
struct alignas(16) RowTerm {
  T z, log_sum, top, mean;
};

template <typename T>
struct Network {
  const T* logits;  // [batch][pitch], zeros behind the last class
  const Extremes<T>* extremes;
  RowTerm<T>* terms;  // batch x classes
  // The negative derivatives of the divergence with respect to some rows of the map: [count][pitch]. Null if no
  // gradient is wanted. A cold entry holds -2 minus its logarithm. Other entries are above -1.5. `fine` is the rounding
  // error of a cold entry.
  T *derivatives, *fine;
  T* grad;  // [batch][classes]; null if not wanted
  int batch, classes, pitch;
};

// The rows of the map in one launch. `lanes` lanes hold `held` columns of a row each, and a block has `rows`
// rows.
struct IccRows {
  int first, count;
  int lanes, held, rows;
};

// The lanes of a block that work on one row, and the teams that share the samples of this row.
struct Team {
  int lanes, held, lane, row, group, groups;

  __device__ explicit Team(const IccRows& p)
      : lanes(p.lanes), held(p.held), lane(int(threadIdx.x) % lanes), groups(kIccThreads / lanes / p.rows) {
    const int team = int(threadIdx.x) / lanes;
    row = team % p.rows;
    group = team / p.rows;
  }

  template <typename T>
  __device__ T sum(T value) const {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
      if (distance < lanes) value += __shfl_xor_sync(0xffffffff, value, distance);
    return value;
  }

  // Calls f(place, column, a, b, valid) for the lane's columns from begin to end, with the numbers of two rows there.
  // There are at most as many columns as the lane holds. Columns behind the end, up to a full pack per lane, are not
  // valid. The loop is unrolled over the packs, so that places are constants and select registers.
  template <int Unrolled, typename T, typename F>
  __device__ void for_columns(const T* a, const T* b, int begin, int end, const F& f) const {
    constexpr int size = Pack<T>::kSize;
#pragma unroll Unrolled
    for (int pack = 0; pack < kIccPacks<T>; ++pack) {
      const int first = begin + pack * lanes * size, column = first + lane * size;
      if (first >= end) break;
      const Pack<T> of_a = Pack<T>::load(a + column), of_b = Pack<T>::load(b + column);
      if (first + lanes * size <= end) {
#pragma unroll
        for (int e = 0; e < size; ++e) f(pack * size + e, column + e, of_a.at[e], of_b.at[e], true);
      } else {
#pragma unroll
        for (int e = 0; e < size; ++e) f(pack * size + e, column + e, of_a.at[e], of_b.at[e], column + e < end);
      }
    }
  }
  // The same for one row.
  template <typename T, typename F>
  __device__ void for_columns(const T* row, int begin, int end, const F& f) const {
    for_columns<kIccPacks<T>>(row, row, begin, end,
                              [&](int place, int column, T z, T, bool valid) { f(place, column, z, valid); });
  }

  // Calls f(begin, end) for the pieces of a row.
  template <typename F>
  __device__ void for_pieces(int classes, const F& f) const {
    for (int begin = 0; begin < classes; begin += held) f(begin, min(begin + held, classes));
  }

  // Calls f(sample, valid) for this team's samples. All teams of a warp process the same number, so some repeat the
  // last sample.
  template <typename F>
  __device__ void for_samples(int batch, const F& f) const {
    for (int first = 0; first < batch; first += groups)
      f(int64_t(min(first + group, batch - 1)), first + group < batch);
  }
};

// A - max A for row i of one sample's A, from the difference of the logits. Products of confident logits are in the
// hundreds. If they were rounded first, the difference would lose its digits. Products of the largest logits would
// overflow.
template <typename T>
struct RowOfA {
  const T* z;
  T own, factor, partner;
  int top;  // the column of the largest entry

  __device__ RowOfA(const Network<T>& network, int64_t s, int i)
      : z(network.logits + s * network.pitch), own(z[i]), factor(own * T(kLog2E)) {
    const Extremes<T> extremes = network.extremes[s];
    partner = own < 0 ? extremes.smallest : extremes.largest;
    top = own < 0 ? extremes.at_smallest : extremes.at_largest;
  }

  __device__ T below(T z_j) const { return (z_j - partner) * factor; }
};

// log₂ of an entry of P, in double. For a cold entry it may be in the thousands.
template <typename T>
__device__ double log_of_entry(const RowTerm<T>& term, T partner, T z_j) {
  return (double(z_j) - double(partner)) * (double(term.z) * kLog2E) - double(term.log_sum);
}

template <typename T>
__device__ bool is_cold(T derivative) {
  return derivative < T(-1.5);
}

// An entry of P times the derivative of a cold entry of the map.
template <typename T>
__device__ T cold_product(const RowTerm<T>& term, T partner, T z_j, T derivative, T fine) {
  return T(exp2(log_of_entry(term, partner, z_j) - 2 - double(derivative) - double(fine)));
}

// Make the logits compact. One block per sample.
template <typename T>
struct Preparation {
  Logits logits;
  T* compact;
  Extremes<T>* extremes;
  int classes, pitch;
};

template <typename T>
__global__ void __launch_bounds__(512) prepare_icc_kernel(const __grid_constant__ Group<Preparation<T>> group) {
  const int index = group.index();
  const Preparation<T>& p = group.problems[index];
  const int64_t s = group.block(index);
  const auto logit = [&](int j) {
    return read<T>(p.logits.data, p.logits.type, s * p.logits.row_stride + j * p.logits.stride);
  };
  T largest = logit(0), negative_smallest = -largest;
  for (int j = threadIdx.x; j < p.pitch; j += blockDim.x) {
    const T z = j < p.classes ? logit(j) : T(0);
    p.compact[s * p.pitch + j] = z;
    if (j >= p.classes) continue;
    largest = Largest<T>()(largest, z);
    negative_smallest = Largest<T>()(negative_smallest, -z);
  }
  largest = block_reduce(largest, Largest<T>());
  const T smallest = -block_reduce(negative_smallest, Largest<T>());
  int at_smallest = 1 - p.classes, at_largest = at_smallest;  // minus the class
  for (int j = threadIdx.x; j < p.classes; j += blockDim.x) {
    const T z = logit(j);
    if (z == smallest) at_smallest = max(at_smallest, -j);
    if (z == largest) at_largest = max(at_largest, -j);
  }
  at_smallest = -block_reduce(at_smallest, Largest<int>());
  at_largest = -block_reduce(at_largest, Largest<int>());
  if (threadIdx.x == 0) p.extremes[s] = {smallest, largest, at_smallest, at_largest};
}

// The sum of a row's exponentials, and the mean of the logits minus the logit of the largest entry.
template <typename T>
struct RowSum {
  T sum, mean;

  __device__ RowTerm<T> term(T z) const { return {z, T(log2(sum)), T(0), mean}; }
};

template <typename T>
__device__ RowSum<T> add_up(const Team& team, const RowOfA<T>& row, int classes) {
  T sum = 0, moment = 0;
  team.for_pieces(classes, [&](int begin, int end) {
    team.for_columns<1>(row.z, row.z, begin, end, [&](int, int, T z, T, bool valid) {
      const T e = valid ? fast_exp2(row.below(z)) : T(0);
      sum += e;
      moment += e * (z - row.partner);
    });
  });
  sum = team.sum(sum);
  return {sum, team.sum(moment) / sum};
}

// The sums of rows i of all samples, if rows are longer than what their teams hold.
template <typename T>
__device__ void add_up_rows(const Team& team, const Network<T>& network, int i, bool live) {
  team.for_samples(network.batch, [&](int64_t s, bool valid) {
    const RowOfA<T> row(network, s, i);
    const RowSum<T> sum = add_up(team, row, network.classes);
    if (valid && live && team.lane == 0) network.terms[s * network.classes + i] = sum.term(row.own);
  });
}

// Adds rows i of the team's samples, columns from begin to end. Writes their terms if these columns are the whole row.
template <typename T>
__device__ void add_rows(const Team& team, const Network<T>& network, int i, bool live, int begin, int end,
                         T (&entries)[kIccHeld<T>]) {
  const bool whole = network.classes <= team.held;
  team.for_samples(network.batch, [&](int64_t s, bool valid_sample) {
    const RowOfA<T> row(network, s, i);
    if (!whole) {
      const T log_sum = network.terms[s * network.classes + i].log_sum;
      team.for_columns(row.z, begin, end, [&](int place, int, T z, bool) {
        const T p = fast_exp2(row.below(z) - log_sum);
        entries[place] += valid_sample ? p : T(0);
      });
      return;
    }
    T e[kIccHeld<T>], sum = 0, moment = 0;
    team.for_columns(row.z, begin, end, [&](int place, int, T z, bool valid) {
      e[place] = valid ? fast_exp2(row.below(z)) : T(0);
      sum += e[place];
      moment += e[place] * (z - row.partner);
    });
    sum = team.sum(sum);
    const RowSum<T> of_row{sum, team.sum(moment) / sum};
    if (valid_sample && live && team.lane == 0) network.terms[s * network.classes + i] = of_row.term(row.own);
    const T share = valid_sample ? 1 / sum : T(0);
    team.for_columns(row.z, begin, end, [&](int place, int, T, bool) { entries[place] += e[place] * share; });
  });
}

// The teams' shares of some columns of their rows, in shared memory.
template <typename T>
struct Shares {
  T* mine;  // the first of this row
  int next;
  int groups;

  __device__ Shares(const Team& team, const IccRows& p, int number)
      : mine(reinterpret_cast<T*>(dynamic_shared_memory()) + (number * team.groups * p.rows + team.row) * team.held),
        next(p.rows * team.held),
        groups(team.groups) {}

  // Rows first to first + batch of all samples, columns from begin to end.
  __device__ void write(const Team& team, const Network<T>& network, int i, bool live, int begin, int end) const {
    T entries[kIccHeld<T>] = {};
    add_rows(team, network, i, live, begin, end, entries);
    T* const out = mine + team.group * next - begin;
    team.for_columns(network.logits, begin, end, [&](int place, int column, T, bool) { out[column] = entries[place]; });
  }
  __device__ T total(int column) const {
    T sum = mine[column];
    for (int group = 1; group < groups; ++group) sum += mine[group * next + column];
    return sum;
  }
};

// log₂ of an entry of the map.
template <typename T>
__device__ double log_of_mean(const Network<T>& network, int i, int j) {
  double largest = -INFINITY, sum = 0;
  for (int64_t s = 0; s < network.batch; ++s) {
    const RowOfA<T> row(network, s, i);
    const double log_p = log_of_entry(network.terms[s * network.classes + i], row.partner, row.z[j]);
    const double above = log_p - largest;
    sum = above > 0 ? sum * exp2(-above) + 1 : sum + exp2(above);
    largest = max(largest, log_p);
  }
  return largest + log2(sum / double(network.batch));
}

// The pass by rows of P: the means of the derivatives, and the part Σ_j dA_ij z_j of dz_i. With `cold`, some entries
// hold their logarithm, and the rest of their derivative t / s - 1 is -1.
template <typename T>
__device__ void pull_back_rows(const Team& team, const Network<T>& network, const IccRows& p, int row_of_map, bool live,
                               bool cold, T factor) {
  const int i = p.first + row_of_map, classes = network.classes;
  const int64_t offset = int64_t(row_of_map) * network.pitch;
  const T *const derivatives = network.derivatives + offset, *const fine = network.fine + offset;
  const bool whole = classes <= team.held;
  T negative[kIccHeld<T>];
  const auto load = [&](int begin, int end) {
    team.for_columns(derivatives, begin, end,
                     [&](int place, int, T value, bool) { negative[place] = cold && is_cold(value) ? T(-1) : value; });
  };
  if (whole) load(0, classes);
  team.for_samples(network.batch, [&](int64_t s, bool valid_sample) {
    const RowOfA<T> row(network, s, i);
    const bool mine = valid_sample && live;
    RowTerm<T>& place_of_term = network.terms[s * classes + i];
    const RowTerm<T> term = mine ? place_of_term : RowTerm<T>{};  // other threads may be writing it
    const T top = derivatives[row.top], centre = row.partner + term.mean;
    T mean = 0, product = 0;
    team.for_pieces(classes, [&](int begin, int end) {
      if (!whole) load(begin, end);
      team.for_columns(row.z, begin, end, [&](int place, int, T z, bool valid) {
        const T weighted = fast_exp2(row.below(z) - term.log_sum) * (negative[place] - top);
        mean += valid ? weighted : T(0);
        product += valid ? weighted * (z - centre) : T(0);
      });
    });
    if (cold)
      for (int j = team.lane; j < classes; j += team.lanes) {
        if (!is_cold(derivatives[j])) continue;
        const T z = row.z[j], weighted = cold_product(term, row.partner, z, derivatives[j], fine[j]);
        mean += weighted;
        product += weighted * (z - centre);
      }
    mean = team.sum(mean);
    product = team.sum(product);
    if (!mine || team.lane > 0) return;
    place_of_term = {term.z, term.log_sum, top, mean};
    T& grad = network.grad[s * classes + i];
    grad = (p.first == 0 ? T(0) : grad) - factor * product;
  });
}

// Both networks, and `count` flags of rows with cold entries.
template <typename T>
struct IccPair {
  Network<T> networks[2];  // student and teacher
  int* cold;
  T factor;
};

// Adds up the loss from the parts of the blocks.
template <typename T>
__device__ void add_up_losses(const double* losses, int64_t parts, double scale, T* loss) {
  double sum = 0;
  for (int64_t part = threadIdx.x; part < parts; part += kIccThreads) sum += losses[part];
  sum = block_reduce(sum, Sum<double>());
  if (threadIdx.x == 0) *loss = T(scale * sum);
}

}  // namespace kdkernels
