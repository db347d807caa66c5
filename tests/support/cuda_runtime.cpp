// A CUDA runtime whose GPU is the host's memory: allocations and copies are done, kernels are launched and do nothing.
//
// Sessions of onnxruntime-gpu can be made and run on it: which node runs where, what kernels refuse, and where values
// lie is then what it would be on a GPU. What is computed is not. ZREWARD_STUB_DRIVER is the version of CUDA that the
// driver supports, as 124 for 12.4, and ZREWARD_STUB_CAPABILITY the compute capability of the GPU, as 90 for 9.0.

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

char handle[64];  // stands for streams, events and pools

int number(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atoi(text) : otherwise;
}

int capability() { return number("ZREWARD_STUB_CAPABILITY", 90); }

int driver() {
  int version = number("ZREWARD_STUB_DRIVER", 130);
  return version / 10 * 1000 + version % 10 * 10;
}

cudaError_t allocate(void** pointer, size_t bytes) {
  if (posix_memalign(pointer, 256, bytes ? bytes : 256)) return cudaErrorMemoryAllocation;
  std::memset(*pointer, 0, bytes);
  return cudaSuccess;
}

cudaError_t release(void* pointer) {
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t copy(void* to, const void* from, size_t bytes) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}

template <typename T>
cudaError_t made(T* value) {
  *value = reinterpret_cast<T>(handle);
  return cudaSuccess;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = driver(), cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int) {
  std::memset(found, 0, sizeof *found);
  std::strcpy(found->name, "host memory");
  found->major = capability() / 10;
  found->minor = capability() % 10;
  found->totalGlobalMem = size_t{80} << 30;
  found->warpSize = 32;
  found->multiProcessorCount = 132;
  found->maxThreadsPerBlock = 1024;
  found->maxThreadsPerMultiProcessor = 2048;
  found->sharedMemPerBlock = 48 << 10;
  found->sharedMemPerBlockOptin = 227 << 10;
  found->sharedMemPerMultiprocessor = 228 << 10;
  found->regsPerBlock = 65536;
  found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
  found->maxThreadsDim[2] = 64;
  found->maxGridSize[0] = 2147483647;
  found->maxGridSize[1] = found->maxGridSize[2] = 65535;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  cudaDeviceProp found;
  cudaGetDeviceProperties(&found, 0);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = found.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = found.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = found.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = found.maxThreadsPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = static_cast<int>(found.sharedMemPerBlock); break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(found.sharedMemPerBlockOptin); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(found.sharedMemPerMultiprocessor);
      break;
    case cudaDevAttrWarpSize: *value = found.warpSize; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** pointer, size_t bytes) { return allocate(pointer, bytes); }
cudaError_t cudaMallocHost(void** pointer, size_t bytes) { return allocate(pointer, bytes); }
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) { return allocate(pointer, bytes); }
cudaError_t cudaMallocFromPoolAsync(void** pointer, size_t bytes, cudaMemPool_t, cudaStream_t) {
  return allocate(pointer, bytes);
}
cudaError_t cudaFree(void* pointer) { return release(pointer); }
cudaError_t cudaFreeHost(void* pointer) { return release(pointer); }
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return release(pointer); }
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) { return *free = *total = size_t{80} << 30, cudaSuccess; }

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) { return copy(to, from, bytes); }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return copy(to, from, bytes);
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t) {
  for (size_t row = 0; row < height; ++row)
    copy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) { return std::memset(to, value, bytes), cudaSuccess; }
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) { return cudaMemset(to, value, bytes); }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* pointer) {
  std::memset(found, 0, sizeof *found);
  found->type = cudaMemoryTypeDevice;
  found->devicePointer = const_cast<void*>(pointer);
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return made(stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return made(stream); }
cudaError_t cudaEventCreate(cudaEvent_t* event) { return made(event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return made(event); }
cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) { return made(pool); }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  std::memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  return *blocks = 1, cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *found = nullptr;
  if (result) *result = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t) { return "stub"; }
const char* cudaGetErrorString(cudaError_t) { return "stub"; }

void** __cudaRegisterFatBinary(void*) {
  static void* binary;
  return &binary;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = *block = dim3(1, 1, 1);
  *shared = 0;
  *static_cast<void**>(stream) = nullptr;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  return *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function)), cudaSuccess;
}

// The functions of the driver that zreward calls.
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { return cudaDriverGetVersion(version); }
int cuDeviceGet(int* found, int device) { return *found = device, device ? 101 : 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
  return *value = attribute == 75 ? capability() / 10 : attribute == 76 ? capability() % 10 : 0, 0;
}
int cuDeviceGetName(char* text, int length, int) { return std::snprintf(text, length, "host memory"), 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = size_t{80} << 30, 0; }
int cuMemGetInfo_v2(size_t* free, size_t* total) { return cudaMemGetInfo(free, total); }
int cuDevicePrimaryCtxRetain(void** context, int) { return made(context); }
int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
int cuCtxPushCurrent_v2(void*) { return 0; }
int cuCtxPopCurrent_v2(void** context) { return made(context); }
int cuCtxSynchronize() { return 0; }
int cuMemAlloc_v2(unsigned long long* address, size_t bytes) {
  void* found;
  const auto status = allocate(&found, bytes);
  *address = reinterpret_cast<unsigned long long>(found);
  return status;
}
int cuMemFree_v2(unsigned long long address) { return release(reinterpret_cast<void*>(address)); }
int cuMemcpyDtoDAsync_v2(unsigned long long to, unsigned long long from, size_t bytes, void*) {
  return copy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
}
int cuGetErrorString(int, const char** text) { return *text = "invalid device ordinal", 0; }
}
