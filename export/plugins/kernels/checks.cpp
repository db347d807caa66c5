#include "checks.h"

#include <cstdio>

namespace zreward {

namespace {
thread_local char message[512] = "";
}

int refuse(int status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return status;
}

int status_of(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return ZREWARD_OK;
  return refuse(ZREWARD_CUDA_ERROR, "%s: CUDA error %d, %s", kernel, static_cast<int>(error), cudaGetErrorString(error));
}

}  // namespace zreward

extern "C" const char* zreward_last_error(void) { return zreward::message; }
extern "C" int zreward_kernels_version(void) { return ZREWARD_KERNELS_VERSION; }
