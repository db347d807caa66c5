// As much of TensorRT as it takes to use a plugin library: it loads one, makes plugins and asks them, for tests.
//
// A library of C functions, so that the tests themselves are Python. Each answers 0 or a number that it is asked for,
// and a negative number where the plugin or the host refused; host_messages() then has what the plugins logged.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

std::string messages;

struct Logger final : ILogger {
  void log(Severity severity, const char* message) noexcept override {
    messages += (severity == Severity::kERROR ? "error: " : "other: ") + std::string(message) + "\n";
  }
} logger;

struct Finder final : ILoggerFinder {
  ILogger* findLogger() override { return &logger; }
} finder;

// A size that is known, or one whose name is all that is known.
struct Size final : IDimensionExpr, apiv::VDimensionExpr {
  Size(bool constant, int64_t value, std::string shown) : constant(constant), value(value), shown(std::move(shown)) {
    mImpl = this;
  }
  ~Size() noexcept override = default;
  bool isConstant() const noexcept override { return constant; }
  int64_t getConstantValue() const noexcept override { return value; }
  bool isSizeTensor() const noexcept override { return false; }
  bool constant;
  int64_t value;
  std::string shown;
};

struct Builder final : IExprBuilder, apiv::VExprBuilder {
  Builder() { mImpl = this; }
  ~Builder() noexcept override = default;
  const IDimensionExpr* make(bool constant, int64_t value, const std::string& shown) {
    sizes.push_back(std::make_unique<Size>(constant, value, shown));
    return sizes.back().get();
  }
  const IDimensionExpr* constant(int64_t value) override { return make(true, value, std::to_string(value)); }
  const IDimensionExpr* operation(DimensionOperation op, const IDimensionExpr& a, const IDimensionExpr& b) override {
    const auto &first = static_cast<const Size&>(a), &second = static_cast<const Size&>(b);
    if (op != DimensionOperation::kPROD) return make(false, 0, "?");
    if (first.constant && second.constant) return constant(first.value * second.value);
    return make(false, 0, first.shown + "*" + second.shown);
  }
  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override {
    return nullptr;
  }
  std::vector<std::unique_ptr<Size>> sizes;
};

struct Loaded {
  IPluginCreatorInterface* const* creators = nullptr;
  int32_t count = 0;
  IPluginCreatorV3One* at(int index) const { return static_cast<IPluginCreatorV3One*>(creators[index]); }
} loaded;

struct Plugin {
  explicit Plugin(IPluginV3* made) : all(made) {
    core = static_cast<IPluginV3OneCore*>(all->getCapabilityInterface(PluginCapabilityType::kCORE));
    build = static_cast<IPluginV3OneBuild*>(all->getCapabilityInterface(PluginCapabilityType::kBUILD));
    runtime = static_cast<IPluginV3OneRuntime*>(all->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  }
  std::unique_ptr<IPluginV3> all;
  IPluginV3OneCore* core;
  IPluginV3OneBuild* build;
  IPluginV3OneRuntime* runtime;
};

std::string text_of(const Size& size) { return size.shown; }

// Tensors as the callers give them: types, ranks, and the sizes of all axes in a row, −1 for one that is not known.
std::vector<DynamicPluginTensorDesc> tensors(int count, const int32_t* types, const int32_t* ranks,
                                             const int64_t* sizes, TensorFormat format = TensorFormat::kLINEAR) {
  std::vector<DynamicPluginTensorDesc> made(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) {
    DynamicPluginTensorDesc& tensor = made[static_cast<size_t>(i)];
    tensor = {};
    tensor.desc.type = static_cast<DataType>(types[i]);
    tensor.desc.format = format;
    tensor.desc.dims.nbDims = ranks[i];
    std::copy_n(sizes, ranks[i], tensor.desc.dims.d);
    sizes += ranks[i];
    tensor.min = tensor.opt = tensor.max = tensor.desc.dims;
  }
  return made;
}

std::vector<PluginTensorDesc> plain(const std::vector<DynamicPluginTensorDesc>& from) {
  std::vector<PluginTensorDesc> made;
  for (const auto& tensor : from) made.push_back(tensor.desc);
  return made;
}

bool has_kind(const IVersionedInterface* interface, const char* kind) {
  return interface != nullptr && std::strcmp(interface->getInterfaceInfo().kind, kind) == 0 &&
         interface->getInterfaceInfo().major == 1 && interface->getAPILanguage() == APILanguage::kCPP;
}

}  // namespace

