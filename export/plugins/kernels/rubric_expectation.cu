// The score head: final RMS norm, the rows of the codes, temperature softmax, expectation and variance.
//
// A block answers one row of the batch. Its warps take the bins in turn; each sums x · norm_weight · row and, since x
// passes by anyway, x², so that nothing has to wait for the norm. Everything is in float32.
#include "checks.h"
#include "device.h"

namespace zreward {

namespace {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int32_t kMaxBins = 1024;

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
      values[i] = type == ZREWARD_FLOAT16 ? element_of<Half>(words[i / 2], i % 2)
                                          : element_of<BFloat16>(words[i / 2], i % 2);
  }
}

__global__ void __launch_bounds__(kThreads) rubric_expectation(const zreward_rubric_expectation_job job) {
  float* logits = reinterpret_cast<float*>(device::shared_memory());  // [bins], then their exponentials
  const int row = static_cast<int>(blockIdx.x);
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

int check(const zreward_rubric_expectation_job& job) {
  constexpr int bad = ZREWARD_BAD_ARGUMENT;
  if (job.batch < 0) return refuse(bad, "RubricExpectation: the batch is %d; it must be at least 0", job.batch);
  if (job.width < 1) return refuse(bad, "RubricExpectation: the hidden width is %d; it must be at least 1", job.width);
  if (job.bins < 1 || job.bins > kMaxBins)
    return refuse(bad, "RubricExpectation: there are %d bins; 1 to %d are taken", job.bins, kMaxBins);
  if (!is_type(job.hidden_type) || !is_type(job.norm_type) || !is_type(job.rows_type))
    return refuse(bad, "RubricExpectation: types must be float32, float16 or bfloat16");
  if (!(job.epsilon >= 0.0f)) return refuse(bad, "RubricExpectation: epsilon is %g; it must be at least 0", job.epsilon);
  if (job.batch == 0) return ZREWARD_OK;
  const Named vectors[] = {{"hidden", job.hidden}, {"norm_weight", job.norm_weight}, {"rows", job.rows}};
  if (const char* name = misplaced(vectors))
    return refuse(bad, "RubricExpectation: %s is null or does not begin at a multiple of 16 bytes", name);
  if (!job.temperature || !job.bin_values || !job.probs || !job.mean || !job.variance)
    return refuse(bad, "RubricExpectation: temperature, bin_values or an output is null");
  return ZREWARD_OK;
}

}  // namespace

}  // namespace zreward

extern "C" int zreward_rubric_expectation(const struct zreward_rubric_expectation_job* job, void* stream) {
  using namespace zreward;
  const int status = check(*job);
  if (status != ZREWARD_OK || job->batch == 0) return status;
  return status_of(device::launch(rubric_expectation, dim3(static_cast<unsigned>(job->batch)), kThreads,
                                  static_cast<size_t>(job->bins) * sizeof(float), static_cast<cudaStream_t>(stream),
                                  *job),
                   "RubricExpectation");
}
