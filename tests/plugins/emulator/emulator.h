// A GPU on one core of a CPU, as far as the kernels of export/plugins use one.
//
// It takes the place of the CUDA runtime where ZREWARD_EMULATE is defined. The threads of a block are fibers: each runs
// until it waits, at the block's barrier or for the other lanes of its warp, and the next one goes on. In which order
// they do is `emulator_set_order`'s: results that depend on it lack a barrier. Blocks run one after the other. What a
// GPU would do wrongly ends the process with a message: lanes of a warp that wait for different things, threads that
// return while others wait, memory of a block before it is written (it holds NaN), and writes behind its end.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline const char* cudaGetErrorString(cudaError_t) { return "a launch that the emulator refuses"; }

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx;

using std::min;

// 0: threads in order; 1: backwards; other numbers: shuffled anew after every wait.
extern "C" void emulator_set_order(uint64_t seed);

// How often threads waited so far: to see that something ran.
extern "C" uint64_t emulator_waits();

namespace zreward::device {

unsigned char* shared_memory();
void barrier();
float shuffle_xor(float value, int mask);
double shuffle_up(double value, int distance);

float float_from_bits(uint32_t bits);
uint32_t bits_of(float value);
float float_from_half(uint16_t bits);
uint16_t half_from_float(float value);
uint16_t bfloat16_from_float(float value);
float round_to_tf32(float value);
void multiply_add(float (&sum)[4], const float (&a)[4], const float (&b)[2]);

template <typename T>
T load_constant(const T* from) {
  return *from;
}

// Run `body` once for every thread of every block.
cudaError_t run_grid(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& body);

template <typename Job>
cudaError_t launch(void (*kernel)(Job), dim3 grid, int threads, size_t shared_bytes, cudaStream_t, Job job) {
  return run_grid(grid, threads, shared_bytes, [&] { kernel(job); });
}

}  // namespace zreward::device
