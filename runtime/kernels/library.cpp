// What ONNX Runtime calls when a session registers the library.
//
// On a processor without AVX-512 VNNI nothing is registered, and the graphs' own functions of the same names run.
#include <mutex>

#include "kernels.h"
#include "op.h"

namespace {

bool has_features() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

}  // namespace

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                                 const ort::ApiBase* base) {
  if (!has_features()) return nullptr;
  const ort::FunctionTable table = base->get_api(ort::kApiVersion);
  if (table == nullptr) return nullptr;  // an older runtime
  zreward::set_api(table);
  // One domain for all sessions; they must not outlive it, so it stays until the process ends.
  static std::mutex mutex;
  static ort::CustomOpDomain* domain = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (domain == nullptr) {
    ort::CustomOpDomain* fresh = nullptr;
    if (ort::Status* status = zreward::api().create_domain("zreward", &fresh)) return status;
    for (const auto& list : {zreward::attention_operators(), zreward::delta_net_operators(),
                             zreward::quantized_linear_operators(), zreward::skip_norm_operators()})
      for (const ort::CustomOp* op : list)
        if (ort::Status* status = zreward::api().domain_add(fresh, op)) return status;
    domain = fresh;
  }
  return zreward::api().add_domain(options, domain);
}
