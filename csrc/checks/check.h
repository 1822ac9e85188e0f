// Checks the arguments of an operator before it touches memory. kdkernels/boundary.py does the same for fake tensors, in the
// same words.
//
// A check that passes allocates nothing. A check that fails throws what reaches Python as a RuntimeError.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string_view>
#include <vector>

namespace kdkernels {

using torch::stable::Tensor;

// An argument, or one entry of a list.
struct Argument {
  const char* name;
  int64_t entry;

  Argument(const char* name, int64_t entry = -1) : name(name), entry(entry) {}

  friend std::ostream& operator<<(std::ostream& out, const Argument& argument) {
    out << argument.name;
    if (argument.entry >= 0) out << '[' << argument.entry << ']';
    return out;
  }
};

enum class Types { any_float, full_float, labels, mask };

class Check {
 public:
  // The largest allocation of a kernel, in elements of 8 bytes. Its bytes do not overflow.
  static constexpr int64_t kMostElements = int64_t(1) << 60;
  // The CUDA kernels count the elements of a row in int, and add up to 4096 to this number.
  static constexpr int64_t kMostOnGpu = std::numeric_limits<int>::max() - 4096;

  explicit Check(const char* op) : op_(op) {}
  Check(const Check&) = delete;

  // `shape` is the shape in the docstrings, for example "b K". A name has one size in all tensors of the operator. A
  // number is itself. "..." is one or more further dimensions. The tensor is not empty, and is on the device of the
  // first tensor.
  void tensor(const Argument& argument, const Tensor& tensor, const char* shape, Types types = Types::any_float) {
    const AtenTensorHandle handle = tensor.get();
    place(argument, handle);
    const int32_t type = dtype(handle);
    if (!is_one_of(types, type)) fail(argument, " must be ", names_of(types), ", got ", type_name(type));
    int64_t dim, *sizes, count = 1, length = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    bool overflows = false, open = false;
    for (int64_t d = 0; d < dim; ++d) overflows |= __builtin_mul_overflow(count, sizes[d], &count);
    for (std::string_view rest = shape; !rest.empty(); ++length) open = next(rest) == "...";
    if (open ? dim < length : dim != length) fail_shape(argument, shape, sizes, dim);
    if (count == 0) fail(argument, " must not be empty, got shape ", Shape{sizes, dim});
    if (overflows || count > kMostElements)
      fail(argument, " must have at most 2^60 elements, got shape ", Shape{sizes, dim});
    std::string_view rest = shape;
    const size_t known = count_;
    for (int64_t d = 0; d < length - open; ++d)
      if (size(next(rest), sizes[d]) != sizes[d]) {
        forget(known);  // names whose sizes belong to this tensor only
        fail_shape(argument, shape, sizes, dim);
      }
    memory(argument, handle, sizes, dim);
  }

  // Return whether a gradient is not wanted. Then it has the shape (0), on the device of the first tensor.
  bool unwanted(const Argument& argument, const Tensor& gradient) {
    place(argument, gradient.get());
    return gradient.dim() == 1 && gradient.size(0) == 0;
  }

  void same_type(const Argument& argument, const Tensor& tensor, const Argument& other, const Tensor& of) const {
    type(argument, tensor, dtype(of.get()), other);
  }

  // Check that a tensor has the compute type of another one: float64 for float64, and float32 for all other types.
  void compute_type(const Argument& argument, const Tensor& tensor, const Argument& other, const Tensor& of) const {
    const int32_t expected = dtype(of.get()) == kTypes[1]() ? kTypes[1]() : kTypes[0]();
    if (const int32_t type = dtype(tensor.get()); type != expected)
      fail(argument, " must have ", other, "'s compute type ", type_name(expected), ", got ", type_name(type));
  }

  // Set the size of a name, or forget all names except the first ones.
  void bind(std::string_view name, int64_t value) { size(name, value); }
  void forget(size_t keep = 0) { count_ = keep; }

  bool on_gpu() const { return device_type_ == aoti_torch_device_type_cuda(); }

  // Check the number of elements of a result or a buffer. `what` names the argument that determines it.
  template <size_t N>
  void fits(const Argument& what, const int64_t (&sizes)[N]) const {
    int64_t count = 1;
    bool overflows = false;
    for (const int64_t size : sizes) overflows |= __builtin_mul_overflow(count, size, &count);
    if (overflows || count > kMostElements)
      fail(what, " must have sizes whose product is at most 2^60, got ", Shape{sizes, int64_t(N)});
  }
  void fits_gpu(const Argument& argument, const char* what, int64_t count) const {
    if (on_gpu() && count > kMostOnGpu)
      fail(argument, " must have at most 2147479551 ", what, " on a GPU, got ", count);
  }

