// Linear layers with weights of 8 bits: rows are quantized, multiplied as whole numbers, and scaled back.
//
//   s = max|x| / 127,  a = round(x / s),  y = s · scale · Σ a w + bias
//
// A row's result does not depend on the other rows. The same arithmetic, in standard operators, is the body of the
// functions of these names in every graph (export/passes/int8_linear.py).
//
// The micro-kernel multiplies a panel of 14 rows by a block of 32 outputs: 28 sums of sixteen 32-bit lanes, each step
// of four inputs being one vpdpbusd a sum. That instruction takes unsigned by signed bytes; the weights are the
// unsigned side, w + 128, and 128 Σ a is taken off at the end.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "avx512.h"
#include "kernels.h"
#include "op.h"

namespace zreward {

namespace {

constexpr size_t kRows = 14, kColumns = 32;
constexpr int kOffset = 128;            // of the unsigned weight codes; adding it flips a code's highest bit
constexpr size_t kChunkBytes = 400000;  // of quantized rows that one pass over the weights keeps in the second cache
constexpr float kSmallestPeak = 1e-30f;

enum class Input { kPlain, kGelu, kSwiGlu };

// Weights [inputs, outputs] as the micro-kernel reads them: [outputs / 32][inputs / 4][32][4], padded with zeros.
struct Weights {
  Weights(const Tensor& codes, const Tensor& scales_tensor)
      : inputs(codes.shape[0]), outputs(codes.shape[1]), quads(ceil_div(inputs, 4)) {
    const std::vector<float> given = floats_of(scales_tensor);
    if (given.size() != outputs) throw std::runtime_error("there must be one scale for each output");
    const size_t padded = n_blocks() * kColumns;
    packed = memory.resized(padded * quads * 4);
    scales = scale_memory.resized(padded);
    std::fill(scales, scales + padded, 0.0f);
    std::copy(given.begin(), given.end(), scales);
    const int8_t* source = codes.as<int8_t>();
    const size_t block_bytes = quads * 4 * kColumns;
    for (size_t quad = 0; quad < quads; ++quad)
      for (size_t block = 0; block < n_blocks(); ++block)
        pack_quad(source + 4 * quad * outputs + block * kColumns, std::min<size_t>(4, inputs - 4 * quad),
                  std::min(kColumns, outputs - block * kColumns), packed + block * block_bytes + quad * 4 * kColumns);
  }

  // Four inputs (or the last n_inputs) of a block's outputs, row-major in the source, to [32][4].
  void pack_quad(const int8_t* source, size_t n_inputs, size_t n_outputs, uint8_t* target) const {
    alignas(16) int8_t rows[4][kColumns] = {};
    for (size_t k = 0; k < n_inputs; ++k) std::memcpy(rows[k], source + k * outputs, n_outputs);
    const __m128i offset = _mm_set1_epi8(static_cast<char>(kOffset));
    for (size_t j = 0; j < kColumns; j += 16) {
      __m128i row[4];
      for (size_t k = 0; k < 4; ++k)
        row[k] = _mm_xor_si128(_mm_load_si128(reinterpret_cast<const __m128i*>(rows[k] + j)), offset);
      const __m128i low01 = _mm_unpacklo_epi8(row[0], row[1]), low23 = _mm_unpacklo_epi8(row[2], row[3]);
      const __m128i high01 = _mm_unpackhi_epi8(row[0], row[1]), high23 = _mm_unpackhi_epi8(row[2], row[3]);
      auto* place = reinterpret_cast<__m128i*>(target + 4 * j);
      _mm_store_si128(place, _mm_unpacklo_epi16(low01, low23));
      _mm_store_si128(place + 1, _mm_unpackhi_epi16(low01, low23));
      _mm_store_si128(place + 2, _mm_unpacklo_epi16(high01, high23));
      _mm_store_si128(place + 3, _mm_unpackhi_epi16(high01, high23));
    }
  }

  size_t n_blocks() const { return ceil_div(outputs, kColumns); }
  const uint8_t* block(size_t index) const { return packed + index * quads * 4 * kColumns; }

