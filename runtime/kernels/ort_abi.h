// The part of ONNX Runtime's C interface that an operator library needs.
//
// Wheels of onnxruntime carry no headers. The interface is a table of function pointers that only ever grows, so
// the positions below hold for every version since the one in kApiVersion (ONNX Runtime 1.17), and a struct that
// starts with its version. Source of positions and signatures: onnxruntime_c_api.h of ONNX Runtime 1.17 to 1.23.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct ShapeInfo;
struct ShapeInferContext;

constexpr uint32_t kApiVersion = 17;

enum ElementType : int { kAnyType = 0, kFloat = 1, kUInt8 = 2, kInt8 = 3, kInt64 = 7, kFloat16 = 10 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };
enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };

using FunctionTable = const void* const*;

struct ApiBase {
  FunctionTable (*get_api)(uint32_t version);
  const char* (*version_string)();
};

// What the runtime calls on an operator, in the order of OrtCustomOp.
struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, FunctionTable, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute)(void* kernel, KernelContext*);
  void (*destroy_kernel)(void* kernel);
  int (*input_characteristic)(const CustomOp*, size_t);
  int (*output_characteristic)(const CustomOp*, size_t);
  int (*input_memory_type)(const CustomOp*, size_t);
  int (*variadic_input_min)(const CustomOp*);
  int (*variadic_input_homogeneous)(const CustomOp*);
  int (*variadic_output_min)(const CustomOp*);
  int (*variadic_output_homogeneous)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, FunctionTable, const KernelInfo*, void** kernel);
  Status* (*compute_v2)(void* kernel, KernelContext*);
  Status* (*infer_output_shape)(const CustomOp*, ShapeInferContext*);
  int (*start_version)(const CustomOp*);
  int (*end_version)(const CustomOp*);
  size_t (*may_inplace)(int**, int**);
  void (*release_may_inplace)(int*, int*);
  size_t (*alias_map)(int**, int**);
  void (*release_alias_map)(int*, int*);
};

// The functions that are used, by their position in the table.
class Api {
 public:
  explicit Api(FunctionTable table) : table_(table) {}

  Status* create_status(int code, const char* message) const {
    return at<Status* (*)(int, const char*)>(0)(code, message);
  }
  Status* create_domain(const char* name, CustomOpDomain** domain) const {
    return at<Status* (*)(const char*, CustomOpDomain**)>(26)(name, domain);
  }
  Status* domain_add(CustomOpDomain* domain, const CustomOp* op) const {
    return at<Status* (*)(CustomOpDomain*, const CustomOp*)>(27)(domain, op);
  }
  Status* add_domain(SessionOptions* options, CustomOpDomain* domain) const {
    return at<Status* (*)(SessionOptions*, CustomOpDomain*)>(28)(options, domain);
  }
  Status* mutable_data(Value* value, void** data) const {
    return at<Status* (*)(Value*, void**)>(51)(value, data);
  }
  Status* element_type(const ShapeInfo* info, int* type) const {
    return at<Status* (*)(const ShapeInfo*, int*)>(60)(info, type);
  }
  Status* dimension_count(const ShapeInfo* info, size_t* count) const {
    return at<Status* (*)(const ShapeInfo*, size_t*)>(61)(info, count);
  }
  Status* dimensions(const ShapeInfo* info, int64_t* values, size_t count) const {
    return at<Status* (*)(const ShapeInfo*, int64_t*, size_t)>(62)(info, values, count);
  }
  Status* type_and_shape(const Value* value, ShapeInfo** info) const {
    return at<Status* (*)(const Value*, ShapeInfo**)>(65)(value, info);
  }
  Status* attribute(const KernelInfo* info, const char* name, float* value) const {
    return at<Status* (*)(const KernelInfo*, const char*, float*)>(85)(info, name, value);
  }
  Status* attribute(const KernelInfo* info, const char* name, int64_t* value) const {
    return at<Status* (*)(const KernelInfo*, const char*, int64_t*)>(86)(info, name, value);
  }
  Status* input(const KernelContext* context, size_t index, const Value** value) const {
    return at<Status* (*)(const KernelContext*, size_t, const Value**)>(90)(context, index, value);
  }
  Status* output(KernelContext* context, size_t index, const int64_t* shape, size_t rank, Value** value) const {
    return at<Status* (*)(KernelContext*, size_t, const int64_t*, size_t, Value**)>(91)(context, index, shape, rank,
                                                                                     value);
  }
  void release(Status* status) const { at<void (*)(Status*)>(93)(status); }
  void release(ShapeInfo* info) const { at<void (*)(ShapeInfo*)>(99)(info); }
  Status* constant_input(const KernelInfo* info, size_t index, int* is_constant, const Value** value) const {
    return at<Status* (*)(const KernelInfo*, size_t, int*, const Value**)>(249)(info, index, is_constant, value);
  }
  Status* parallel_for(const KernelContext* context, void (*run)(void*, size_t), size_t total, size_t batches,
                       void* data) const {
    return at<Status* (*)(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(
        context, run, total, batches, data);
  }

 private:
  template <typename Function>
  Function at(size_t position) const {
    return reinterpret_cast<Function>(const_cast<void*>(table_[position]));
  }

  FunctionTable table_;
};

}  // namespace ort
