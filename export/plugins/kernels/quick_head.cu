// The score head as TensorRT launches it for a Python plugin: inputs, then integers, then outputs.
//
// zreward.export.plugins.quick_head compiles it with NVRTC, with the type of the hidden states and the norm's epsilon
// as macros: TensorRT hands over nothing but tensors and integers. A block answers a row; its dynamic memory holds a
// float for each bin.
#include "rubric_expectation.h"

extern "C" __global__ void __launch_bounds__(zreward::head::kThreads)
    zreward_quick_head(const void* hidden, const float* norm_weight, const float* score_rows, const float* temperature,
                       const float* bins, int32_t width, int32_t n_bins, float* probs, float* mean, float* variance) {
  zreward_rubric_expectation_job job{};
  job.width = width;
  job.bins = n_bins;
  job.hidden_type = ZREWARD_HIDDEN_TYPE;
  job.norm_type = job.rows_type = ZREWARD_FLOAT32;
  job.epsilon = ZREWARD_EPSILON;
  job.hidden = hidden;
  job.norm_weight = norm_weight;
  job.rows = score_rows;
  job.temperature = temperature;
  job.bin_values = bins;
  job.probs = probs;
  job.mean = mean;
  job.variance = variance;
  zreward::head::answer_row(job, static_cast<int>(blockIdx.x),
                            reinterpret_cast<float*>(zreward::device::shared_memory()));
}