  size_t inputs, outputs, quads;
  Scratch<uint8_t> memory;
  Scratch<float> scale_memory;
  uint8_t* packed;
  float* scales;
};

// Quantized rows: codes [rows / 14][inputs / 4][14][4], and for each row its scale and 128 times its sum.
struct Rows {
  Scratch<int8_t> code_memory;
  Scratch<float> scale_memory, value_memory;
  Scratch<int32_t> sum_memory;
  int8_t* codes;
  float* scales;
  int32_t* sums;
};

ZREWARD_AVX512_BEGIN
#include "vector_math.h"

template <Input kind>
__m512 loaded(__mmask16 mask, const float* x, const float* gate) {
  const __m512 value = _mm512_maskz_loadu_ps(mask, x);
  if constexpr (kind == Input::kGelu) return simd::gelu_tanh(value);
  if constexpr (kind == Input::kSwiGlu)
    return _mm512_mul_ps(simd::silu(_mm512_maskz_loadu_ps(mask, gate)), value);
  return value;
}

// Quantize one row into its place in a panel. `values` has room for the row where it is not used as it is.
template <Input kind>
void quantize_row(const float* x, const float* gate, size_t n, float* values, int8_t* codes, float* scale,
                  int32_t* sum) {
  __m512 peak = _mm512_set1_ps(kSmallestPeak);
  __mmask16 bad = 0;
  for (size_t k = 0; k < n; k += 16) {
    const __mmask16 mask = simd::first(n - k);
    const __m512 value = loaded<kind>(mask, x + k, gate + (kind == Input::kSwiGlu ? k : 0));
    if constexpr (kind != Input::kPlain) _mm512_mask_storeu_ps(values + k, mask, value);
    peak = _mm512_max_ps(peak, _mm512_abs_ps(value));
    bad |= _mm512_mask_fpclass_ps_mask(mask, value, 0x81 | 0x08 | 0x10);  // NaN, infinite
  }
  const float* row = kind == Input::kPlain ? x : values;
  // A row with a NaN or an infinite value has no answer.
  const float top = bad ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(peak);
  *scale = top * (1.0f / 127);
  const __m512 divisor = _mm512_set1_ps(*scale);
  __m512i total = _mm512_setzero_si512();
  for (size_t k = 0; k < n; k += 16) {
    const __m512 value = _mm512_maskz_loadu_ps(simd::first(n - k), row + k);
    const __m512i code = bad ? _mm512_setzero_si512() : _mm512_cvtps_epi32(_mm512_div_ps(value, divisor));
    total = _mm512_add_epi32(total, code);
    alignas(16) int8_t bytes[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(bytes), _mm512_cvtsepi32_epi8(code));
    const size_t quads = std::min<size_t>(4, ceil_div(n - k, 4));
    for (size_t q = 0; q < quads; ++q) std::memcpy(codes + (k / 4 + q) * 4 * kRows, bytes + 4 * q, 4);
  }
  *sum = kOffset * _mm512_reduce_add_epi32(total);
}

// sum += the products of four unsigned and four signed bytes in each lane. As an intrinsic, GCC 12 copies every sum
// once a step, which takes twice as many registers as there are.
inline void add_products(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

// The product of `n` rows of a panel and a block of 32 outputs, of which `width` are stored. Meanwhile a line of memory
// is fetched for every four inputs, from `ahead` on in steps of `step` bytes.
template <size_t n>
void multiply(const int8_t* rows, const uint8_t* block, const uint8_t* ahead, size_t step, size_t quads,
              const int32_t* sums, const float* row_scales, const float* scales, const float* bias, float* y,
              size_t stride, size_t width) {
  __m512i left[n], right[n];
#pragma GCC unroll 14
  for (size_t r = 0; r < n; ++r) left[r] = right[r] = _mm512_setzero_si512();
  for (size_t k = 0; k < quads; ++k) {
    const __m512i weights_left = _mm512_load_si512(block), weights_right = _mm512_load_si512(block + 64);
#pragma GCC unroll 14
    for (size_t r = 0; r < n; ++r) {
      int32_t four;
      std::memcpy(&four, rows + 4 * r, 4);
      const __m512i row = _mm512_set1_epi32(four);
      add_products(left[r], weights_left, row);
      add_products(right[r], weights_right, row);
    }
    _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
    ahead += step;
    rows += 4 * kRows;
    block += 4 * kColumns;
  }
  const __mmask16 mask_left = simd::first(width), mask_right = width > 16 ? simd::first(width - 16) : 0;
  const __m512 scales_left = _mm512_load_ps(scales), scales_right = _mm512_load_ps(scales + 16);
  const __m512 bias_left = bias ? _mm512_maskz_loadu_ps(mask_left, bias) : _mm512_setzero_ps();
  const __m512 bias_right = bias ? _mm512_maskz_loadu_ps(mask_right, bias + 16) : _mm512_setzero_ps();
#pragma GCC unroll 14
  for (size_t r = 0; r < n; ++r) {
    const __m512i sum = _mm512_set1_epi32(sums[r]);
    const __m512 scale = _mm512_set1_ps(row_scales[r]);
    const __m512 a = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(left[r], sum)), scales_left);
    const __m512 b = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(right[r], sum)), scales_right);
    _mm512_mask_storeu_ps(y + r * stride, mask_left, _mm512_fmadd_ps(a, scale, bias_left));
    _mm512_mask_storeu_ps(y + r * stride + 16, mask_right, _mm512_fmadd_ps(b, scale, bias_right));
  }
}

