#include "op.h"

#include <cstring>

namespace zreward {

namespace {

ort::FunctionTable g_table = nullptr;

float float_of_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = half >> 10 & 31, fraction = half & 1023;
  float value;
  if (exponent == 0) {
    value = static_cast<float>(fraction) * 0x1p-24f;
  } else {
    const uint32_t bits = (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    std::memcpy(&value, &bits, sizeof value);
  }
  return sign ? -value : value;
}

}  // namespace

const ort::Api& api() {
  static const ort::Api instance(g_table);
  return instance;
}

void set_api(ort::FunctionTable table) { g_table = table; }

void check(ort::Status* status) {
  if (status == nullptr) return;
  api().release(status);
  throw std::runtime_error("ONNX Runtime refused a request of the operator");
}

bool has_bfloat16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

Tensor tensor_of(const ort::Value* value) {
  Tensor tensor;
  if (value == nullptr) return tensor;
  ort::ShapeInfo* info = nullptr;
  check(api().type_and_shape(value, &info));
  const std::unique_ptr<ort::ShapeInfo, void (*)(ort::ShapeInfo*)> owner(info, [](auto* p) { api().release(p); });
  check(api().dimension_count(info, &tensor.shape.rank));
  if (tensor.shape.rank > tensor.shape.sizes.size()) throw std::runtime_error("an input has too many axes");
  check(api().dimensions(info, tensor.shape.sizes.data(), tensor.shape.rank));
  check(api().element_type(info, &tensor.type));
  void* data = nullptr;
  check(api().mutable_data(const_cast<ort::Value*>(value), &data));
  static const char nothing = 0;
  tensor.data = data == nullptr ? &nothing : data;  // an empty tensor has no memory
  return tensor;
}

std::vector<float> floats_of(const Tensor& tensor) {
  const size_t n = static_cast<size_t>(tensor.shape.count());
  std::vector<float> values(n);
  if (tensor.type == ort::kFloat) {
    std::memcpy(values.data(), tensor.data, n * sizeof(float));
  } else if (tensor.type == ort::kFloat16) {
    for (size_t i = 0; i < n; ++i) values[i] = float_of_half(tensor.as<uint16_t>()[i]);
  } else {
    throw std::runtime_error("expected a tensor of float32 or float16");
  }
  return values;
}

int64_t Setup::integer(const char* name) const {
  int64_t value = 0;
  check(api().attribute(info_, name, &value));
  return value;
}

int64_t Setup::integer(const char* name, int64_t otherwise) const {
  int64_t value = 0;
  ort::Status* status = api().attribute(info_, name, &value);
  if (status == nullptr) return value;
  api().release(status);
  return otherwise;
}

float Setup::number(const char* name) const {
  float value = 0;
  check(api().attribute(info_, name, &value));
  return value;
}

Tensor Setup::constant(size_t index, const char* name) const {
  int is_constant = 0;
  const ort::Value* value = nullptr;
  check(api().constant_input(info_, index, &is_constant, &value));
  if (!is_constant) throw std::runtime_error(std::string("input '") + name + "' must be an initializer");
  return tensor_of(value);
}

Tensor Context::input(size_t index) const {
  const ort::Value* value = nullptr;
  check(api().input(context_, index, &value));
  return tensor_of(value);
}

float* Context::output(size_t index, const Shape& shape) const {
  ort::Value* value = nullptr;
  check(api().output(context_, index, shape.sizes.data(), shape.rank, &value));
  void* data = nullptr;
  check(api().mutable_data(value, &data));
  return static_cast<float*>(data);
}

}  // namespace zreward
