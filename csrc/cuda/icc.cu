#include "../checks/icc.h"
#include "host.h"
#include "icc_map.cuh"
#include "icc_samples.cuh"

namespace kdkernels {
namespace {

// Entries of the map whose derivatives are held at a time. On emulated threads there are few, so that small maps take
// several turns.
constexpr int64_t kDerivatives = 1 << 22;
#ifdef KDKERNELS_EMULATED
int64_t most_derivatives() { return emulation::only_counted ? kDerivatives : 1 << 13; }
#else
int64_t most_derivatives() { return kDerivatives; }
#endif

int64_t divided(int64_t count, int64_t by) { return (count + by - 1) / by; }

// How the rows of this number of classes are divided among the lanes of a block.
template <typename T>
IccRows rows_of(int64_t batch, int64_t classes) {
  constexpr int size = Pack<T>::kSize;
  IccRows rows{0, int(classes), 1, 0, 1};
  while (rows.lanes < kWarp && rows.lanes * size < classes) rows.lanes *= 2;
  const int pack = rows.lanes * size;
  rows.held = pack * int(std::min<int64_t>(kIccPacks<T>, divided(classes, pack)));
  // The rows of one block read the same logits, and the samples of one row are independent. If there are few rows,
  // teams share the samples of a row.
  const int teams = kIccThreads / rows.lanes;
  while (2 * rows.rows <= teams && (teams / rows.rows > batch || (rows.rows < 4 && classes >= 400 * rows.rows)))
    rows.rows *= 2;
  return rows;
}

int shared_bytes(const IccRows& rows, int networks, int size) {
  return networks * (kIccThreads / rows.lanes) * rows.held * size;
}

// One network in its own memory, with room for `held` rows of the map.
template <typename T>
struct Memory {
  Tensor numbers, grad;
  Network<T> network;
  Preparation<T> preparation;