ZREWARD_AVX512_END

using Multiply = void (*)(const int8_t*, const uint8_t*, const uint8_t*, size_t, size_t, const int32_t*, const float*,
                          const float*, const float*, float*, size_t, size_t);
template <size_t... n>
constexpr std::array<Multiply, sizeof...(n)> multiply_table(std::index_sequence<n...>) {
  return {multiply<n + 1>...};
}
constexpr auto kMultiply = multiply_table(std::make_index_sequence<kRows>());

// y [rows, outputs] of rows that are already quantized.
void multiply_all(const Context& context, const Rows& rows, size_t n_rows, const Weights& weights, const float* bias,
                  float* y) {
  const size_t panels = ceil_div(n_rows, kRows), blocks = weights.n_blocks();
  const size_t panel_bytes = weights.quads * 4 * kRows;
  const size_t chunk = std::max<size_t>(1, kChunkBytes / panel_bytes);
  const size_t n_tasks = std::min<size_t>(blocks, 16);
  context.parallel(n_tasks, [&](size_t task) {
    const size_t first = blocks * task / n_tasks, last = blocks * (task + 1) / n_tasks;
    for (size_t start = 0; start < panels; start += chunk) {
      for (size_t block = first; block < last; ++block) {
        const size_t column = block * kColumns;
        // The first two panels fetch the two halves of the next block, which may lie in main memory.
        const uint8_t* next = weights.block(std::min(block + 1, last - 1));
        for (size_t panel = start; panel < std::min(panels, start + chunk); ++panel) {
          const size_t row = panel * kRows, n = std::min(kRows, n_rows - row);
          const size_t half = panel - start;
          kMultiply[n - 1](rows.codes + panel * panel_bytes, weights.block(block),
                           half < 2 ? next + half * weights.quads * 64 : next, half < 2 ? 64 : 0, weights.quads,
                           rows.sums + row, rows.scales + row, weights.scales + column, bias ? bias + column : nullptr,
                           y + row * weights.outputs + column, weights.outputs,
                           std::min(kColumns, weights.outputs - column));
        }
      }
    }
  });
}

