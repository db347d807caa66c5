// What an operator of zreward is, and the TensorRT plugin that is made from such a table.
//
// docs/tensorrt.md is the reference; a Definition repeats its tables. Sizes have letters: a tensor of shape "BSC" has
// three axes, and axes of one letter are equal in all tensors of a node. From that follow output shapes, the checks of
// input shapes and their messages.
#pragma once

#include <NvInferRuntime.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace zreward::tensorrt {

constexpr const char* kNamespace = "zreward";
constexpr const char* kVersion = "1";

struct Tensor {
  const char* name;
  const char* shape;  // a letter an axis
  bool computed;      // of the type T of the first input; else float32
};

struct Attribute {
  const char* name;
  bool integer;
  double least, most;
};

struct Definition {
  const char* name;
  std::vector<Tensor> inputs, outputs;
  std::vector<Attribute> attributes;
};

// A value as the operators read it, and as TensorRT serializes it.
struct Value {
  int32_t integer;
  float number;
};

// The size of every letter, −1 where it is not known yet.
class Sizes {
 public:
  static constexpr int64_t kUnknown = -1;
  Sizes() { std::fill(values_, values_ + kLetters, kUnknown); }
  int64_t operator[](char letter) const { return values_[static_cast<unsigned char>(letter)]; }
  void set(char letter, int64_t size) { values_[static_cast<unsigned char>(letter)] = size; }
  bool known(const char* letters) const {
    for (; *letters != 0; ++letters)
      if ((*this)[*letters] == kUnknown) return false;
    return true;
  }

 private:
  static constexpr int kLetters = 128;
  int64_t values_[kLetters];
};

// What enqueue hands to an operator.
struct Call {
  Sizes sizes;
  int32_t type;  // zreward_type of T
  const void* const* inputs;
  void* const* outputs;
  void* workspace;
  cudaStream_t stream;
};

// An operator with its attributes.
class Operator {
 public:
  explicit Operator(std::vector<Value> values) : values_(std::move(values)) {}
  virtual ~Operator() = default;
  virtual const Definition& definition() const = 0;

  // What is wrong with sizes, as far as they are known; "" where nothing is.
  virtual std::string check(const Sizes& sizes) const = 0;

  // Size of an output axis that no input has, as a product of input axes: their letters.
  virtual const char* product(char letter) const {
    (void)letter;
    return "";
  }

  // Bytes for the largest sizes of a profile.
  virtual size_t workspace(const Sizes& largest) const {
    (void)largest;
    return 0;
  }

  // Start the kernels: a zreward_status.
  virtual int run(const Call& call) const = 0;

  const std::vector<Value>& values() const { return values_; }

 protected:
  const Value& value(int index) const { return values_[static_cast<size_t>(index)]; }

 private:
  std::vector<Value> values_;
};

using MakeOperator = Operator* (*)(std::vector<Value>);

struct Entry {
  const Definition* definition;
  MakeOperator make;
};

extern const Entry kRubricExpectation, kCausalConv1d, kGatedDeltaRule;

// A message with values in it.
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
std::string text(const char* format, ...);

// An error for the user: to TensorRT's logger where it gave one, else to stderr.
void report(const std::string& message);

// The plugin for an operator; it owns it.
nvinfer1::IPluginV3* make_plugin(const Entry& entry, Operator* made);

}  // namespace zreward::tensorrt