  void positive(const Argument& argument, int64_t value) const {
    if (value < 1) fail(argument, " must be a positive integer, got ", value);
  }
  void non_negative(const Argument& argument, int64_t value) const {
    if (value < 0) fail(argument, " must be an integer >= 0, got ", value);
  }
  void positive(const Argument& argument, double value) const {
    if (!(value > 0 && std::isfinite(value))) fail(argument, " must be a positive number, got ", value);
  }
  void non_negative(const Argument& argument, double value) const {
    if (!(value >= 0 && std::isfinite(value))) fail(argument, " must be a number >= 0, got ", value);
  }
  void finite(const Argument& argument, double value) const {
    if (!std::isfinite(value)) fail(argument, " must be a finite number, got ", value);
  }

  // Check the entries of a list and their number.
  template <typename T>
  void holds(const Argument& argument, const std::vector<T>& list, int64_t count, const char* what) const {
    if (int64_t(list.size()) != count) fail(argument, " must hold ", count, ' ', what, ", got ", list.size());
  }
  template <typename T>
  void not_empty(const Argument& argument, const std::vector<T>& list) const {
    if (list.empty()) fail(argument, " must hold at least one entry, got none");
  }
  void finite(const Argument& argument, const std::vector<double>& list, int64_t count, const char* what) const {
    holds(argument, list, count, what);
    for (int64_t i = 0; i < count; ++i) finite({argument.name, i}, list[i]);
  }
  void flag(const Argument& argument, int64_t value) const {
    if (value != 0 && value != 1) fail(argument, " must be 0 or 1, got ", value);
  }
  void flags(const Argument& argument, const std::vector<int64_t>& list, int64_t count) const {
    holds(argument, list, count, "flags");
    for (int64_t i = 0; i < count; ++i) flag({argument.name, i}, list[i]);
  }

  // Three form codes of kdkernels/ops/congruence/plan.py from entry `first` on. The mixed form computes the sum over all pairs,
  // and no gradient for the teacher. Only the CPU has it.
  void plan(const Argument& argument, const std::vector<int64_t>& codes, int64_t first, bool grad_teacher) const {
    for (int64_t i = first; i < first + 3; ++i) {
      if (codes[i] == 0 || codes[i] == 7) continue;
      if (i > first) fail(Argument{argument.name, i}, " must be 0 (gram) or 7 (feature), got ", codes[i]);
      if (codes[i] != 1)
        fail(Argument{argument.name, i}, " must be 0 (gram), 1 (mixed) or 7 (feature), got ", codes[i]);
      if (on_gpu()) fail(Argument{argument.name, i}, " must be 0 (gram) or 7 (feature) on a GPU, got 1");
      if (grad_teacher)
        fail(Argument{argument.name, i}, " must be 0 (gram) or 7 (feature) for the second gradient, got 1");
    }
  }

  // Throw an error with what the operator expected and what it got.
  template <typename... Parts>
  [[noreturn, gnu::cold, gnu::noinline]] void fail(const Parts&... parts) const {
    std::ostringstream message;
    message << op_ << ": ";
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }

  // Return sizes as Python prints them.
  struct Shape {
    const int64_t* sizes;
    int64_t count;

    friend std::ostream& operator<<(std::ostream& out, const Shape& shape) {
      out << '(';
      for (int64_t d = 0; d < shape.count; ++d) out << (d ? ", " : "") << shape.sizes[d];
      return out << (shape.count == 1 ? ",)" : ")");
    }
  };

 private:
  static constexpr int32_t (*kTypes[])() = {aoti_torch_dtype_float32, aoti_torch_dtype_float64,
                                            aoti_torch_dtype_bfloat16, aoti_torch_dtype_float16};

