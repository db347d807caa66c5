#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

dim3 threadIdx, blockIdx;

namespace {

constexpr int kWarp = 32, kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 * 1024, kMaxShared = 99 * 1024;  // the least of the three architectures
constexpr size_t kGuard = 256;
constexpr unsigned char kGuardByte = 0xa5;

// What lanes of a warp wait for together.
enum class Exchange { none, shuffle_xor, shuffle_up, multiply_add };

struct Operands {
  Exchange kind = Exchange::none;
  int argument = 0;
  double value = 0;
  float a[4], b[2], sum[4];
};

enum class State { ready, at_barrier, in_warp, done };

struct Fiber {
  ucontext_t first;  // enters the fiber once; from then on it is left and entered by the jumps
  jmp_buf here;
  std::unique_ptr<unsigned char[]> stack;
  bool entered = false;
  State state = State::done;
  Operands operands;
};

jmp_buf scheduler;
std::deque<Fiber> fibers;  // which never move
int n_threads = 0, running = 0, n_waiting = 0;
int n_lanes[kMaxThreads / kWarp];
const std::function<void()>* work = nullptr;
std::vector<unsigned char> shared;
uint64_t order_seed = 0, n_waits = 0;

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "emulated GPU: %s (thread %d of block %u, %u, %u)\n", message, running, blockIdx.x, blockIdx.y,
               blockIdx.z);
  std::abort();
}

// Give the core back to the scheduler until the fiber is ready again.
void leave() {
  ++n_waits;
  if (_setjmp(fibers[running].here) == 0) _longjmp(scheduler, 1);
}

void fiber_main() {
  for (;;) {
    (*work)();
    fibers[running].state = State::done;
    if (n_waiting > 0) fail("a thread returned while others wait at the barrier");
    leave();
  }
}

void resume(int thread) {
  running = thread;
  threadIdx.x = static_cast<unsigned>(thread);
  if (_setjmp(scheduler) != 0) return;
  if (fibers[running].entered) _longjmp(fibers[running].here, 1);
  fibers[running].entered = true;
  setcontext(&fibers[running].first);
}

void make_fibers(int count) {
  while (static_cast<int>(fibers.size()) < count) {
    Fiber& fiber = fibers.emplace_back();
    fiber.stack = std::make_unique<unsigned char[]>(kStackBytes);
    getcontext(&fiber.first);
    fiber.first.uc_stack.ss_sp = fiber.stack.get();
    fiber.first.uc_stack.ss_size = kStackBytes;
    fiber.first.uc_link = nullptr;
    makecontext(&fiber.first, fiber_main, 0);
  }
}

// sum += a · b, where the lanes of the warp that begins at `base` have the layout of mma.m16n8k8.
void multiply(int base) {
  float a[16][8], b[8][8], sum[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Operands& given = fibers[base + lane].operands;
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      a[g + 8 * (i % 2)][t + 4 * (i / 2)] = given.a[i];
      sum[g + 8 * (i / 2)][2 * t + i % 2] = given.sum[i];
    }
    for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = given.b[i];
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 8; ++k)
      for (int column = 0; column < 8; ++column) sum[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < kWarp; ++lane) {
    Operands& given = fibers[base + lane].operands;
    for (int i = 0; i < 4; ++i) given.sum[i] = sum[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  }
}

void exchange(int base) {
  double values[kWarp];
  const Operands& first = fibers[base].operands;
  for (int lane = 0; lane < kWarp; ++lane) {
    const Operands& given = fibers[base + lane].operands;
    if (given.kind != first.kind || given.argument != first.argument) fail("lanes of a warp wait for different things");
    values[lane] = given.value;
  }
  if (first.kind == Exchange::multiply_add) {
    multiply(base);
    return;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const int distance = first.argument;
    const int from = first.kind == Exchange::shuffle_xor ? lane ^ distance : lane >= distance ? lane - distance : lane;
    fibers[base + lane].operands.value = values[from];
  }
}

Operands& meet_warp(Exchange kind, int argument) {
  Fiber& fiber = fibers[running];
  const int warp = running / kWarp;
  fiber.operands.kind = kind;
  fiber.operands.argument = argument;
  if (++n_lanes[warp] == kWarp) {
    n_lanes[warp] = 0;
    exchange(warp * kWarp);
    for (int lane = 0; lane < kWarp; ++lane) fibers[warp * kWarp + lane].state = State::ready;
  } else {
    fiber.state = State::in_warp;
    leave();
  }
  return fibers[running].operands;
}

