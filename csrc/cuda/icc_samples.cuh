// The divergences of the samples' own P, without a map.
#pragma once

#include "icc_rows.cuh"

namespace kdkernels {

// q - p and log(p / q) of an entry of P.
template <typename T>
struct Difference {
  T p, q_less_p, log_ratio, divergence;

  __device__ Difference(T log_q, T log_p) : p(fast_exp2(log_p)), log_ratio((log_p - log_q) * T(kLn2)) {
    const bool near = log_ratio < T(0.5) && log_ratio > T(-0.5);
    const T remainder = p * exp_remainder(near ? log_ratio : T(0)), difference = fast_exp2(log_q) - p;
    q_less_p = near ? remainder - p * log_ratio : difference;
    divergence = near ? remainder : p * log_ratio + difference;
  }
};

// The term of a row. The largest of its exponentials is 1. If it is nearly the whole sum, the other exponentials are
// added up separately, because only they distinguish such rows.
template <typename T>
__device__ RowTerm<T> term_of(const Team& team, const RowOfA<T>& row, int classes) {
  const RowSum<T> all = add_up(team, row, classes);
  RowTerm<T> term = all.term(row.own);
  const bool nearly = all.sum < T(1.5);
  T others = 0;
  if (nearly)
    team.for_pieces(classes, [&](int begin, int end) {
      team.for_columns<1>(row.z, row.z, begin, end, [&](int, int, T z, T, bool valid) {
        const T e = fast_exp2(row.below(z));
        others += valid && e < 1 ? e : T(0);
      });
    });
  others = team.sum(others);
  if (nearly) term.log_sum = log1p(others) * T(kLog2E);
  return term;
}

// The divergence of every sample's own P, one team per row, with the row's contribution to the gradients.
template <typename T>
__global__ void __launch_bounds__(kIccThreads, 2)
    icc_samples_kernel(const __grid_constant__ IccPair<T> pair, IccRows p, double* losses) {
  const Network<T>&student = pair.networks[0], &teacher = pair.networks[1];
  const Team team(p);
  const int classes = student.classes;
  const int64_t teams = kIccThreads / team.lanes, count = int64_t(student.batch) * classes;
  const int64_t item = int64_t(blockIdx.x) * teams + int(threadIdx.x) / team.lanes, last = min(item, count - 1);
  const int64_t s = last / classes;
  const int i = int(last % classes);
  const RowOfA<T> of_student(student, s, i), of_teacher(teacher, s, i);
  const RowTerm<T> student_term = term_of(team, of_student, classes), teacher_term = term_of(team, of_teacher, classes);
  const auto compare = [&](T z_s, T z_t) {
    return Difference<T>(of_student.below(z_s) - student_term.log_sum, of_teacher.below(z_t) - teacher_term.log_sum);
  };
  const T top = compare(of_student.z[of_teacher.top], of_teacher.partner).log_ratio;
  const T centre_s = of_student.partner + student_term.mean, centre_t = of_teacher.partner + teacher_term.mean;
  T divergence = 0, mean = 0, by_student = 0, by_teacher = 0;
  team.for_pieces(classes, [&](int begin, int end) {
    team.for_columns<1>(of_student.z, of_teacher.z, begin, end, [&](int, int, T z_s, T z_t, bool valid) {
      const Difference<T> entry = compare(z_s, z_t);
      const T weighted = entry.p * (entry.log_ratio - top);
      divergence += valid ? entry.divergence : T(0);
      mean += valid ? weighted : T(0);
      by_student += valid ? entry.q_less_p * (z_s - centre_s) : T(0);
      by_teacher += valid ? weighted * (z_t - centre_t) : T(0);
    });
  });
  divergence = team.sum(divergence);
  mean = team.sum(mean);
  by_student = team.sum(by_student);
  by_teacher = team.sum(by_teacher);
  const bool mine = item < count && team.lane == 0;
  if (mine) {
    student.terms[last] = student_term;
    teacher.terms[last] = {teacher_term.z, teacher_term.log_sum, top, mean};
    if (student.grad) student.grad[last] = pair.factor * by_student;
    if (teacher.grad) teacher.grad[last] = pair.factor * by_teacher;
  }
  const double loss = block_reduce(mine ? double(divergence) : 0.0, Sum<double>());
  if (threadIdx.x == 0) losses[blockIdx.x] = loss;
}

// The rest of the gradients: Σ_i dA_ik z_i. One block per sample and as many columns as a warp reads at once. One more
// block, the last, adds up the loss.
template <typename T>
__global__ void __launch_bounds__(kIccThreads, 2)
    icc_sample_columns_kernel(const __grid_constant__ IccPair<T> pair, const double* losses, int64_t parts,
                              double scale, T* loss) {
  constexpr int size = Pack<T>::kSize, width = kWarp * size;
  SHARED_ARRAY(T, sums, 2 * kIccWarps * width);
  if (blockIdx.x == gridDim.x - 1) {
    add_up_losses(losses, parts, scale, loss);
    return;
  }
  const Network<T>&student = pair.networks[0], &teacher = pair.networks[1];
  const int classes = student.classes;
  const int64_t s = blockIdx.x % student.batch;
  const int begin = int(blockIdx.x / student.batch) * width;
  const int warp = int(threadIdx.x) / kWarp, column = begin + int(threadIdx.x) % kWarp * size;
  const Extremes<T> of_student = student.extremes[s], of_teacher = teacher.extremes[s];
  Pack<T> z_s, z_t, by_student, by_teacher;
  if (column < student.pitch) {
    z_s = Pack<T>::load(student.logits + s * student.pitch + column);
    z_t = Pack<T>::load(teacher.logits + s * teacher.pitch + column);
  }
  for (int i = warp; i < classes; i += kIccWarps) {
    const RowTerm<T> q = student.terms[s * classes + i], p = teacher.terms[s * classes + i];
    const T partner_s = q.z < 0 ? of_student.smallest : of_student.largest, factor_s = q.z * T(kLog2E);
    const T partner_t = p.z < 0 ? of_teacher.smallest : of_teacher.largest, factor_t = p.z * T(kLog2E);
#pragma unroll
    for (int e = 0; e < size; ++e) {
      const Difference<T> entry((z_s.at[e] - partner_s) * factor_s - q.log_sum,
                                (z_t.at[e] - partner_t) * factor_t - p.log_sum);
      by_student.at[e] += entry.q_less_p * q.z;
      by_teacher.at[e] += entry.p * (entry.log_ratio - p.top - p.mean) * p.z;
    }
  }
#pragma unroll
  for (int e = 0; e < size; ++e) {
    sums[warp * width + column - begin + e] = by_student.at[e];
    sums[(kIccWarps + warp) * width + column - begin + e] = by_teacher.at[e];
  }
  __syncthreads();
  for (int place = threadIdx.x; place < 2 * width; place += kIccThreads) {
    const int of = place / width, k = begin + place % width;
    T* const grad = of ? teacher.grad : student.grad;
    if (!grad || k >= classes) continue;
    T sum = 0;
    for (int w = 0; w < kIccWarps; ++w) sum += sums[(of * kIccWarps + w) * width + place % width];
    grad[s * classes + k] += pair.factor * sum;
  }
}

}  // namespace kdkernels
