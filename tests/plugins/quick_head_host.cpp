// The kernel of the Python plugin on the emulated GPU, with arguments in the order in which TensorRT launches it.
#include "emulator.h"

namespace {
int32_t hidden_type;
float norm_epsilon;
}  // namespace

// Which NVRTC gets as numbers.
#define ZREWARD_HIDDEN_TYPE hidden_type
#define ZREWARD_EPSILON norm_epsilon
#include "quick_head.cu"

// 0 where the grid ran. `rows` and 32 floats of block memory are what quick_head.py asks for.
extern "C" int run_quick_head(int32_t rows, int32_t type, float epsilon, const void* hidden, const float* norm_weight,
                              const float* score_rows, const float* temperature, const float* bins, int32_t width,
                              int32_t n_bins, float* probs, float* mean, float* variance) {
  hidden_type = type;
  norm_epsilon = epsilon;
  return zreward::device::run_grid(dim3(static_cast<unsigned>(rows)), 512, 4 * 32, [&] {
    zreward_quick_head(hidden, norm_weight, score_rows, temperature, bins, width, n_bins, probs, mean, variance);
  });
}
