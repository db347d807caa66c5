// TensorRT's plugin interfaces (IPluginV3, TensorRT 10 and 11) over an operator and its table.
//
// The interfaces are called from several threads, but one object by one thread at a time; nothing here is shared but
// the logger.
#include <cmath>
#include <cstring>
#include <memory>

#include "operator.h"
#include "zreward_kernels.h"

namespace zreward::tensorrt {

namespace {

using namespace nvinfer1;

int32_t rank_of(const Tensor& tensor) { return static_cast<int32_t>(std::strlen(tensor.shape)); }

std::string shape_text(const Dims& dims) {
  std::string shown = "[";
  for (int32_t axis = 0; axis < dims.nbDims; ++axis)
    shown += (axis > 0 ? ", " : "") + (dims.d[axis] < 0 ? std::string("?") : std::to_string(dims.d[axis]));
  return shown + "]";
}

// Gives letters the sizes of the inputs; an axis of −1 tells nothing. Returns what does not fit, or "".
std::string bind_sizes(const Definition& definition, const std::vector<Dims>& inputs, Sizes& sizes) {
  if (inputs.size() != definition.inputs.size())
    return text("%s: there are %zu inputs; it takes %zu", definition.name, inputs.size(), definition.inputs.size());
  const char* given_by[128] = {};
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Tensor& tensor = definition.inputs[i];
    if (inputs[i].nbDims != rank_of(tensor))
      return text("%s: %s has shape %s; %d axes are expected", definition.name, tensor.name, shape_text(inputs[i]).c_str(),
                  rank_of(tensor));
    for (int32_t axis = 0; axis < rank_of(tensor); ++axis) {
      const char letter = tensor.shape[axis];
      const int64_t size = inputs[i].d[axis];
      if (size < 0) continue;
      if (sizes[letter] != Sizes::kUnknown && sizes[letter] != size)
        return text("%s: %s has shape %s; its axis %d must have %lld elements, as that of %s", definition.name, tensor.name,
                    shape_text(inputs[i]).c_str(), axis, static_cast<long long>(sizes[letter]),
                    given_by[static_cast<unsigned char>(letter)]);
      sizes.set(letter, size);
      given_by[static_cast<unsigned char>(letter)] = tensor.name;
    }
  }
  return "";
}

std::string check(const Operator& op, const std::vector<Dims>& inputs, Sizes& sizes) {
  const std::string wrong = bind_sizes(op.definition(), inputs, sizes);
  return wrong.empty() ? op.check(sizes) : wrong;
}

bool is_computed(DataType type) {
  return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

int32_t kernel_type(DataType type) {
  return type == DataType::kFLOAT ? ZREWARD_FLOAT32 : type == DataType::kHALF ? ZREWARD_FLOAT16 : ZREWARD_BFLOAT16;
}

// One node: its operator as all three capabilities of a plugin.
class Plugin final : public IPluginV3,
                     public IPluginV3OneCore,
                     public IPluginV3OneBuild,
                     public IPluginV3OneRuntime {
 public:
  Plugin(const Entry& entry, Operator* made) : entry_(entry), op_(made) {
    const std::vector<Attribute>& attributes = op_->definition().attributes;
    for (size_t i = 0; i < attributes.size(); ++i) {
      const Value& value = op_->values()[i];
      if (attributes[i].integer)
        fields_.emplace_back(attributes[i].name, &value.integer, PluginFieldType::kINT32, 1);
      else
        fields_.emplace_back(attributes[i].name, &value.number, PluginFieldType::kFLOAT32, 1);
      identity_ += attributes[i].integer ? text("%d ", value.integer) : text("%.9g ", static_cast<double>(value.number));
    }
    collection_.nbFields = static_cast<int32_t>(fields_.size());
    collection_.fields = fields_.data();
  }

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    if (type == PluginCapabilityType::kCORE) return static_cast<IPluginV3OneCore*>(this);
    if (type == PluginCapabilityType::kBUILD) return static_cast<IPluginV3OneBuild*>(this);
    return type == PluginCapabilityType::kRUNTIME ? static_cast<IPluginV3OneRuntime*>(this) : nullptr;
  }
  IPluginV3* clone() noexcept override { return make_plugin(entry_, entry_.make(op_->values())); }
  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

  const char* getPluginName() const noexcept override { return op_->definition().name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }
  const PluginFieldCollection* getFieldsToSerialize() noexcept override { return &collection_; }
  const char* getTimingCacheID() noexcept override { return identity_.c_str(); }

  int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(op_->definition().outputs.size()); }

  int32_t getOutputDataTypes(DataType* outputs, int32_t n_outputs, const DataType* inputs,
                             int32_t n_inputs) const noexcept override {
    const Definition& definition = op_->definition();
    if (!expect(n_inputs, n_outputs)) return 1;
    for (size_t i = 0; i < definition.inputs.size(); ++i) {
      const Tensor& tensor = definition.inputs[i];
      const bool fits = i == 0 ? is_computed(inputs[0]) : inputs[i] == (tensor.computed ? inputs[0] : DataType::kFLOAT);
      if (!fits) {
        report(text("%s: %s has a type (TensorRT's number %d) that it does not take; %s is expected", definition.name,
                    tensor.name, static_cast<int>(inputs[i]),
                    i == 0 ? "float32, float16 or bfloat16" : "float32"));
        return 1;
      }
    }
    for (size_t i = 0; i < definition.outputs.size(); ++i)
      outputs[i] = definition.outputs[i].computed ? inputs[0] : DataType::kFLOAT;
    return 0;
  }

