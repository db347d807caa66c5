// Causal depthwise convolution over the tokens, with the inputs before the first token as its state.
//
// A thread takes 16 bytes of channels through a run of tokens, and keeps the inputs that the taps reach in registers:
// every input is read once.
#include "checks.h"
#include "device.h"

namespace zreward {

namespace {

constexpr int kThreads = 128;
constexpr int kRun = 16;  // tokens of a thread

template <typename T, int taps>
__global__ void __launch_bounds__(kThreads) causal_conv1d(const zreward_causal_conv1d_job job) {
  constexpr int width = Vector<T>::size, past = taps - 1;
  const int channel = (static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x)) * width;
  if (channel >= job.channels) return;
  const int row = static_cast<int>(blockIdx.z), first = static_cast<int>(blockIdx.y) * kRun;
  const int last = min(first + kRun, job.tokens);
  const int64_t begin = static_cast<int64_t>(row) * job.tokens * job.channels + channel;
  const T* input = static_cast<const T*>(job.input) + begin;
  const int old_row = job.states == 0 ? 0 : row / (job.batch / job.states);
  const int64_t old_state = (static_cast<int64_t>(old_row) * job.channels + channel) * past;

  // Input `token` of the thread's channels, counted from the first new one.
  auto load = [&](int token, float (&values)[width]) {
    if (token >= 0) {
      const Vector<T> vector = load_vector(input + static_cast<int64_t>(token) * job.channels);
#pragma unroll
      for (int c = 0; c < width; ++c) values[c] = vector[c];
    } else {
#pragma unroll
      for (int c = 0; c < width; ++c)
        values[c] = job.states == 0 ? 0.0f : load_any(job.state, old_state + c * past + past + token, job.state_type);
    }
  };

  if (first == 0 && job.new_state != nullptr)
    for (int j = 0; j < past; ++j) {
      float values[width];
      load(job.tokens - past + j, values);
      const int64_t begin_state = (static_cast<int64_t>(row) * job.channels + channel) * past;
#pragma unroll
      for (int c = 0; c < width; ++c) store_any(job.new_state, begin_state + c * past + j, job.state_type, values[c]);
    }
  if (first >= last) return;

  float weights[taps][width], window[taps][width];
#pragma unroll
  for (int j = 0; j < taps; ++j)
#pragma unroll
    for (int c = 0; c < width; ++c)
      weights[j][c] = load_any(job.weight, static_cast<int64_t>(channel + c) * taps + j, job.weight_type);
#pragma unroll
  for (int j = 0; j < past; ++j) load(first - past + j, window[j]);
  T* output = static_cast<T*>(job.output) + begin;
  for (int token = first; token < last; ++token) {
    load(token, window[past]);
    T* to = output + static_cast<int64_t>(token) * job.channels;
#pragma unroll
    for (int c = 0; c < width; c += 2) {
      float sums[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        sums[k] = 0.0f;
#pragma unroll
        for (int j = 0; j < taps; ++j) sums[k] += window[j][c + k] * weights[j][c + k];
        if (job.silu != 0) sums[k] = silu(sums[k]);
      }
      store_pair(to + c, sums[0], sums[1]);
    }
#pragma unroll
    for (int j = 0; j < past; ++j)
#pragma unroll
      for (int c = 0; c < width; ++c) window[j][c] = window[j + 1][c];
  }
}

template <typename T>
auto kernel_of(int taps) {
  if (taps == 2) return causal_conv1d<T, 2>;
  return taps == 3 ? causal_conv1d<T, 3> : causal_conv1d<T, 4>;
}

int check(const zreward_causal_conv1d_job& job) {
  constexpr int bad = ZREWARD_BAD_ARGUMENT;
  if (job.batch < 0 || job.batch > kMaxBlocks)
    return refuse(bad, "CausalConv1d: the batch is %d; 0 to %d are taken", job.batch, kMaxBlocks);
  if (job.tokens < 0 || job.tokens > kMaxBlocks * kRun)
    return refuse(bad, "CausalConv1d: there are %d tokens; 0 to %d are taken", job.tokens, kMaxBlocks * kRun);
  if (job.channels < 8 || job.channels % 8 != 0)
    return refuse(bad, "CausalConv1d: there are %d channels; multiples of 8 are taken", job.channels);
  if (job.taps < 2 || job.taps > 4)
    return refuse(bad, "CausalConv1d: the kernel has width %d; 2 to 4 are taken", job.taps);
  if (job.states < 0 || (job.states > 0 && job.batch % job.states != 0))
    return refuse(bad, "CausalConv1d: %d states cannot serve a batch of %d rows", job.states, job.batch);
  if (!is_type(job.type) || !is_type(job.weight_type) || !is_type(job.state_type))
    return refuse(bad, "CausalConv1d: types must be float32, float16 or bfloat16");
  if (job.batch == 0) return ZREWARD_OK;
  if (job.states > 0 && job.state == nullptr) return refuse(bad, "CausalConv1d: state is null");
  if (job.tokens == 0) return ZREWARD_OK;
  if (job.weight == nullptr) return refuse(bad, "CausalConv1d: weight is null");
  const Named vectors[] = {{"input", job.input}, {"output", job.output}};
  if (const char* name = misplaced(vectors))
    return refuse(bad, "CausalConv1d: %s is null or does not begin at a multiple of 16 bytes", name);
  return ZREWARD_OK;
}

template <typename T>
cudaError_t start(const zreward_causal_conv1d_job& job, cudaStream_t stream) {
  const int vectors = job.channels / Vector<T>::size;
  const dim3 grid(static_cast<unsigned>((vectors + kThreads - 1) / kThreads),
                  static_cast<unsigned>(job.tokens == 0 ? 1 : (job.tokens + kRun - 1) / kRun),
                  static_cast<unsigned>(job.batch));
  return device::launch(kernel_of<T>(job.taps), grid, kThreads, 0, stream, job);
}

}  // namespace

}  // namespace zreward

extern "C" int zreward_causal_conv1d(const struct zreward_causal_conv1d_job* job, void* stream) {
  using namespace zreward;
  const int status = check(*job);
  if (status != ZREWARD_OK || job->batch == 0) return status;
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t error = job->type == ZREWARD_FLOAT32   ? start<float>(*job, on)
                            : job->type == ZREWARD_FLOAT16 ? start<Half>(*job, on)
                                                           : start<BFloat16>(*job, on);
  return status_of(error, "CausalConv1d");
}
