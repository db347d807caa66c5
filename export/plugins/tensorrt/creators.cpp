// What TensorRT's registry finds in the library: a creator for each operator, which reads attributes and says what is
// wrong with them.
#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "operator.h"
#include "zreward_kernels.h"

namespace zreward::tensorrt {

namespace {

using namespace nvinfer1;

std::atomic<ILoggerFinder*> logger_finder{nullptr};

// ONNX attributes that choose the plugin and do not belong to it.
bool chooses_plugin(const char* name) {
  for (const char* known : {"plugin_version", "plugin_namespace", "aot_plugin"})
    if (std::strcmp(name, known) == 0) return true;
  return false;
}

// The number of a field, or what is wrong with it.
std::string read(const Definition& definition, const Attribute& attribute, const PluginField& field, Value& value) {
  const auto wrong = [&](const char* what) {
    return text("%s: attribute %s %s; one %s is expected", definition.name, attribute.name, what,
                attribute.integer ? "integer" : "float");
  };
  if (field.length != 1 || field.data == nullptr) return wrong(text("has %d values", field.length).c_str());
  double number = 0;
  if (attribute.integer && field.type == PluginFieldType::kINT32)
    number = *static_cast<const int32_t*>(field.data);
  else if (attribute.integer && field.type == PluginFieldType::kINT64)
    number = static_cast<double>(*static_cast<const int64_t*>(field.data));
  else if (!attribute.integer && field.type == PluginFieldType::kFLOAT32)
    number = *static_cast<const float*>(field.data);
  else if (!attribute.integer && field.type == PluginFieldType::kFLOAT64)
    number = *static_cast<const double*>(field.data);
  else
    return wrong(text("has another type (TensorRT's number %d)", static_cast<int>(field.type)).c_str());
  if (!(number >= attribute.least && number <= attribute.most))
    return text("%s: attribute %s is %g; %g to %g are taken", definition.name, attribute.name, number, attribute.least,
                attribute.most);
  value.integer = attribute.integer ? static_cast<int32_t>(number) : 0;
  value.number = attribute.integer ? 0.0f : static_cast<float>(number);
  return "";
}

// Values in the order of the table, or what is wrong with the fields.
std::string read_all(const Definition& definition, const PluginFieldCollection& fields, std::vector<Value>& values) {
  std::vector<bool> found(definition.attributes.size(), false);
  values.assign(definition.attributes.size(), Value{});
  for (int32_t i = 0; i < fields.nbFields; ++i) {
    const PluginField& field = fields.fields[i];
    if (field.name == nullptr) return text("%s: an attribute has no name", definition.name);
    if (chooses_plugin(field.name)) continue;
    size_t at = 0;
    while (at < found.size() && std::strcmp(definition.attributes[at].name, field.name) != 0) ++at;
    if (at == found.size()) return text("%s: there is no attribute %s", definition.name, field.name);
    if (found[at]) return text("%s: attribute %s is given twice", definition.name, field.name);
    found[at] = true;
    const std::string wrong = read(definition, definition.attributes[at], field, values[at]);
    if (!wrong.empty()) return wrong;
  }
  for (size_t at = 0; at < found.size(); ++at)
    if (!found[at]) return text("%s: attribute %s is missing", definition.name, definition.attributes[at].name);
  return "";
}

class Creator final : public IPluginCreatorV3One {
 public:
  explicit Creator(const Entry& entry) : entry_(entry) {
    for (const Attribute& attribute : entry.definition->attributes)
      fields_.emplace_back(attribute.name, nullptr,
                           attribute.integer ? PluginFieldType::kINT32 : PluginFieldType::kFLOAT32, 1);
    collection_.nbFields = static_cast<int32_t>(fields_.size());
    collection_.fields = fields_.data();
  }

  IPluginV3* createPlugin(const char*, const PluginFieldCollection* fields, TensorRTPhase) noexcept override {
    std::vector<Value> values;
    const PluginFieldCollection none{};
    std::string wrong = read_all(*entry_.definition, fields == nullptr ? none : *fields, values);
    if (wrong.empty()) {
      Operator* made = entry_.make(values);
      wrong = made->check(Sizes{});
      if (wrong.empty()) return make_plugin(entry_, made);
      delete made;
    }
    report(wrong);
    return nullptr;
  }
  const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return entry_.definition->name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  const Entry& entry_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_;
};

const Entry* const kEntries[] = {&kRubricExpectation, &kCausalConv1d, &kGatedDeltaRule};

std::string described() {
  std::string plugins;
  for (const Entry* entry : kEntries) {
    std::string attributes;
    for (const Attribute& attribute : entry->definition->attributes)
      attributes += text("%s\"%s\"", attributes.empty() ? "" : ", ", attribute.name);
    plugins += text("%s{\"name\": \"%s\", \"version\": \"%s\", \"namespace\": \"%s\", \"attributes\": [%s]}",
                    plugins.empty() ? "" : ", ", entry->definition->name, kVersion, kNamespace, attributes.c_str());
  }
  return text("{\"tensorrt\": \"%d.%d.%d\", \"kernels\": %d, \"plugins\": [%s]}", NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR,
              NV_TENSORRT_PATCH, zreward_kernels_version(), plugins.c_str());
}

}  // namespace

std::string text(const char* format, ...) {
  va_list arguments, again;
  va_start(arguments, format);
  va_copy(again, arguments);
  const int length = std::vsnprintf(nullptr, 0, format, arguments);
  va_end(arguments);
  std::string message(static_cast<size_t>(length > 0 ? length : 0), ' ');
  std::vsnprintf(message.data(), message.size() + 1, format, again);
  va_end(again);
  return message;
}

void report(const std::string& message) {
  ILoggerFinder* finder = logger_finder;
  ILogger* logger = finder == nullptr ? nullptr : finder->findLogger();
  if (logger != nullptr)
    logger->log(ILogger::Severity::kERROR, message.c_str());
  else
    std::fprintf(stderr, "zreward: %s\n", message.c_str());
}

}  // namespace zreward::tensorrt

using namespace zreward::tensorrt;

// The two functions that IPluginRegistry::loadLibrary looks for.
extern "C" ZREWARD_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static Creator creators[] = {Creator(kRubricExpectation), Creator(kCausalConv1d), Creator(kGatedDeltaRule)};
  static nvinfer1::IPluginCreatorInterface* const pointers[] = {&creators[0], &creators[1], &creators[2]};
  count = static_cast<int32_t>(sizeof pointers / sizeof pointers[0]);
  return pointers;
}

extern "C" ZREWARD_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { logger_finder = finder; }

// What is in the library, as JSON, for callers without TensorRT.
extern "C" ZREWARD_API const char* zreward_plugins_describe() {
  static const std::string json = described();
  return json.c_str();
}
