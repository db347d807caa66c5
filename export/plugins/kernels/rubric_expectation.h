// The score head for one row: final RMS norm, the rows of the codes, temperature softmax, expectation and variance.
//
// The warps of a block take the bins in turn; each sums x · norm_weight · row and, since x passes by anyway, x², so
// that nothing has to wait for the norm. Everything is in float32. Two kernels are made of it: that of the library, and
// one that TensorRT launches by itself (quick_head.cu).
#pragma once

#include "device.h"
#include "zreward_kernels.h"

namespace zreward::head {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;

__device__ inline void load_four(const void* from, int64_t index, int type, float (&values)[4]) {
  if (type == ZREWARD_FLOAT32) {
    const uint4 loaded = device::load_constant(reinterpret_cast<const uint4*>(static_cast<const float*>(from) + index));
    const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
    for (int i = 0; i < 4; ++i) values[i] = device::float_from_bits(words[i]);
  } else {
    const uint2 loaded =
        device::load_constant(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(from) + index));
    const uint32_t words[2] = {loaded.x, loaded.y};
    for (int i = 0; i < 4; ++i)
      values[i] =
          type == ZREWARD_FLOAT16 ? element_of<Half>(words[i / 2], i % 2) : element_of<BFloat16>(words[i / 2], i % 2);
  }
}

// Answer one row, by all threads of a block. `logits` is memory of the block for one number a bin.
__device__ inline void answer_row(const zreward_rubric_expectation_job& job, int row, float* logits) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t hidden = static_cast<int64_t>(row) * job.width;
  for (int bin = warp; bin < job.bins; bin += kWarps) {
    const int64_t weights = static_cast<int64_t>(bin) * job.width;
    float square = 0.0f, product = 0.0f;
    if (job.width % 4 == 0) {
#pragma unroll 4
      for (int i = 4 * lane; i < job.width; i += 128) {
        float x[4], norm[4], weight[4];
        load_four(job.hidden, hidden + i, job.hidden_type, x);
        load_four(job.norm_weight, i, job.norm_type, norm);
        load_four(job.rows, weights + i, job.rows_type, weight);
        for (int k = 0; k < 4; ++k) {
          square += x[k] * x[k];
          product += x[k] * norm[k] * weight[k];
        }
      }
    } else {
      for (int i = lane; i < job.width; i += 32) {
        const float x = load_any(job.hidden, hidden + i, job.hidden_type);
        square += x * x;
        product += x * load_any(job.norm_weight, i, job.norm_type) * load_any(job.rows, weights + i, job.rows_type);
      }
    }
    square = warp_sum(square);
    product = warp_sum(product);
    const float root = sqrtf(square / static_cast<float>(job.width) + job.epsilon);
    if (lane == 0) logits[bin] = product / root / job.temperature[row];
  }
  device::barrier();
  if (warp != 0) return;

  float highest = logits[0];
  for (int bin = 1; bin < job.bins; ++bin) highest = fmaxf(highest, logits[bin]);
  float total = 0.0f, weighted = 0.0f;
  for (int bin = lane; bin < job.bins; bin += 32) {
    const float part = expf(logits[bin] - highest);
    total += part;
    weighted += part * job.bin_values[bin];
  }
  total = warp_sum(total);
  const float mean = warp_sum(weighted) / total;
  float variance = 0.0f;
  for (int bin = lane; bin < job.bins; bin += 32) {
    const float probability = expf(logits[bin] - highest) / total;
    const float deviation = job.bin_values[bin] - mean;
    job.probs[static_cast<int64_t>(row) * job.bins + bin] = probability;
    variance += deviation * deviation * probability;
  }
  variance = warp_sum(variance);
  if (lane == 0) {
    job.mean[row] = mean;
    job.variance[row] = variance;
  }
}

}  // namespace zreward::head