  Memory(const Tensor& logits, const IccRows& rows, int64_t held, bool wanted, const Tensor& like) {
    const int64_t batch = logits.size(0), classes = logits.size(1), pack = rows.lanes * Pack<T>::kSize;
    const int64_t pitch = divided(classes, pack) * pack, of_rows = wanted ? held * pitch : 0;
    constexpr int64_t of_term = sizeof(RowTerm<T>) / sizeof(T), of_extremes = sizeof(Extremes<T>) / sizeof(T);
    numbers = new_compact(like, {batch * (pitch + of_term * classes + of_extremes) + 2 * of_rows}, kScalarType<T>);
    grad = new_compact(like, wanted ? std::vector<int64_t>{batch, classes} : std::vector<int64_t>{0}, kScalarType<T>);
    T* const compact = data_of<T>(numbers);
    T* const derivatives = compact + batch * pitch;
    T* const terms = derivatives + 2 * of_rows;
    auto* const extremes = reinterpret_cast<Extremes<T>*>(terms + batch * classes * of_term);
    network = {compact,
               extremes,
               reinterpret_cast<RowTerm<T>*>(terms),
               wanted ? derivatives : nullptr,
               wanted ? derivatives + of_rows : nullptr,
               data_of<T>(grad),
               int(batch),
               int(classes),
               int(pitch)};
    preparation = {logits_of(logits), compact, extremes, int(classes), int(pitch)};
  }
};

template <typename T>
void prepare(const OnDevice& device, const std::vector<const Memory<T>*>& networks) {
  Problems<Preparation<T>> problems;
  for (const auto* memory : networks) problems.push_back({memory->preparation, memory->network.batch});
  launch(prepare_icc_kernel<T>, problems, threads_for(networks[0]->network.pitch, 4), 0, device.stream);
}

// The blocks of a pass by columns: for each tile of samples, the blocks of all columns.
template <typename T>
int64_t column_blocks(const Network<T>& network, int64_t samples) {
  return divided(network.batch, samples) * divided(network.classes, kWarp * Pack<T>::kSize);
}

template <typename T>
void add_columns(Group<Columns<T>>& group, const Network<T>& network, const int* cold, T factor, const IccRows& rows) {
  if (network.grad)
    group.add({network, cold, factor, rows.first, rows.count, int(divided(network.batch, kIccSamples))},
              column_blocks(network, kIccSamples));
}

// How many rows of the map a launch works on.
int64_t rows_at_once(int64_t classes) { return std::min(classes, std::max<int64_t>(1, most_derivatives() / classes)); }

// Calls f(rows) for the rows of the map, `held` at a time.
template <typename F>
void for_rows(IccRows rows, int64_t classes, int64_t held, const F& f) {
  for (int64_t first = 0; first < classes; first += held) {
    rows.first = int(first);
    rows.count = int(std::min(held, classes - first));
    f(rows);
  }
}

template <typename T>
void compare_maps(const OnDevice& device, IccPair<T> pair, const IccRows& rows, int64_t held, const Tensor& losses,
                  const Tensor& loss, double scale) {
  const int64_t classes = pair.networks[0].classes;
  const Tensor cold = new_compact(losses, {held}, ScalarType::Int);
  pair.cold = static_cast<int*>(cold.mutable_data_ptr());
  int64_t parts = 0;
  for_rows(rows, classes, held, [&](const IccRows& chunk) {
    const int64_t blocks = divided(chunk.count, chunk.rows);
    launch(icc_compare_kernel<T>, blocks, kIccThreads, shared_bytes(chunk, 2, sizeof(T)), device.stream, pair, chunk,
           data_of<double>(losses) + parts);
    parts += blocks;
    Group<Columns<T>> columns;
    add_columns(columns, pair.networks[0], pair.cold, pair.factor, chunk);
    add_columns<T>(columns, pair.networks[1], nullptr, pair.factor, chunk);
    const bool last = chunk.first + chunk.count == classes;
    launch(icc_columns_kernel<T>, columns.blocks() + last, kIccThreads, 0, device.stream, columns,
           data_of<double>(losses), parts, scale, last ? data_of<T>(loss) : nullptr);
  });
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> run(const Tensor& student, const Tensor& teacher, bool per_sample, double scale,
                                       bool want_student, bool want_teacher) {
  const OnDevice device(student);
  const int64_t batch = student.size(0), classes = student.size(1);
  const IccRows rows = rows_of<T>(batch, classes);
  const int64_t held = want_student || want_teacher ? rows_at_once(classes) : classes, of_maps = per_sample ? 0 : held;
  const Memory<T> x(student, rows, of_maps, want_student, student), y(teacher, rows, of_maps, want_teacher, student);
  prepare<T>(device, {&x, &y});
  const Tensor loss = new_compact(student, {}, kScalarType<T>);
  const IccPair<T> pair{{x.network, y.network}, nullptr, T(scale / batch)};
  if (per_sample) {
    const int64_t blocks = divided(batch * classes, kIccThreads / rows.lanes);
    const Tensor losses = new_compact(student, {blocks}, ScalarType::Double);
    launch(icc_samples_kernel<T>, blocks, kIccThreads, 0, device.stream, pair, rows, data_of<double>(losses));
    const int64_t columns = want_student || want_teacher ? column_blocks(x.network, 1) : 0;
    launch(icc_sample_columns_kernel<T>, columns + 1, kIccThreads, 0, device.stream, pair, data_of<double>(losses),
           blocks, scale / batch, data_of<T>(loss));
  } else {
    const int64_t blocks = divided(classes, held) * divided(held, rows.rows);
    const Tensor losses = new_compact(student, {blocks}, ScalarType::Double);
    compare_maps(device, pair, rows, held, losses, loss, scale);
  }
  return {loss, x.grad, y.grad};
}

template <typename T>
Tensor run_map(const Tensor& logits) {
  const OnDevice device(logits);
  const int64_t classes = logits.size(1);
  const IccRows rows = rows_of<T>(logits.size(0), classes);
  const Memory<T> z(logits, rows, 0, false, logits);
  prepare<T>(device, {&z});
  const Tensor map = new_compact(logits, {classes, classes}, kScalarType<T>);
  launch(icc_map_kernel<T>, divided(classes, rows.rows), kIccThreads, shared_bytes(rows, 1, sizeof(T)), device.stream,
         z.network, rows, data_of<T>(map));
  return map;
}

template <typename T>
Tensor run_map_backward(const Tensor& grad_map, const Tensor& logits) {
  const OnDevice device(logits);
  const int64_t batch = logits.size(0), classes = logits.size(1), held = rows_at_once(classes);
  const IccRows rows = rows_of<T>(batch, classes);
  const Memory<T> z(logits, rows, held, true, logits);
  prepare<T>(device, {&z});
  const T factor = T(1) / T(batch);
  for_rows(rows, classes, held, [&](const IccRows& chunk) {
    launch(icc_map_gradient_kernel<T>, divided(chunk.count, chunk.rows), kIccThreads, 0, device.stream, z.network,
           chunk, logits_of(grad_map), factor);
    Group<Columns<T>> columns;
    add_columns<T>(columns, z.network, nullptr, factor, chunk);
    launch(icc_columns_kernel<T>, columns.blocks(), kIccThreads, 0, device.stream, columns,
           static_cast<const double*>(nullptr), int64_t(0), 0.0, static_cast<T*>(nullptr));
  });
  return z.grad;
}

}  // namespace

Tensor icc_map(const Tensor& logits) {
  check_icc_map(logits);
  return with_compute_type(logits, [&](auto type) { return run_map<decltype(type)>(logits); });
}

Tensor icc_map_backward(const Tensor& grad_map, const Tensor& logits) {
  check_icc_map_backward(grad_map, logits);
  return with_compute_type(logits, [&](auto type) { return run_map_backward<decltype(type)>(grad_map, logits); });
}

std::tuple<Tensor, Tensor, Tensor> icc_loss(const Tensor& student, const Tensor& teacher, bool per_sample, double scale,
                                            bool grad_student, bool grad_teacher) {
  check_icc_loss(student, teacher, scale);
  const bool in_double = student.scalar_type() == ScalarType::Double || teacher.scalar_type() == ScalarType::Double;
  return (in_double ? run<double> : run<float>)(student, teacher, per_sample, scale, grad_student, grad_teacher);
}

}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(KDKERNELS_NAMESPACE, KDKERNELS_DEVICE, m) {
  m.impl("icc_map", TORCH_BOX(&kdkernels::icc_map));
  m.impl("icc_map_backward", TORCH_BOX(&kdkernels::icc_map_backward));
  m.impl("icc_loss", TORCH_BOX(&kdkernels::icc_loss));
}