extern "C" {

// What was logged since the last call.
const char* host_messages() {
  static std::string given;
  given = std::move(messages);
  messages.clear();
  return given.c_str();
}

// The number of creators in a library.
int host_load(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    messages += dlerror();
    return -1;
  }
  using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
  using SetLoggerFinder = void (*)(ILoggerFinder*);
  const auto get_creators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
  const auto set_logger_finder = reinterpret_cast<SetLoggerFinder>(dlsym(library, "setLoggerFinder"));
  if (get_creators == nullptr || set_logger_finder == nullptr) return -2;
  set_logger_finder(&finder);
  loaded.creators = get_creators(loaded.count);
  for (int i = 0; i < loaded.count; ++i)
    if (!has_kind(loaded.creators[i], "PLUGIN CREATOR_V3ONE")) return -3;
  return loaded.count;
}

// "name version namespace attribute:type …"
const char* host_creator(int index) {
  static std::string shown;
  IPluginCreatorV3One* creator = loaded.at(index);
  shown =
      std::string(creator->getPluginName()) + " " + creator->getPluginVersion() + " " + creator->getPluginNamespace();
  const PluginFieldCollection* fields = creator->getFieldNames();
  for (int32_t i = 0; i < fields->nbFields; ++i)
    shown += " " + std::string(fields->fields[i].name) + ":" + std::to_string(static_cast<int>(fields->fields[i].type));
  return shown.c_str();
}

// A plugin of creator `index`, or null.
Plugin* host_create(int index, int phase, int count, const char* const* names, const int32_t* types,
                    const int32_t* lengths, const void* const* data) {
  std::vector<PluginField> fields;
  for (int i = 0; i < count; ++i)
    fields.emplace_back(names[i], data[i], static_cast<PluginFieldType>(types[i]), lengths[i]);
  PluginFieldCollection collection;
  collection.nbFields = count;
  collection.fields = fields.data();
  IPluginV3* made = loaded.at(index)->createPlugin("node", &collection, static_cast<TensorRTPhase>(phase));
  if (made == nullptr) return nullptr;
  auto plugin = std::make_unique<Plugin>(made);
  const bool complete = has_kind(made, "PLUGIN") && has_kind(plugin->core, "PLUGIN_V3ONE_CORE") &&
                        has_kind(plugin->build, "PLUGIN_V3ONE_BUILD") &&
                        has_kind(plugin->runtime, "PLUGIN_V3ONE_RUNTIME");
  return complete ? plugin.release() : nullptr;
}

void host_destroy(Plugin* plugin) { delete plugin; }

Plugin* host_clone(Plugin* plugin) { return new Plugin(plugin->all->clone()); }

Plugin* host_attach(Plugin* plugin) { return new Plugin(plugin->runtime->attachToContext(nullptr)); }

const char* host_name(Plugin* plugin) {
  static std::string shown;
  shown = std::string(plugin->core->getPluginName()) + " " + plugin->core->getPluginVersion() + " " +
          plugin->core->getPluginNamespace();
  return shown.c_str();
}

// What an engine would keep of the plugin: "name type length hexadecimal bytes", a field a line.
const char* host_serialize(Plugin* plugin) {
  static std::string shown;
  shown.clear();
  const PluginFieldCollection* fields = plugin->runtime->getFieldsToSerialize();
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    const PluginField& field = fields->fields[i];
    shown += std::string(field.name) + " " + std::to_string(static_cast<int>(field.type)) + " " +
             std::to_string(field.length) + " ";
    const int bytes = 4 * field.length;  // float32 and int32 are all that the plugins serialize
    for (int byte = 0; byte < bytes; ++byte) {
      char digits[3];
      std::snprintf(digits, sizeof digits, "%02x", static_cast<const unsigned char*>(field.data)[byte]);
      shown += digits;
    }
    shown += "\n";
  }
  return shown.c_str();
}