  int32_t getOutputShapes(const DimsExprs* inputs, int32_t n_inputs, const DimsExprs*, int32_t, DimsExprs* outputs,
                          int32_t n_outputs, IExprBuilder& builder) noexcept override {
    const Definition& definition = op_->definition();
    if (!expect(n_inputs, n_outputs)) return 1;
    std::vector<Dims> known(static_cast<size_t>(n_inputs));
    for (size_t i = 0; i < known.size(); ++i) {
      known[i].nbDims = inputs[i].nbDims;
      for (int32_t axis = 0; axis < inputs[i].nbDims; ++axis)
        known[i].d[axis] = inputs[i].d[axis]->isConstant() ? inputs[i].d[axis]->getConstantValue() : Sizes::kUnknown;
    }
    Sizes sizes;
    if (is_wrong(check(*op_, known, sizes))) return 1;
    for (size_t i = 0; i < definition.outputs.size(); ++i) {
      const Tensor& tensor = definition.outputs[i];
      outputs[i].nbDims = rank_of(tensor);
      for (int32_t axis = 0; axis < outputs[i].nbDims; ++axis) outputs[i].d[axis] = size(tensor.shape[axis], inputs, builder);
    }
    return 0;
  }

  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t n_inputs,
                                 int32_t n_outputs) noexcept override {
    if (!expect(n_inputs, n_outputs) || position < 0 || position >= n_inputs + n_outputs) return false;
    const PluginTensorDesc& tensor = tensors[position].desc;
    if (tensor.format != TensorFormat::kLINEAR) return false;
    if (position == 0) return is_computed(tensor.type);
    const Definition& definition = op_->definition();
    const bool computed = position < n_inputs ? definition.inputs[static_cast<size_t>(position)].computed
                                              : definition.outputs[static_cast<size_t>(position - n_inputs)].computed;
    return tensor.type == (computed ? tensors[0].desc.type : DataType::kFLOAT);
  }

  int32_t configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t n_inputs, const DynamicPluginTensorDesc*,
                          int32_t n_outputs) noexcept override {
    if (!expect(n_inputs, n_outputs)) return 1;
    std::vector<Dims> shapes;
    for (int32_t i = 0; i < n_inputs; ++i) shapes.push_back(inputs[i].desc.dims);
    Sizes sizes;
    return is_wrong(check(*op_, shapes, sizes)) ? 1 : 0;
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t n_inputs, const DynamicPluginTensorDesc*,
                          int32_t n_outputs) const noexcept override {
    if (!expect(n_inputs, n_outputs)) return 0;
    std::vector<Dims> shapes;
    for (int32_t i = 0; i < n_inputs; ++i) shapes.push_back(inputs[i].max);
    Sizes largest;
    return is_wrong(bind_sizes(op_->definition(), shapes, largest)) ? 0 : op_->workspace(largest);
  }

  int32_t onShapeChange(const PluginTensorDesc* inputs, int32_t n_inputs, const PluginTensorDesc*,
                        int32_t n_outputs) noexcept override {
    if (!expect(n_inputs, n_outputs)) return 1;
    Sizes sizes;
    return is_wrong(check(*op_, shapes_of(inputs), sizes)) ? 1 : 0;
  }

  int32_t enqueue(const PluginTensorDesc* inputs, const PluginTensorDesc*, const void* const* from, void* const* to,
                  void* workspace, cudaStream_t stream) noexcept override {
    Sizes sizes;
    if (is_wrong(check(*op_, shapes_of(inputs), sizes))) return 1;
    const int status = op_->run({sizes, kernel_type(inputs[0].type), from, to, workspace, stream});
    if (status != ZREWARD_OK) report(zreward_last_error());
    return status;
  }

 private:
  bool expect(int32_t n_inputs, int32_t n_outputs) const {
    const Definition& definition = op_->definition();
    const int32_t inputs = static_cast<int32_t>(definition.inputs.size()), outputs = getNbOutputs();
    if (n_inputs == inputs && n_outputs == outputs) return true;
    report(text("%s: there are %d inputs and %d outputs; it has %d and %d", definition.name, n_inputs, n_outputs, inputs,
                outputs));
    return false;
  }

  static bool is_wrong(const std::string& wrong) {
    if (!wrong.empty()) report(wrong);
    return !wrong.empty();
  }

  std::vector<Dims> shapes_of(const PluginTensorDesc* inputs) const {
    std::vector<Dims> shapes;
    for (size_t i = 0; i < op_->definition().inputs.size(); ++i) shapes.push_back(inputs[i].dims);
    return shapes;
  }

  // The expression for an axis of an output.
  const IDimensionExpr* size(char letter, const DimsExprs* inputs, IExprBuilder& builder) const {
    const Definition& definition = op_->definition();
    for (size_t i = 0; i < definition.inputs.size(); ++i)
      if (const char* found = std::strchr(definition.inputs[i].shape, letter))
        return inputs[i].d[found - definition.inputs[i].shape];
    const IDimensionExpr* product = nullptr;
    for (const char* factor = op_->product(letter); *factor != 0; ++factor) {
      const IDimensionExpr* next = size(*factor, inputs, builder);
      product = product == nullptr ? next : builder.operation(DimensionOperation::kPROD, *product, *next);
    }
    return product;
  }

  const Entry& entry_;
  std::unique_ptr<Operator> op_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_;
  std::string identity_;
};

}  // namespace

nvinfer1::IPluginV3* make_plugin(const Entry& entry, Operator* made) { return new Plugin(entry, made); }

}  // namespace zreward::tensorrt
