// The score head as a kernel: a block answers one row of the batch.
#include "checks.h"
#include "rubric_expectation.h"

namespace zreward {

namespace {

constexpr int32_t kMaxBins = 1024;

__global__ void __launch_bounds__(head::kThreads) rubric_expectation(const zreward_rubric_expectation_job job) {
  head::answer_row(job, static_cast<int>(blockIdx.x), reinterpret_cast<float*>(device::shared_memory()));
}

int check(const zreward_rubric_expectation_job& job) {
  constexpr int bad = ZREWARD_BAD_ARGUMENT;
  if (job.batch < 0) return refuse(bad, "RubricExpectation: the batch is %d; it must be at least 0", job.batch);
  if (job.width < 1) return refuse(bad, "RubricExpectation: the hidden width is %d; it must be at least 1", job.width);
  if (job.bins < 1 || job.bins > kMaxBins)
    return refuse(bad, "RubricExpectation: there are %d bins; 1 to %d are taken", job.bins, kMaxBins);
  if (!is_type(job.hidden_type) || !is_type(job.norm_type) || !is_type(job.rows_type))
    return refuse(bad, "RubricExpectation: types must be float32, float16 or bfloat16");
  if (!(job.epsilon >= 0.0f))
    return refuse(bad, "RubricExpectation: epsilon is %g; it must be at least 0", job.epsilon);
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
  return status_of(
      device::launch(rubric_expectation, dim3(static_cast<unsigned>(job->batch)), head::kThreads,
                     static_cast<size_t>(job->bins) * sizeof(float), static_cast<cudaStream_t>(stream), *job),
      "RubricExpectation");
}
