// What a core reaches at most in the instructions that products consist of: the bound that measurements stand beside.
//
// Each runs on registers alone, in 16 independent sums, which is more than its latency hides. There are no threads
// here: whoever wants the rate of several cores calls this from as many threads at once.
#include <chrono>
#include <cstddef>

#include "avx512.h"
#include "op.h"

namespace zreward {

namespace {

constexpr size_t kSums = 16, kSteps = 4096;

bool has_features() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni"); }

ZREWARD_AVX512_BF16_BEGIN

// The operands of the sums are the same: what is multiplied does not change how long it takes.
void integer_steps(__m512i* sums) {
  __m512i sum[kSums];
  const __m512i ones = _mm512_set1_epi8(1);
#pragma GCC unroll 16
  for (size_t i = 0; i < kSums; ++i) sum[i] = sums[i];
  for (size_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 16
    for (size_t i = 0; i < kSums; ++i) asm volatile("vpdpbusd %1, %1, %0" : "+v"(sum[i]) : "v"(ones));
  }
#pragma GCC unroll 16
  for (size_t i = 0; i < kSums; ++i) sums[i] = sum[i];
}

void float_steps(__m512* sums) {
  __m512 sum[kSums];
  const __m512 half = _mm512_set1_ps(0.5f);
#pragma GCC unroll 16
  for (size_t i = 0; i < kSums; ++i) sum[i] = sums[i];
  for (size_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 16
    for (size_t i = 0; i < kSums; ++i) asm volatile("vfmadd231ps %1, %1, %0" : "+v"(sum[i]) : "v"(half));
  }
#pragma GCC unroll 16
  for (size_t i = 0; i < kSums; ++i) sums[i] = sum[i];
}

void bfloat16_steps(__m512* sums) {
  __m512 sum[kSums];
  const __m512i halves = _mm512_set1_epi32(0x3f003f00);
#pragma GCC unroll 16
  for (size_t i = 0; i < kSums; ++i) sum[i] = sums[i];
  for (size_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 16
    for (size_t i = 0; i < kSums; ++i) asm volatile("vdpbf16ps %1, %1, %0" : "+v"(sum[i]) : "v"(halves));
  }
#pragma GCC unroll 16
  for (size_t i = 0; i < kSums; ++i) sums[i] = sum[i];
}

template <typename Lanes>
double rate_of(void (*steps)(Lanes*), size_t products, double seconds) {
  using Clock = std::chrono::steady_clock;
  alignas(64) Lanes sums[kSums] = {};
  steps(sums);  // wakes the wide units
  size_t rounds = 0;
  const auto start = Clock::now();
  double elapsed;
  do {
    steps(sums);
    ++rounds;
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  } while (elapsed < seconds);
  return static_cast<double>(rounds) * kSteps * kSums * products / elapsed;
}

double integer_rate(double seconds) { return rate_of<__m512i>(integer_steps, 64, seconds); }
double float_rate(double seconds) { return rate_of<__m512>(float_steps, 16, seconds); }
double bfloat16_rate(double seconds) { return rate_of<__m512>(bfloat16_steps, 32, seconds); }

ZREWARD_AVX512_BF16_END

}  // namespace

}  // namespace zreward

// Multiply-adds a second of the calling thread, measured for at least so many seconds: of 8-bit whole numbers, of
// float32, and of bfloat16. 0 on a processor without the instruction.
extern "C" __attribute__((visibility("default"))) double zreward_peak_integer(double seconds) {
  return zreward::has_features() ? zreward::integer_rate(seconds) : 0;
}

extern "C" __attribute__((visibility("default"))) double zreward_peak_float(double seconds) {
  return zreward::has_features() ? zreward::float_rate(seconds) : 0;
}

extern "C" __attribute__((visibility("default"))) double zreward_peak_bfloat16(double seconds) {
  return zreward::has_features() && zreward::has_bfloat16() ? zreward::bfloat16_rate(seconds) : 0;
}
