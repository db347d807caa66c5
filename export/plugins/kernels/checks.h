// How a call is refused: a status and a message.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdarg>

#include "zreward_kernels.h"

namespace zreward {

// Remember the message of this thread and return `status`.
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
int refuse(int status, const char* format, ...);

// A launch's result as a status.
int status_of(cudaError_t error, const char* kernel);

inline bool is_type(int32_t type) { return type >= ZREWARD_FLOAT32 && type <= ZREWARD_BFLOAT16; }

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// The first name whose pointer is null or no multiple of 16, or null.
struct Named {
  const char* name;
  const void* pointer;
};
template <size_t count>
const char* misplaced(const Named (&pointers)[count]) {
  for (const Named& named : pointers)
    if (named.pointer == nullptr || !is_aligned(named.pointer)) return named.name;
  return nullptr;
}

constexpr int32_t kMaxBlocks = 65535;  // along the second and third axes of a grid

}  // namespace zreward