void run_block(size_t shared_bytes) {
  const float poison = std::numeric_limits<float>::quiet_NaN();
  shared.assign(shared_bytes + kGuard, kGuardByte);
  for (size_t i = 0; i + sizeof poison <= shared_bytes; i += sizeof poison)
    std::memcpy(&shared[i], &poison, sizeof poison);
  std::fill_n(n_lanes, kMaxThreads / kWarp, 0);
  n_waiting = 0;
  std::vector<int> order(static_cast<size_t>(n_threads));
  std::iota(order.begin(), order.end(), 0);
  if (order_seed == 1) std::reverse(order.begin(), order.end());
  std::minstd_rand random(static_cast<unsigned>(order_seed));
  for (int thread = 0; thread < n_threads; ++thread) fibers[thread].state = State::ready;
  for (;;) {
    if (order_seed > 1) std::shuffle(order.begin(), order.end(), random);
    bool any = false, all_done = true;
    for (const int thread : order) {
      if (fibers[thread].state == State::ready) {
        resume(thread);
        any = true;
      }
      all_done = all_done && fibers[thread].state == State::done;
    }
    if (all_done) break;
    if (!any) fail("threads wait for others that never come");
  }
  for (size_t i = 0; i < kGuard; ++i)
    if (shared[shared_bytes + i] != kGuardByte) fail("a write behind the memory of the block");
}

}  // namespace

extern "C" void emulator_set_order(uint64_t seed) { order_seed = seed; }
extern "C" uint64_t emulator_waits() { return n_waits; }

namespace zreward::device {

cudaError_t run_grid(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& body) {
  if (threads % kWarp != 0 || threads > kMaxThreads || shared_bytes > kMaxShared || grid.x * grid.y * grid.z == 0)
    return cudaErrorInvalidValue;
  make_fibers(threads);
  n_threads = threads;
  work = &body;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(shared_bytes);
  return cudaSuccess;
}

unsigned char* shared_memory() { return shared.data(); }

void barrier() {
  fibers[running].state = State::at_barrier;
  if (++n_waiting == n_threads) {
    n_waiting = 0;
    for (int thread = 0; thread < n_threads; ++thread) fibers[thread].state = State::ready;
    return;
  }
  leave();
}

float shuffle_xor(float value, int mask) {
  fibers[running].operands.value = value;
  return static_cast<float>(meet_warp(Exchange::shuffle_xor, mask).value);
}

double shuffle_up(double value, int distance) {
  fibers[running].operands.value = value;
  return meet_warp(Exchange::shuffle_up, distance).value;
}

void multiply_add(float (&sum)[4], const float (&a)[4], const float (&b)[2]) {
  Operands& mine = fibers[running].operands;
  // The instruction reads no more than the bits of a TensorFloat-32 number.
  for (int i = 0; i < 4; ++i) mine.a[i] = float_from_bits(bits_of(a[i]) & 0xffffe000u);
  for (int i = 0; i < 2; ++i) mine.b[i] = float_from_bits(bits_of(b[i]) & 0xffffe000u);
  std::copy_n(sum, 4, mine.sum);
  std::copy_n(meet_warp(Exchange::multiply_add, 0).sum, 4, sum);
}

float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float float_from_half(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, fraction = bits & 0x3ffu;
  if (exponent == 31) return float_from_bits(sign | 0x7f800000u | fraction << 13);
  if (exponent > 0) return float_from_bits(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = std::ldexp(static_cast<float>(fraction), -24);
  return sign ? -magnitude : magnitude;
}

uint16_t half_from_float(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;  // from the middle between the largest number and the next
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  exponent = std::max(exponent, -13);  // a fraction of ten bits, or steps of 2^-24
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));
  if (steps < 1024) return static_cast<uint16_t>(sign | steps);
  return static_cast<uint16_t>(sign | ((static_cast<uint32_t>(exponent + 13) << 10) + steps));
}

uint16_t bfloat16_from_float(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint32_t bits = bits_of(value);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

float round_to_tf32(float value) {
  if (!std::isfinite(value)) return value;
  return float_from_bits((bits_of(value) + 0x1000u) & 0xffffe000u);  // halves away from zero
}

}  // namespace zreward::device
