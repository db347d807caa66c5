// What an operator is written with: tensors, threads, errors, and its registration.
#pragma once

#include <array>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ort_abi.h"

namespace zreward {

// The table of the runtime that loaded this library; set by RegisterCustomOps.
const ort::Api& api();
void set_api(ort::FunctionTable table);

// Throws std::runtime_error where the runtime reports a failure.
void check(ort::Status* status);

struct Shape {
  std::array<int64_t, 8> sizes{};
  size_t rank = 0;

  Shape() = default;
  Shape(std::initializer_list<int64_t> values) {
    for (int64_t value : values) sizes[rank++] = value;
  }
  int64_t operator[](size_t axis) const { return sizes[axis]; }
  int64_t last() const { return sizes[rank - 1]; }
  int64_t count() const {
    int64_t product = 1;
    for (size_t i = 0; i < rank; ++i) product *= sizes[i];
    return product;
  }
};

struct Tensor {
  const void* data = nullptr;
  Shape shape;
  int type = ort::kAnyType;

  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

Tensor tensor_of(const ort::Value* value);

// The elements as float32; the tensor holds float32 or float16.
std::vector<float> floats_of(const Tensor& tensor);

// What a kernel sees when it is created.
class Setup {
 public:
  explicit Setup(const ort::KernelInfo* info) : info_(info) {}
  int64_t integer(const char* name) const;
  int64_t integer(const char* name, int64_t otherwise) const;  // where the attribute may be missing
  float number(const char* name) const;
  // A weight. Throws where it is not known before the graph runs.
  Tensor constant(size_t index, const char* name) const;

 private:
  const ort::KernelInfo* info_;
};

// What a kernel sees when it runs.
class Context {
 public:
  explicit Context(ort::KernelContext* context) : context_(context) {}
  Tensor input(size_t index) const;
  float* output(size_t index, const Shape& shape) const;

  // Runs task(0) … task(n - 1) on the session's threads; returns when all are done.
  template <typename Task>
  void parallel(size_t n, const Task& task) const {
    if (n == 0) return;
    if (n == 1) return task(0);
    auto run = [](void* data, size_t index) { (*static_cast<const Task*>(data))(index); };
    check(api().parallel_for(context_, run, n, n, const_cast<Task*>(&task)));
  }

 private:
  ort::KernelContext* context_;
};

// Memory of cache-line alignment that is reused by later runs on the same thread.
template <typename T>
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  T* resized(size_t n) {
    if (n > capacity_) {
      std::free(data_);
      const size_t bytes = (n * sizeof(T) + 63) / 64 * 64;
      data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
      capacity_ = n;
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  size_t capacity_ = 0;
};

// What the input keep_states says, a whole number: whether the new states will be read.
inline bool keeps_states(const Tensor& flag) {
  if (flag.shape.count() != 1) throw std::runtime_error("keep_states must be one number");
  return *flag.as<int64_t>() != 0;
}

// Whether the processor multiplies pairs of bfloat16.
bool has_bfloat16();

inline size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

template <typename Kernel, typename = void>
constexpr size_t kOptionalInputs = 0;
template <typename Kernel>
constexpr size_t kOptionalInputs<Kernel, std::void_t<decltype(Kernel::kOptional)>> = Kernel::kOptional;

// The operator of a kernel class, which has
//   static constexpr const char* kName; static constexpr int kInputs[], kOutputs[]  (element types)
//   static constexpr size_t kOptional  (how many of the last inputs may be missing; none without it)
//   explicit Kernel(const Setup&);  void run(const Context&) const;
template <typename Kernel>
const ort::CustomOp* operator_of() {
  using ort::CustomOp;
  static const CustomOp op = [] {
    CustomOp table{};
    table.version = ort::kApiVersion;
    table.name = [](const CustomOp*) { return Kernel::kName; };
    table.provider = [](const CustomOp*) -> const char* { return nullptr; };
    table.input_type = [](const CustomOp*, size_t i) { return static_cast<int>(Kernel::kInputs[i]); };
    table.input_count = [](const CustomOp*) { return std::size(Kernel::kInputs); };
    table.output_type = [](const CustomOp*, size_t i) { return static_cast<int>(Kernel::kOutputs[i]); };
    table.output_count = [](const CustomOp*) { return std::size(Kernel::kOutputs); };
    table.destroy_kernel = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    table.input_characteristic = [](const CustomOp*, size_t i) {
      const bool is_required = i + kOptionalInputs<Kernel> < std::size(Kernel::kInputs);
      return static_cast<int>(is_required ? ort::kRequired : ort::kOptional);
    };
    table.output_characteristic = [](const CustomOp*, size_t) { return static_cast<int>(ort::kRequired); };
    table.input_memory_type = [](const CustomOp*, size_t) { return 0; };
    table.variadic_input_min = table.variadic_input_homogeneous = [](const CustomOp*) { return 0; };
    table.variadic_output_min = table.variadic_output_homogeneous = [](const CustomOp*) { return 0; };
    table.create_kernel_v2 = [](const CustomOp*, ort::FunctionTable, const ort::KernelInfo* info,
                                void** kernel) -> ort::Status* {
      try {
        *kernel = new Kernel(Setup(info));
        return nullptr;
      } catch (const std::exception& error) {
        return api().create_status(ort::kInvalidArgument, (std::string(Kernel::kName) + ": " + error.what()).c_str());
      }
    };
    table.compute_v2 = [](void* kernel, ort::KernelContext* context) -> ort::Status* {
      try {
        static_cast<const Kernel*>(kernel)->run(Context(context));
        return nullptr;
      } catch (const std::exception& error) {
        return api().create_status(ort::kFail, (std::string(Kernel::kName) + ": " + error.what()).c_str());
      }
    };
    table.start_version = [](const CustomOp*) { return 1; };
    table.end_version = [](const CustomOp*) { return 1; };
    return table;
  }();
  return &op;
}

}  // namespace zreward
