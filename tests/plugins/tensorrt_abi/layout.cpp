// Prints where virtual functions and members lie, one a line, for the header that the compiler finds.
//
// In the C++ ABI of GCC and Clang a pointer to a virtual member function holds 1 + its offset in the table.
#include <NvInferRuntime.h>

#include <cstdio>
#include <cstring>

using namespace nvinfer1;

namespace {

template <typename Member>
void print_function(const char* name, Member member) {
  ptrdiff_t words[2];
  static_assert(sizeof words == sizeof member);
  std::memcpy(words, &member, sizeof words);
  std::printf("%s %td %td\n", name, words[0], words[1]);
}

}  // namespace

#define FUNCTION(type, name) print_function(#type "::" #name, &type::name)
#define MEMBER(type, name) std::printf("%s::%s %zu %zu\n", #type, #name, offsetof(type, name), sizeof(type))
#define NUMBER(name) std::printf("%s %d\n", #name, static_cast<int>(name))

int main() {
  FUNCTION(ILogger, log);
  FUNCTION(ILoggerFinder, findLogger);
  FUNCTION(IVersionedInterface, getAPILanguage);
  FUNCTION(IVersionedInterface, getInterfaceInfo);
  FUNCTION(IPluginV3, getCapabilityInterface);
  FUNCTION(IPluginV3, clone);
  FUNCTION(IPluginV3OneCore, getPluginName);
  FUNCTION(IPluginV3OneCore, getPluginVersion);
  FUNCTION(IPluginV3OneCore, getPluginNamespace);
  FUNCTION(IPluginV3OneBuild, configurePlugin);
  FUNCTION(IPluginV3OneBuild, getOutputDataTypes);
  FUNCTION(IPluginV3OneBuild, getOutputShapes);
  FUNCTION(IPluginV3OneBuild, supportsFormatCombination);
  FUNCTION(IPluginV3OneBuild, getNbOutputs);
  FUNCTION(IPluginV3OneBuild, getWorkspaceSize);
  FUNCTION(IPluginV3OneBuild, getValidTactics);
  FUNCTION(IPluginV3OneBuild, getNbTactics);
  FUNCTION(IPluginV3OneBuild, getTimingCacheID);
  FUNCTION(IPluginV3OneBuild, getFormatCombinationLimit);
  FUNCTION(IPluginV3OneBuild, getMetadataString);
  FUNCTION(IPluginV3OneRuntime, setTactic);
  FUNCTION(IPluginV3OneRuntime, onShapeChange);
  FUNCTION(IPluginV3OneRuntime, enqueue);
  FUNCTION(IPluginV3OneRuntime, attachToContext);
  FUNCTION(IPluginV3OneRuntime, getFieldsToSerialize);
  FUNCTION(IPluginCreatorV3One, createPlugin);
  FUNCTION(IPluginCreatorV3One, getFieldNames);
  FUNCTION(IPluginCreatorV3One, getPluginName);
  FUNCTION(IPluginCreatorV3One, getPluginVersion);
  FUNCTION(IPluginCreatorV3One, getPluginNamespace);
  FUNCTION(apiv::VDimensionExpr, isConstant);
  FUNCTION(apiv::VDimensionExpr, getConstantValue);
  FUNCTION(apiv::VExprBuilder, constant);
  FUNCTION(apiv::VExprBuilder, operation);
  MEMBER(Dims, d);
  MEMBER(InterfaceInfo, minor);
  MEMBER(PluginField, length);
  MEMBER(PluginFieldCollection, fields);
  MEMBER(PluginTensorDesc, scale);
  MEMBER(DynamicPluginTensorDesc, min);
  MEMBER(DynamicPluginTensorDesc, max);
  MEMBER(DynamicPluginTensorDesc, opt);
  MEMBER(DimsExprs, d);
  std::printf("IDimensionExpr %zu\nIExprBuilder %zu\n", sizeof(IDimensionExpr), sizeof(IExprBuilder));
  NUMBER(DataType::kFLOAT);
  NUMBER(DataType::kHALF);
  NUMBER(DataType::kINT8);
  NUMBER(DataType::kINT32);
  NUMBER(DataType::kBF16);
  NUMBER(DataType::kINT64);
  NUMBER(TensorFormat::kLINEAR);
  NUMBER(TensorFormat::kCHW2);
  NUMBER(TensorFormat::kHWC8);
  NUMBER(DimensionOperation::kPROD);
  NUMBER(PluginFieldType::kFLOAT32);
  NUMBER(PluginFieldType::kFLOAT64);
  NUMBER(PluginFieldType::kINT32);
  NUMBER(PluginFieldType::kCHAR);
  NUMBER(PluginFieldType::kINT64);
  NUMBER(TensorRTPhase::kRUNTIME);
  NUMBER(PluginCapabilityType::kBUILD);
  NUMBER(PluginCapabilityType::kRUNTIME);
  NUMBER(ILogger::Severity::kERROR);
}