  static int32_t dtype(AtenTensorHandle handle) {
    int32_t type;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &type));
    return type;
  }
  static bool is_full(int32_t type) { return type == kTypes[0]() || type == kTypes[1](); }
  static bool is_float(int32_t type) { return is_full(type) || type == kTypes[2]() || type == kTypes[3](); }

  static bool is_one_of(Types types, int32_t type) {
    switch (types) {
      case Types::any_float:
        return is_float(type);
      case Types::full_float:
        return is_full(type);
      case Types::labels:
        return type == aoti_torch_dtype_int64();
      case Types::mask:
        return type == aoti_torch_dtype_bool();
    }
    return false;
  }
  [[gnu::cold]] static const char* names_of(Types types) {
    switch (types) {
      case Types::any_float:
        return "float32, float64, bfloat16 or float16";
      case Types::full_float:
        return "float32 or float64";
      case Types::labels:
        return "int64";
      case Types::mask:
        return "bool";
    }
    return "";
  }

  [[gnu::cold]] static const char* type_name(int32_t type) {
    const std::pair<int32_t, const char*> names[] = {
        {aoti_torch_dtype_float32(), "float32"},     {aoti_torch_dtype_float64(), "float64"},
        {aoti_torch_dtype_bfloat16(), "bfloat16"},   {aoti_torch_dtype_float16(), "float16"},
        {aoti_torch_dtype_int64(), "int64"},         {aoti_torch_dtype_int32(), "int32"},
        {aoti_torch_dtype_int16(), "int16"},         {aoti_torch_dtype_int8(), "int8"},
        {aoti_torch_dtype_uint8(), "uint8"},         {aoti_torch_dtype_bool(), "bool"},
        {aoti_torch_dtype_complex64(), "complex64"}, {aoti_torch_dtype_complex128(), "complex128"},
    };
    for (const auto& [number, name] : names)
      if (number == type) return name;
    return "another type";
  }

  void type(const Argument& argument, const Tensor& tensor, int32_t expected, const Argument& other) const {
    if (const int32_t type = dtype(tensor.get()); type != expected)
      fail(argument, " must have ", other, "'s type ", type_name(expected), ", got ", type_name(type));
  }

  // Check a dense tensor on the device of the first tensor.
  void place(const Argument& argument, AtenTensorHandle handle) {
    bool defined;
    int32_t layout, type, index;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_is_defined(handle, &defined));
    if (!defined) fail(argument, " must be a tensor, got None");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(handle, &layout));
    if (layout != aoti_torch_layout_strided()) fail(argument, " must be a dense tensor, got a sparse one");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &index));
    if (!first_) {
      first_ = argument;
      device_type_ = type;
      device_index_ = index;
    } else if (type != device_type_ || index != device_index_) {
      fail(argument, " must be on ", *first_, "'s device ", Device{device_type_, device_index_}, ", got ",
           Device{type, index});
    }
  }

  struct Device {
    int32_t type, index;

    friend std::ostream& operator<<(std::ostream& out, const Device& device) {
      if (device.type == aoti_torch_device_type_cpu()) return out << "cpu";
      if (device.type == aoti_torch_device_type_meta()) return out << "meta";
      return out << (device.type == aoti_torch_device_type_cuda() ? "cuda:" : "another:") << device.index;
    }
  };

  // All elements lie within the storage, which torch.UntypedStorage.resize_ may have freed.
  void memory(const Argument& argument, AtenTensorHandle handle, const int64_t* sizes, int64_t dim) const {
    int64_t *strides, offset, bytes;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(handle, &offset));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle, &bytes));
    int64_t last = offset;
    bool overflows = false;
    for (int64_t d = 0; d < dim; ++d) {
      int64_t reach;
      overflows |=
          __builtin_mul_overflow(sizes[d] - 1, strides[d], &reach) || __builtin_add_overflow(last, reach, &last);
    }
    const int64_t element = aoti_torch_dtype_element_size(dtype(handle));
    if (overflows || last >= bytes / element)
      fail(argument, " must lie within its storage of ", bytes, " bytes, got shape ", Shape{sizes, dim},
           " and strides ", Shape{strides, dim});
  }

  // Remove and return the next word.
  static std::string_view next(std::string_view& rest) {
    const size_t end = rest.find(' ');
    const std::string_view word = rest.substr(0, end);
    rest.remove_prefix(end == std::string_view::npos ? rest.size() : end + 1);
    return word;
  }

  // Return the size of a name, or `otherwise` if it has none yet.
  int64_t size(std::string_view name, int64_t otherwise) {
    if (const int64_t* known = find(name)) return *known;
    if (const auto number = constant(name)) return *number;
    names_[count_++] = {name, otherwise};
    return otherwise;
  }

  const int64_t* find(std::string_view name) const {
    for (size_t i = 0; i < count_; ++i)
      if (names_[i].name == name) return &names_[i].size;
    return nullptr;
  }

  static std::optional<int64_t> constant(std::string_view name) {
    if (name.size() == 1 && name[0] >= '0' && name[0] <= '9') return name[0] - '0';
    return std::nullopt;
  }

  [[noreturn, gnu::cold, gnu::noinline]] void fail_shape(const Argument& argument, const char* shape,
                                                         const int64_t* sizes, int64_t dim) const {
    std::ostringstream expected;
    int64_t length = 0;
    for (std::string_view rest = shape; !rest.empty(); ++length) {
      const std::string_view name = next(rest);
      if (length) expected << ", ";
      const int64_t* known = find(name);
      known ? expected << *known : expected << name;
    }
    fail(argument, " must have shape (", expected.str(), length == 1 ? ",)" : ")", ", got ", Shape{sizes, dim});
  }

  struct Named {
    std::string_view name;
    int64_t size;
  };

  const char* op_;
  std::optional<Argument> first_;  // the first tensor, whose device all tensors share
  int32_t device_type_ = -1, device_index_ = -1;
  std::array<Named, 12> names_;
  size_t count_ = 0;
};

}  // namespace kdkernels