// Shapes of the outputs as "a,b;c", with the names of unknown sizes, which are letters a, b, … of the input axes.
const char* host_output_shapes(Plugin* plugin, int n_inputs, const int32_t* ranks, const int64_t* sizes) {
  static std::string shown;
  Builder builder;
  std::vector<DimsExprs> inputs(static_cast<size_t>(n_inputs));
  char name = 'a';
  for (int i = 0; i < n_inputs; ++i) {
    inputs[static_cast<size_t>(i)].nbDims = ranks[i];
    for (int axis = 0; axis < ranks[i]; ++axis, ++sizes, ++name)
      inputs[static_cast<size_t>(i)].d[axis] =
          *sizes < 0 ? builder.make(false, 0, std::string(1, name)) : builder.constant(*sizes);
  }
  std::vector<DimsExprs> outputs(static_cast<size_t>(plugin->build->getNbOutputs()));
  if (plugin->build->getOutputShapes(inputs.data(), n_inputs, nullptr, 0, outputs.data(),
                                     static_cast<int32_t>(outputs.size()), builder) != 0)
    return nullptr;
  shown.clear();
  for (const DimsExprs& output : outputs) {
    if (!shown.empty()) shown += ";";
    for (int axis = 0; axis < output.nbDims; ++axis)
      shown += (axis > 0 ? "," : "") + text_of(static_cast<const Size&>(*output.d[axis]));
  }
  return shown.c_str();
}

// Types of the outputs; their number.
int host_output_types(Plugin* plugin, int n_inputs, const int32_t* input_types, int32_t* output_types) {
  std::vector<DataType> inputs, outputs(static_cast<size_t>(plugin->build->getNbOutputs()));
  for (int i = 0; i < n_inputs; ++i) inputs.push_back(static_cast<DataType>(input_types[i]));
  if (plugin->build->getOutputDataTypes(outputs.data(), static_cast<int32_t>(outputs.size()), inputs.data(),
                                        n_inputs) != 0)
    return -1;
  for (size_t i = 0; i < outputs.size(); ++i) output_types[i] = static_cast<int32_t>(outputs[i]);
  return static_cast<int>(outputs.size());
}

// Whether tensor `position` may have its type and `format`, given those before it.
int host_supports(Plugin* plugin, int position, int n_inputs, int n_outputs, const int32_t* types, int format) {
  const std::vector<int32_t> ranks(static_cast<size_t>(n_inputs + n_outputs), 0);
  const auto all = tensors(n_inputs + n_outputs, types, ranks.data(), nullptr, static_cast<TensorFormat>(format));
  return plugin->build->supportsFormatCombination(position, all.data(), n_inputs, n_outputs) ? 1 : 0;
}

int host_configure(Plugin* plugin, int n_inputs, const int32_t* types, const int32_t* ranks, const int64_t* sizes) {
  const auto inputs = tensors(n_inputs, types, ranks, sizes);
  const std::vector<DynamicPluginTensorDesc> outputs(static_cast<size_t>(plugin->build->getNbOutputs()));
  return plugin->build->configurePlugin(inputs.data(), n_inputs, outputs.data(), static_cast<int32_t>(outputs.size()));
}

// Bytes for inputs of at most these sizes.
int64_t host_workspace(Plugin* plugin, int n_inputs, const int32_t* types, const int32_t* ranks, const int64_t* sizes) {
  auto inputs = tensors(n_inputs, types, ranks, sizes);
  for (auto& tensor : inputs)
    for (int axis = 0; axis < tensor.desc.dims.nbDims; ++axis) tensor.desc.dims.d[axis] = tensor.min.d[axis] = -1;
  const std::vector<DynamicPluginTensorDesc> outputs(static_cast<size_t>(plugin->build->getNbOutputs()));
  return static_cast<int64_t>(
      plugin->build->getWorkspaceSize(inputs.data(), n_inputs, outputs.data(), static_cast<int32_t>(outputs.size())));
}

// Shape change, then the kernels on a null stream: only for libraries on emulated kernels.
int host_run(Plugin* plugin, int n_inputs, const int32_t* types, const int32_t* ranks, const int64_t* sizes,
             const void* const* from, void* const* to, void* workspace) {
  const auto inputs = plain(tensors(n_inputs, types, ranks, sizes));
  const std::vector<PluginTensorDesc> outputs(static_cast<size_t>(plugin->build->getNbOutputs()));
  const int changed =
      plugin->runtime->onShapeChange(inputs.data(), n_inputs, outputs.data(), static_cast<int32_t>(outputs.size()));
  return changed != 0 ? changed : plugin->runtime->enqueue(inputs.data(), outputs.data(), from, to, workspace, nullptr);
}

}  // extern "C"