template <Input kind>
void quantize_all(const Context& context, const float* x, const float* gate, size_t n_rows, size_t inputs, Rows& rows) {
  const size_t panels = ceil_div(n_rows, kRows), quads = ceil_div(inputs, 4);
  const size_t n_tasks = std::min<size_t>(panels, 16);
  rows.codes = rows.code_memory.resized(panels * kRows * quads * 4);
  rows.scales = rows.scale_memory.resized(panels * kRows);
  rows.sums = rows.sum_memory.resized(panels * kRows);
  float* values = kind == Input::kPlain ? nullptr : rows.value_memory.resized(n_tasks * inputs);
  context.parallel(n_tasks, [&](size_t task) {
    for (size_t panel = panels * task / n_tasks; panel < panels * (task + 1) / n_tasks; ++panel) {
      int8_t* codes = rows.codes + panel * kRows * quads * 4;
      for (size_t r = 0; r < std::min(kRows, n_rows - panel * kRows); ++r) {
        const size_t row = panel * kRows + r;
        quantize_row<kind>(x + row * inputs, kind == Input::kSwiGlu ? gate + row * inputs : nullptr, inputs,
                           values ? values + task * inputs : nullptr, codes + 4 * r, rows.scales + row,
                           rows.sums + row);
      }
    }
  });
}

// Inputs: [gate,] x float [..., inputs], codes int8 [inputs, outputs], scales [outputs], bias float [outputs] or [1],
// and the zero point of the body's codes, which is not used here.
template <Input kind>
class Int8Linear {
 public:
  static constexpr size_t kFirst = kind == Input::kSwiGlu ? 1 : 0;  // position of x

  explicit Int8Linear(const Setup& setup)
      : weights_(setup.constant(kFirst + 1, "codes"), setup.constant(kFirst + 2, "scales")) {
    std::vector<float> bias = floats_of(setup.constant(kFirst + 3, "bias"));
    if (bias.size() == 1 && weights_.outputs > 1) bias.assign(bias[0] == 0 ? 0 : weights_.outputs, bias[0]);
    if (!bias.empty() && bias.size() != weights_.outputs)
      throw std::runtime_error("the bias must have one value, or one for each output");
    bias_ = std::move(bias);
  }

  void run(const Context& context) const {
    const Tensor x = context.input(kFirst);
    const Tensor gate = kind == Input::kSwiGlu ? context.input(0) : Tensor();
    if (x.shape.rank == 0 || static_cast<size_t>(x.shape.last()) != weights_.inputs)
      throw std::runtime_error("the input's last axis does not fit the weights");
    if (kind == Input::kSwiGlu && gate.shape.count() != x.shape.count())
      throw std::runtime_error("gate and input differ in shape");
    Shape shape = x.shape;
    shape.sizes[shape.rank - 1] = static_cast<int64_t>(weights_.outputs);
    float* y = context.output(0, shape);
    const size_t n_rows = static_cast<size_t>(x.shape.count()) / weights_.inputs;
    if (n_rows == 0) return;
    static thread_local Rows rows;
    quantize_all<kind>(context, x.as<float>(), gate.as<float>(), n_rows, weights_.inputs, rows);
    multiply_all(context, rows, n_rows, weights_, bias_.empty() ? nullptr : bias_.data(), y);
  }

 private:
  Weights weights_;
  std::vector<float> bias_;
};

struct PlainLinear : Int8Linear<Input::kPlain> {
  using Int8Linear::Int8Linear;
  static constexpr const char* kName = "Int8Linear";
  static constexpr int kInputs[] = {ort::kFloat, ort::kInt8, ort::kAnyType, ort::kFloat, ort::kUInt8};
  static constexpr int kOutputs[] = {ort::kFloat};
};

struct GeluLinear : Int8Linear<Input::kGelu> {
  using Int8Linear::Int8Linear;
  static constexpr const char* kName = "GeluInt8Linear";
  static constexpr int kInputs[] = {ort::kFloat, ort::kInt8, ort::kAnyType, ort::kFloat, ort::kUInt8};
  static constexpr int kOutputs[] = {ort::kFloat};
};

struct SwiGluLinear : Int8Linear<Input::kSwiGlu> {
  using Int8Linear::Int8Linear;
  static constexpr const char* kName = "SwiGluInt8Linear";
  static constexpr int kInputs[] = {ort::kFloat, ort::kFloat, ort::kInt8, ort::kAnyType, ort::kFloat, ort::kUInt8};
  static constexpr int kOutputs[] = {ort::kFloat};
};

}  // namespace

std::vector<const ort::CustomOp*> int8_linear_operators() {
  return {operator_of<PlainLinear>(), operator_of<GeluLinear>(), operator_of<SwiGluLinear>()};
}

}  // namespace zreward
