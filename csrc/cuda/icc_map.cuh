// The map M, the mean of the samples' P, and the divergence of the maps of two networks. One pass by rows computes the
// divergence. Passes by rows and by columns of P compute the gradient to the logits.
#pragma once

#include "icc_rows.cuh"

namespace kdkernels {

// M.
template <typename T>
__global__ void __launch_bounds__(kIccThreads, 2) icc_map_kernel(Network<T> network, IccRows p, T* map) {
  const Team team(p);
  const int row = int(blockIdx.x) * p.rows + team.row, i = min(row, p.count - 1);
  const bool live = row < p.count;
  if (network.classes > team.held) add_up_rows(team, network, i, live);
  const Shares<T> shares(team, p, 0);
  team.for_pieces(network.classes, [&](int begin, int end) {
    __syncthreads();
    shares.write(team, network, i, live, begin, end);
    __syncthreads();
    if (!live) return;
    for (int j = begin + team.group * team.lanes + team.lane; j < end; j += team.groups * team.lanes)
      map[int64_t(i) * network.classes + j] = shares.total(j - begin) / T(network.batch);
  });
}

// The pass by rows for a given derivative with respect to the map.
template <typename T>
__global__ void __launch_bounds__(kIccThreads, 2)
    icc_map_gradient_kernel(Network<T> network, IccRows p, Logits grad_map, T factor) {
  const Team team(p);
  const int row = int(blockIdx.x) * p.rows + team.row, last = min(row, p.count - 1), i = p.first + last;
  const bool live = row < p.count;
  add_up_rows(team, network, i, live);
  T* const derivatives = network.derivatives + int64_t(last) * network.pitch;
  if (live)
    for (int j = team.group * team.lanes + team.lane; j < network.pitch; j += team.groups * team.lanes)
      derivatives[j] = j < network.classes
                           ? -read<T>(grad_map.data, grad_map.type, i * grad_map.row_stride + j * grad_map.stride)
                           : T(0);
  __syncthreads();
  pull_back_rows(team, network, p, last, live, false, factor);
}

// Σ t log(t / s) - t + s over the block's rows, where no term is negative, and the passes by rows.
template <typename T>
__global__ void __launch_bounds__(kIccThreads, 2)
    icc_compare_kernel(const __grid_constant__ IccPair<T> pair, IccRows p, double* losses) {
  const Network<T>&student = pair.networks[0], &teacher = pair.networks[1];
  const Team team(p);
  const int row = int(blockIdx.x) * p.rows + team.row, last = min(row, p.count - 1), i = p.first + last;
  const bool live = row < p.count;
  if (student.classes > team.held)
#pragma unroll 1
    for (const Network<T>& network : pair.networks) add_up_rows(team, network, i, live);
  const Shares<T> of_student(team, p, 0), of_teacher(team, p, 1);
  const int64_t offset = int64_t(last) * student.pitch;
  double loss = 0;
  int any_cold = 0;
  team.for_pieces(student.classes, [&](int begin, int end) {
    __syncthreads();
#pragma unroll 1
    for (int n = 0; n < 2; ++n) Shares<T>(team, p, n).write(team, pair.networks[n], i, live, begin, end);
    __syncthreads();
    if (!live) return;
    for (int j = begin + team.group * team.lanes + team.lane; j < end; j += team.groups * team.lanes) {
      const T s = of_student.total(j - begin) / T(student.batch), t = of_teacher.total(j - begin) / T(student.batch);
      T by_student = (t - s) / s, by_teacher = 0, fine = 0;
      if (t < kFaint<T>) {
        loss += double(s) - double(t);
        if (s < kLost<T>) by_student = 0;
      } else if (s < kLost<T>) {
        const double log_ratio = log2(double(t)) - log_of_mean(student, i, j);
        loss += double(t) * (log_ratio * kLn2 - 1);
        by_student = T(-2 - log_ratio);
        fine = T(-2 - log_ratio - double(by_student));
        by_teacher = T(-log_ratio * kLn2);
        any_cold = 1;
      } else {
        const T ratio = (s - t) / t;
        const T d = ratio < T(0.5) && ratio > T(-0.5) ? -log1p(ratio) : log(t / s);
        loss += double(d < T(0.5) && d > T(-0.5) ? t * exp_remainder(d) : t * d - (t - s));
        by_teacher = -d;
      }
      if (student.grad) {
        student.derivatives[offset + j] = by_student;
        student.fine[offset + j] = fine;
      }
      if (teacher.grad) teacher.derivatives[offset + j] = by_teacher;
    }
  });
  loss = block_reduce(loss, Sum<double>());
  if (threadIdx.x == 0) losses[blockIdx.x] = loss;
  any_cold = block_reduce(any_cold, Largest<int>());
  __syncthreads();  // other threads read the derivatives and terms
  if (student.grad && live && team.lane == 0 && team.group == 0) pair.cold[row] = any_cold;
#pragma unroll 1
  for (int n = 0; n < 2; ++n)
    if (pair.networks[n].grad) pull_back_rows(team, pair.networks[n], p, last, live, n == 0 && any_cold, pair.factor);
}

// The pass by columns of P: the contribution of rows first to first + count to dz_k = Σ_i dA_ik z_i.
template <typename T>
struct Columns {
  Network<T> network;
  const int* cold;  // null if there are no cold entries
  T factor;
  int first, count;
  int tiles;  // of samples
};

// One block per kIccSamples samples and as many columns as a warp reads at once. The warps of a block share the rows.
// One more block, the last, adds up the loss.
template <typename T>
__global__ void __launch_bounds__(kIccThreads, 2)
    icc_columns_kernel(const __grid_constant__ Group<Columns<T>> group, const double* losses, int64_t parts,
                       double scale, T* loss) {
  constexpr int size = Pack<T>::kSize, width = kWarp * size;
  SHARED_ARRAY(T, sums, kIccWarps * kIccSamples * width);
  if (loss && blockIdx.x == gridDim.x - 1) {
    add_up_losses(losses, parts, scale, loss);
    return;
  }
  const int index = group.index();
  const Columns<T>& p = group.problems[index];
  const Network<T>& network = p.network;
  const int64_t sample = int64_t(group.block(index) % p.tiles) * kIccSamples;
  const int begin = group.block(index) / p.tiles * width;
  const int warp = int(threadIdx.x) / kWarp, column = begin + int(threadIdx.x) % kWarp * size;

  Pack<T> z[kIccSamples], totals[kIccSamples];
  T smallest[kIccSamples], largest[kIccSamples];
  const RowTerm<T>* terms[kIccSamples];
#pragma unroll
  for (int q = 0; q < kIccSamples; ++q) {
    const int64_t s = min(sample + q, int64_t(network.batch - 1));
    if (column < network.pitch) z[q] = Pack<T>::load(network.logits + s * network.pitch + column);
    smallest[q] = network.extremes[s].smallest;
    largest[q] = network.extremes[s].largest;
    terms[q] = network.terms + s * network.classes + p.first;
  }
  for (int row = warp; row < p.count; row += kIccWarps) {
    const int64_t offset = int64_t(row) * network.pitch + column;
    Pack<T> negative;
    if (column < network.pitch) negative = Pack<T>::load(network.derivatives + offset);
#pragma unroll
    for (int e = 0; e < size; ++e)
      if (p.cold && is_cold(negative.at[e])) negative.at[e] = -1;
#pragma unroll
    for (int q = 0; q < kIccSamples; ++q) {
      const RowTerm<T> term = terms[q][row];
      const T partner = term.z < 0 ? smallest[q] : largest[q], factor = term.z * T(kLog2E), mean = term.mean * term.z;
#pragma unroll
      for (int e = 0; e < size; ++e) {
        const T p_e = fast_exp2((z[q].at[e] - partner) * factor - term.log_sum);
        totals[q].at[e] += p_e * ((negative.at[e] - term.top) * term.z - mean);
      }
    }
  }
#pragma unroll
  for (int q = 0; q < kIccSamples; ++q)
#pragma unroll
    for (int e = 0; e < size; ++e) sums[(warp * kIccSamples + q) * width + column - begin + e] = totals[q].at[e];
  __syncwarp();  // this adds to what another lane has written
  if (p.cold)
    for (int row = warp; row < p.count; row += kIccWarps) {
      if (!p.cold[row]) continue;
      const int64_t offset = int64_t(row) * network.pitch;
      for (int place = int(threadIdx.x) % kWarp; place < kIccSamples * width; place += kWarp) {
        const int64_t s = sample + place / width;
        const int j = begin + place % width;
        if (s >= network.batch || j >= network.classes || !is_cold(network.derivatives[offset + j])) continue;
        const RowOfA<T> of_row(network, s, p.first + row);
        const RowTerm<T> term = network.terms[s * network.classes + p.first + row];
        sums[warp * kIccSamples * width + place] +=
            term.z *
            cold_product(term, of_row.partner, of_row.z[j], network.derivatives[offset + j], network.fine[offset + j]);
      }
    }
  __syncthreads();
  for (int place = threadIdx.x; place < kIccSamples * width; place += kIccThreads) {
    const int64_t s = sample + place / width;
    const int k = begin + place % width;
    if (s >= network.batch || k >= network.classes) continue;
    T sum = 0;
    for (int w = 0; w < kIccWarps; ++w) sum += sums[w * kIccSamples * width + place];
    T& grad = network.grad[s * network.classes + k];
    // The pass over the first rows has written only to their own logits.
    grad = (p.first == 0 && k >= p.count ? T(0) : grad) - p.factor * sum;
  }
}

}  // namespace kdkernels
