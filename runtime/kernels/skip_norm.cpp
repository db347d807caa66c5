// A residual sum and the norm behind it: s = x + skip, y = norm(s) · weight + bias.
//
// The norm divides by the root of the mean square (AddRmsNorm) or takes the mean off and divides by the standard
// deviation (AddLayerNorm). The same arithmetic, in ONNX Runtime's operators, is the body of the functions of these
// names in every graph (export/passes/skip_norm.py).
#include <algorithm>
#include <cmath>

#include "avx512.h"
#include "kernels.h"
#include "op.h"

namespace zreward {

namespace {

ZREWARD_AVX512_BEGIN
#include "vector_math.h"

template <bool centres>
void add_and_norm(const float* x, const float* skip, const float* weight, const float* bias, size_t n, float epsilon,
                  float* y, float* sum) {
  __m512 total = _mm512_setzero_ps();
  for (size_t c = 0; c < n; c += 16) {
    const __mmask16 mask = simd::first(n - c);
    const __m512 value = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, x + c), _mm512_maskz_loadu_ps(mask, skip + c));
    _mm512_mask_storeu_ps(sum + c, mask, value);
    total = centres ? _mm512_add_ps(total, value) : _mm512_fmadd_ps(value, value, total);
  }
  const float count = static_cast<float>(n);
  float square = _mm512_reduce_add_ps(total) / count;
  __m512 mean = _mm512_setzero_ps();
  if constexpr (centres) {
    mean = _mm512_set1_ps(square);
    total = _mm512_setzero_ps();
    for (size_t c = 0; c < n; c += 16) {
      const __mmask16 mask = simd::first(n - c);
      const __m512 value = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, sum + c), mean);
      total = _mm512_fmadd_ps(value, value, total);
    }
    square = _mm512_reduce_add_ps(total) / count;
  }
  const __m512 scale = _mm512_set1_ps(1 / std::sqrt(square + epsilon));
  for (size_t c = 0; c < n; c += 16) {
    const __mmask16 mask = simd::first(n - c);
    const __m512 value = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, sum + c), mean), scale);
    const __m512 offset = centres ? _mm512_maskz_loadu_ps(mask, bias + c) : _mm512_setzero_ps();
    _mm512_mask_storeu_ps(y + c, mask, _mm512_fmadd_ps(value, _mm512_maskz_loadu_ps(mask, weight + c), offset));
  }
}

ZREWARD_AVX512_END

// Inputs: x and skip float [..., width] (skip may lack leading axes), weight [width] and, if it centres, bias [width].
// Outputs: y and the sum, as x.
template <bool centres>
class SkipNorm {
 public:
  static constexpr int kOutputs[] = {ort::kFloat, ort::kFloat};

  explicit SkipNorm(const Setup& setup) : epsilon_(setup.number("epsilon")) {}

  void run(const Context& context) const {
    const Tensor x = context.input(0), skip = context.input(1), weight = context.input(2);
    const Tensor bias = centres ? context.input(3) : weight;
    const size_t width = static_cast<size_t>(weight.shape.count()), n_values = static_cast<size_t>(x.shape.count());
    const size_t n_skipped = static_cast<size_t>(skip.shape.count());
    if (x.shape.rank == 0 || static_cast<size_t>(x.shape.last()) != width || skip.shape.rank == 0 ||
        skip.shape.last() != x.shape.last() || bias.shape.count() != weight.shape.count())
      throw std::runtime_error("the last axes of x, skip, weight and bias must be the same");
    if (n_skipped == 0 ? n_values != 0 : n_values % n_skipped != 0)
      throw std::runtime_error("skip must have the shape of x, or its last axes");
    float* y = context.output(0, x.shape);
    float* sum = context.output(1, x.shape);
    if (n_values == 0) return;
    const size_t rows = n_values / width, n_tasks = std::min<size_t>(rows, 16);
    context.parallel(n_tasks, [&](size_t task) {
      for (size_t row = rows * task / n_tasks; row < rows * (task + 1) / n_tasks; ++row)
        add_and_norm<centres>(x.as<float>() + row * width, skip.as<float>() + row * width % n_skipped,
                              weight.as<float>(), bias.as<float>(), width, epsilon_, y + row * width,
                              sum + row * width);
    });
  }

 private:
  float epsilon_;
};

struct RmsNorm : SkipNorm<false> {
  using SkipNorm::SkipNorm;
  static constexpr const char* kName = "AddRmsNorm";
  static constexpr int kInputs[] = {ort::kFloat, ort::kFloat, ort::kFloat};
};

struct LayerNorm : SkipNorm<true> {
  using SkipNorm::SkipNorm;
  static constexpr const char* kName = "AddLayerNorm";
  static constexpr int kInputs[] = {ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat};
};

}  // namespace

std::vector<const ort::CustomOp*> skip_norm_operators() { return {operator_of<RmsNorm>(), operator_of<LayerNorm>()}; }

}  // namespace zreward
