// What the kernels use of a GPU, by names of our own, so that the same sources also run on an emulated one.
//
// With ZREWARD_EMULATE the header emulator.h of tests/plugins gives these names and those of the CUDA runtime; blocks
// then run one after the other on a CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef ZREWARD_EMULATE
#include "emulator.h"
#else
#ifndef __CUDACC_RTC__  // NVRTC brings CUDA's own names along
#include <cuda_runtime.h>
#endif

namespace zreward::device {

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char zreward_shared_memory[];
  return zreward_shared_memory;
}

__device__ inline void barrier() { __syncthreads(); }

// The value of the lane whose number differs in the bits of `mask`.
__device__ inline float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// The value of the lane `distance` below, or the lane's own where there is none.
__device__ inline double shuffle_up(double value, int distance) { return __shfl_up_sync(0xffffffffu, value, distance); }

__device__ inline float float_from_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t bits_of(float value) { return __float_as_uint(value); }

__device__ inline float float_from_half(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
__device__ inline uint16_t half_from_float(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
__device__ inline uint16_t bfloat16_from_float(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// The nearest TensorFloat-32 number: 8 bits of exponent, 10 of fraction.
__device__ inline float round_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return float_from_bits(bits);
}

// sum += a · b by a warp, for TensorFloat-32 a [16, 8], b [8, 8] and float32 sum [16, 8]. With g = lane / 4 and
// t = lane % 4 a lane holds a at (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4), b at (t, g), (t + 4, g), and sum at
// (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1): mma.m16n8k8 in the PTX ISA.
__device__ inline void multiply_add(float (&sum)[4], const float (&a)[4], const float (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(bits_of(a[0])), "r"(bits_of(a[1])), "r"(bits_of(a[2])), "r"(bits_of(a[3])), "r"(bits_of(b[0])),
        "r"(bits_of(b[1])));
}

// Reads memory that no kernel writes while this one runs.
__device__ inline uint4 load_constant(const uint4* from) { return __ldg(from); }
__device__ inline uint2 load_constant(const uint2* from) { return __ldg(from); }
__device__ inline uint32_t load_constant(const uint32_t* from) { return __ldg(from); }
__device__ inline uint16_t load_constant(const uint16_t* from) { return __ldg(from); }
__device__ inline float load_constant(const float* from) { return __ldg(from); }

#ifndef __CUDACC_RTC__
// Start `kernel` on a grid of blocks.
template <typename Job>
cudaError_t launch(void (*kernel)(Job), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream, Job job) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking) {
    const cudaError_t status =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return status;
  }
  void* arguments[] = {&job};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(static_cast<unsigned>(threads)), arguments,
                          shared_bytes, stream);
}
#endif

}  // namespace zreward::device
#endif

namespace zreward {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
constexpr bool is_float = std::is_same_v<T, float>;

// One of the two elements of 16 bits in a word.
template <typename T>
__device__ inline float element_of(uint32_t word, int index) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return device::float_from_bits(index == 0 ? word << 16 : word & 0xffff0000u);
  else
    return device::float_from_half(static_cast<uint16_t>(index == 0 ? word : word >> 16));
}

template <typename T>
__device__ inline uint32_t bits_from(float value) {
  if constexpr (is_float<T>)
    return device::bits_of(value);
  else if constexpr (std::is_same_v<T, Half>)
    return device::half_from_float(value);
  else
    return device::bfloat16_from_float(value);
}

// 16 bytes of elements.
template <typename T>
struct Vector {
  static constexpr int size = 16 / sizeof(T);
  uint32_t words[4] = {0, 0, 0, 0};

  __device__ float operator[](int index) const {
    if constexpr (is_float<T>)
      return device::float_from_bits(words[index]);
    else
      return element_of<T>(words[index / 2], index % 2);
  }
};

template <typename T>
__device__ inline Vector<T> load_vector(const T* from) {
  const uint4 loaded = device::load_constant(reinterpret_cast<const uint4*>(from));
  Vector<T> vector;
  vector.words[0] = loaded.x;
  vector.words[1] = loaded.y;
  vector.words[2] = loaded.z;
  vector.words[3] = loaded.w;
  return vector;
}

// Two elements that lie side by side.
template <typename T>
struct Pair {
  uint32_t words[is_float<T> ? 2 : 1] = {};

  __device__ float operator[](int index) const {
    if constexpr (is_float<T>)
      return device::float_from_bits(words[index]);
    else
      return element_of<T>(words[0], index);
  }
};

template <typename T>
__device__ inline Pair<T> load_pair(const T* from) {
  Pair<T> pair;
  if constexpr (is_float<T>) {
    const uint2 loaded = device::load_constant(reinterpret_cast<const uint2*>(from));
    pair.words[0] = loaded.x;
    pair.words[1] = loaded.y;
  } else {
    pair.words[0] = device::load_constant(reinterpret_cast<const uint32_t*>(from));
  }
  return pair;
}

template <typename T>
__device__ inline void store_pair(T* to, float first, float second) {
  if constexpr (is_float<T>)
    *reinterpret_cast<float2*>(to) = {first, second};
  else
    *reinterpret_cast<uint32_t*>(to) = bits_from<T>(first) | bits_from<T>(second) << 16;
}

// Element `index` of an array whose type is known when the kernel runs: a zreward_type.
__device__ inline float load_any(const void* from, int64_t index, int type) {
  if (type == 0) return device::load_constant(static_cast<const float*>(from) + index);
  const uint16_t bits = device::load_constant(static_cast<const uint16_t*>(from) + index);
  return type == 1 ? device::float_from_half(bits) : device::float_from_bits(static_cast<uint32_t>(bits) << 16);
}

__device__ inline void store_any(void* to, int64_t index, int type, float value) {
  if (type == 0)
    static_cast<float*>(to)[index] = value;
  else
    static_cast<uint16_t*>(to)[index] = type == 1 ? device::half_from_float(value) : device::bfloat16_from_float(value);
}

__device__ inline float silu(float x) { return x / (1.0f + expf(-x)); }

// The sum over the lanes of a warp, in all of them.
__device__ inline float warp_sum(float value) {
  for (int mask = 16; mask > 0; mask >>= 1) value += device::shuffle_xor(value, mask);
  return value;
}

}  // namespace zreward
