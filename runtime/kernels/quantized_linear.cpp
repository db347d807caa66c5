// Linear layers whose weights are codes: rows are quantized, multiplied as whole numbers, and scaled back.
//
//   s_g = max|x_g| / 127,  a = round(x / s_g),  y = Σ_g s_g · scale_g · Σ a (w - zero_g) + bias
//
// where the inputs stand in groups g that share a scale: one group in Int8Linear, blocks in BlockLinear. A row's result
// does not depend on the other rows. The same arithmetic, in operators of ONNX Runtime, is the body of the functions of
// these names in every graph (export/passes/quantized_linear.py).
//
// The micro-kernel multiplies a panel of 14 rows by a block of 32 outputs: 28 sums of sixteen 32-bit lanes, each step
// of four inputs being one vpdpbusd a sum. That instruction takes unsigned by signed bytes; the weights are the
// unsigned side. Sums begin at -zero · Σ a. Codes of 4 bits stay packed: a byte holds one of the first sixteen outputs
// and one of the others.
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
constexpr int kSignedOffset = 128;      // of int8 codes; adding it flips a code's highest bit
constexpr size_t kChunkBytes = 400000;  // of quantized rows that one pass over the weights keeps in the second cache
constexpr float kSmallestPeak = 1e-30f;

enum class Input { kPlain, kGelu, kSwiGlu };

// How a layer's inputs are grouped and its codes are stored.
struct Layout {
  Layout(size_t inputs, size_t outputs, size_t group, int bits)
      : inputs(inputs), outputs(outputs), quads(ceil_div(inputs, 4)), group_quads(group / 4), bits(bits) {}

  size_t n_blocks() const { return ceil_div(outputs, kColumns); }
  size_t n_groups() const { return ceil_div(quads, group_quads); }
  size_t quad_bytes() const { return kColumns * 4 * static_cast<size_t>(bits) / 8; }
  size_t block_bytes() const { return quads * quad_bytes(); }

  size_t inputs, outputs, quads, group_quads;
  int bits;
};

// Weights as the micro-kernel reads them, padded with zeros: codes [outputs / 32][inputs / 4][32][4], or of 4 bits
// [outputs / 32][inputs / 4][16][4] with output j in the low and 16 + j in the high half of a byte; scales and zero
// points [outputs / 32][groups][32].
struct Weights {
  // Codes int8 [inputs, outputs] with a scale for each output.
  Weights(const Tensor& codes, const Tensor& given)
      : layout(codes.shape[0], codes.shape[1], 4 * ceil_div(codes.shape[0], 4), 8), zero(kSignedOffset) {
    copy_scales(given);
    allocate();
    const int8_t* source = codes.as<int8_t>();
    const size_t outputs = layout.outputs;
    for (size_t quad = 0; quad < layout.quads; ++quad)
      for (size_t block = 0; block < layout.n_blocks(); ++block)
        pack_columns(source + 4 * quad * outputs + block * kColumns, std::min<size_t>(4, layout.inputs - 4 * quad),
                     std::min(kColumns, outputs - block * kColumns),
                     packed + block * layout.block_bytes() + quad * layout.quad_bytes());
  }

  // Codes uint8 [outputs, blocks, bytes of a block], scales [outputs, blocks] and, where they are not in the middle,
  // zero points uint8 [outputs, bytes]: MatMulNBits's.
  Weights(const Layout& layout, const Tensor& codes, const Tensor& given, const Tensor* zero_points)
      : layout(layout), zero(1 << (layout.bits - 1)) {
    const size_t row_bytes = layout.n_groups() * layout.group_quads * static_cast<size_t>(layout.bits) / 2;
    if (static_cast<size_t>(codes.shape.count()) != layout.outputs * row_bytes)
      throw std::runtime_error("the codes do not fit K, N, bits and block_size");
    copy_scales(given);
    if (zero_points != nullptr) copy_zeros(*zero_points);
    allocate();
    const uint8_t* source = codes.as<uint8_t>();
    for (size_t output = 0; output < layout.outputs; ++output) {
      uint8_t* block = packed + output / kColumns * layout.block_bytes();
      if (layout.bits == 4)
        pack_row_of_nibbles(source + output * row_bytes, output % kColumns, block);
      else
        for (size_t quad = 0; quad < layout.quads; ++quad)
          std::memcpy(block + (quad * kColumns + output % kColumns) * 4, source + output * row_bytes + 4 * quad, 4);
    }
  }

  void allocate() {
    packed = memory.resized(layout.n_blocks() * layout.block_bytes());
    std::memset(packed, 0, layout.n_blocks() * layout.block_bytes());
  }

  void copy_scales(const Tensor& given) {
    const std::vector<float> values = floats_of(given);
    const size_t groups = layout.n_groups(), size = layout.n_blocks() * groups * kColumns;
    if (values.size() != layout.outputs * groups)
      throw std::runtime_error("there must be one scale for each output and group");
    scales = scale_memory.resized(size);
    std::fill(scales, scales + size, 0.0f);
    for (size_t j = 0; j < layout.outputs; ++j)
      for (size_t g = 0; g < groups; ++g) scales[place_of(j, g)] = values[j * groups + g];
  }

  void copy_zeros(const Tensor& given) {
    const size_t groups = layout.n_groups(), size = layout.n_blocks() * groups * kColumns;
    const size_t row_bytes = ceil_div(groups * static_cast<size_t>(layout.bits), 8);
    if (given.type != ort::kUInt8 || static_cast<size_t>(given.shape.count()) != layout.outputs * row_bytes)
      throw std::runtime_error("there must be one packed zero point for each output and group");
    zeros = zero_memory.resized(size);
    std::fill(zeros, zeros + size, 0);
    for (size_t j = 0; j < layout.outputs; ++j) {
      const uint8_t* row = given.as<uint8_t>() + j * row_bytes;
      for (size_t g = 0; g < groups; ++g)
        zeros[place_of(j, g)] = layout.bits == 4 ? row[g / 2] >> (g % 2 * 4) & 15 : row[g];
    }
  }

  size_t place_of(size_t output, size_t group) const {
    return (output / kColumns * layout.n_groups() + group) * kColumns + output % kColumns;
  }

  // Four inputs (or the last n_inputs) of a block's outputs, row-major in the source, to [32][4].
  void pack_columns(const int8_t* source, size_t n_inputs, size_t n_outputs, uint8_t* target) const {
    alignas(16) int8_t rows[4][kColumns] = {};
    for (size_t k = 0; k < n_inputs; ++k) std::memcpy(rows[k], source + k * layout.outputs, n_outputs);
    const __m128i offset = _mm_set1_epi8(static_cast<char>(kSignedOffset));
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

  // One output's codes of 4 bits, the earlier in the low half of a byte, to its halves of bytes in a block.
  void pack_row_of_nibbles(const uint8_t* source, size_t column, uint8_t* block) const {
    const int shift = column < 16 ? 0 : 4;
    uint8_t* place = block + column % 16 * 4;
    for (size_t quad = 0; quad < layout.quads; ++quad, place += 64) {
      uint16_t four;
      uint32_t bytes;
      std::memcpy(&four, source + 2 * quad, 2);
      std::memcpy(&bytes, place, 4);
      bytes |= ((four & 15u) | (four & 0xf0u) << 4 | (four & 0xf00u) << 8 | (four & 0xf000u) << 12) << shift;
      std::memcpy(place, &bytes, 4);
    }
  }

  const uint8_t* block(size_t index) const { return packed + index * layout.block_bytes(); }

  Layout layout;
  int zero;  // of all codes, where there are no zero points
  Scratch<uint8_t> memory;
  Scratch<float> scale_memory;
  Scratch<int32_t> zero_memory;
  uint8_t* packed = nullptr;
  float* scales = nullptr;
  int32_t* zeros = nullptr;
};

// Quantized rows in panels of 14: codes [panels][inputs / 4][14][4], and [panels][groups][14] the scales and the
// negative sums, times the zero point of the weights where it is the same for all of them.
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

// Quantize one group of a row into its place in a panel. `values` has room for it where it is not used as it is.
template <Input kind>
void quantize_group(const float* x, const float* gate, size_t n, int zero, float* values, int8_t* codes, float* scale,
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
  *sum = -zero * _mm512_reduce_add_epi32(total);
}

// sum += the products of four unsigned and four signed bytes in each lane. As an intrinsic, GCC 12 copies every sum
// once a step, which takes twice as many registers as there are.
inline void add_products(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

// A block of 32 outputs: its codes, scales and zero points, and how many of its outputs exist.
struct Block {
  const uint8_t* codes;
  const float* scales;
  const int32_t* zeros;
  const float* bias;
  size_t width;
};

// Up to 14 quantized rows, and where their outputs belong.
struct Panel {
  const int8_t* codes;
  const float* scales;
  const int32_t* sums;
  float* y;
  size_t stride;
};

// What to fetch into the second cache meanwhile: one line for every four inputs.
struct Ahead {
  const uint8_t* line;
  size_t step;
};

// The product of `n` rows of a panel and a block.
template <size_t n, int bits, bool has_zeros>
void multiply(Panel panel, Block block, Ahead ahead, const Layout& layout) {
  const __mmask16 mask_left = simd::first(block.width);
  const __mmask16 mask_right = block.width > 16 ? simd::first(block.width - 16) : 0;
  for (size_t first = 0; first < layout.quads; first += layout.group_quads) {
    __m512i left[n], right[n];
#pragma GCC unroll 14
    for (size_t r = 0; r < n; ++r) {
      left[r] = right[r] = _mm512_set1_epi32(panel.sums[r]);
      if constexpr (has_zeros) {
        left[r] = _mm512_mullo_epi32(left[r], _mm512_load_si512(block.zeros));
        right[r] = _mm512_mullo_epi32(right[r], _mm512_load_si512(block.zeros + 16));
      }
    }
    const size_t last = std::min(layout.quads, first + layout.group_quads);
    for (size_t quad = first; quad < last; ++quad) {
      __m512i weights_left = _mm512_load_si512(block.codes), weights_right;
      if constexpr (bits == 4) {
        const __m512i low = _mm512_set1_epi8(15);
        weights_right = _mm512_and_si512(_mm512_srli_epi16(weights_left, 4), low);
        weights_left = _mm512_and_si512(weights_left, low);
      } else {
        weights_right = _mm512_load_si512(block.codes + 64);
      }
#pragma GCC unroll 14
      for (size_t r = 0; r < n; ++r) {
        int32_t four;
        std::memcpy(&four, panel.codes + 4 * r, 4);
        const __m512i row = _mm512_set1_epi32(four);
        add_products(left[r], weights_left, row);
        add_products(right[r], weights_right, row);
      }
      _mm_prefetch(reinterpret_cast<const char*>(ahead.line), _MM_HINT_T1);
      ahead.line += ahead.step;
      panel.codes += 4 * kRows;
      block.codes += 4 * kColumns * bits / 8;
    }
    const __m512 scales_left = _mm512_load_ps(block.scales), scales_right = _mm512_load_ps(block.scales + 16);
    __m512 bias_left = _mm512_setzero_ps(), bias_right = bias_left;
    if (first == 0 && block.bias != nullptr) {
      bias_left = _mm512_maskz_loadu_ps(mask_left, block.bias);
      bias_right = _mm512_maskz_loadu_ps(mask_right, block.bias + 16);
    }
#pragma GCC unroll 14
    for (size_t r = 0; r < n; ++r) {
      float* y = panel.y + r * panel.stride;
      const __m512 scale = _mm512_set1_ps(panel.scales[r]);
      const __m512 a = _mm512_mul_ps(_mm512_cvtepi32_ps(left[r]), scales_left);
      const __m512 b = _mm512_mul_ps(_mm512_cvtepi32_ps(right[r]), scales_right);
      const __m512 so_far_left = first == 0 ? bias_left : _mm512_maskz_loadu_ps(mask_left, y);
      const __m512 so_far_right = first == 0 ? bias_right : _mm512_maskz_loadu_ps(mask_right, y + 16);
      _mm512_mask_storeu_ps(y, mask_left, _mm512_fmadd_ps(a, scale, so_far_left));
      _mm512_mask_storeu_ps(y + 16, mask_right, _mm512_fmadd_ps(b, scale, so_far_right));
    }
    panel.sums += kRows;
    panel.scales += kRows;
    block.scales += kColumns;
    if constexpr (has_zeros) block.zeros += kColumns;
  }
}

ZREWARD_AVX512_END

using Multiply = void (*)(Panel, Block, Ahead, const Layout&);
template <int bits, bool has_zeros, size_t... n>
constexpr std::array<Multiply, sizeof...(n)> multiply_table(std::index_sequence<n...>) {
  return {multiply<n + 1, bits, has_zeros>...};
}
using PanelSizes = std::make_index_sequence<kRows>;
constexpr std::array<Multiply, kRows> kMultiply[2][2] = {
    {multiply_table<4, false>(PanelSizes()), multiply_table<4, true>(PanelSizes())},
    {multiply_table<8, false>(PanelSizes()), multiply_table<8, true>(PanelSizes())}};

// y [rows, outputs] of rows that are already quantized.
void multiply_all(const Context& context, const Rows& rows, size_t n_rows, const Weights& weights, const float* bias,
                  float* y) {
  const Layout& layout = weights.layout;
  const auto& products = kMultiply[layout.bits == 8][weights.zeros != nullptr];
  const size_t panels = ceil_div(n_rows, kRows), blocks = layout.n_blocks(), groups = layout.n_groups();
  const size_t panel_bytes = layout.quads * 4 * kRows;
  const size_t chunk = std::max<size_t>(1, kChunkBytes / panel_bytes);
  const size_t lines = layout.quad_bytes() / 64;  // of codes, for every four inputs
  const size_t n_tasks = std::min<size_t>(blocks, 16);
  context.parallel(n_tasks, [&](size_t task) {
    const size_t first = blocks * task / n_tasks, last = blocks * (task + 1) / n_tasks;
    for (size_t start = 0; start < panels; start += chunk) {
      for (size_t index = first; index < last; ++index) {
        const size_t column = index * kColumns;
        const Block block{weights.block(index), weights.scales + index * groups * kColumns,
                          weights.zeros == nullptr ? nullptr : weights.zeros + index * groups * kColumns,
                          bias ? bias + column : nullptr, std::min(kColumns, layout.outputs - column)};
        // The first panels fetch the parts of the next block, which may lie in main memory.
        const uint8_t* next = weights.block(std::min(index + 1, last - 1));
        for (size_t p = start; p < std::min(panels, start + chunk); ++p) {
          const size_t row = p * kRows, part = p - start;
          const Panel panel{rows.codes + p * panel_bytes, rows.scales + p * groups * kRows,
                            rows.sums + p * groups * kRows, y + row * layout.outputs + column, layout.outputs};
          const Ahead ahead = part < lines ? Ahead{next + part * layout.quads * 64, 64} : Ahead{next, 0};
          products[std::min(kRows, n_rows - row) - 1](panel, block, ahead, layout);
        }
      }
    }
  });
}

template <Input kind>
void quantize_all(const Context& context, const float* x, const float* gate, size_t n_rows, const Weights& weights,
                  Rows& rows) {
  const Layout& layout = weights.layout;
  const size_t panels = ceil_div(n_rows, kRows), inputs = layout.inputs, groups = layout.n_groups();
  const size_t group_inputs = 4 * layout.group_quads;
  const size_t n_tasks = std::min<size_t>(panels, 16);
  const int zero = weights.zeros == nullptr ? weights.zero : 1;
  rows.codes = rows.code_memory.resized(panels * kRows * layout.quads * 4);
  rows.scales = rows.scale_memory.resized(panels * groups * kRows);
  rows.sums = rows.sum_memory.resized(panels * groups * kRows);
  float* values = kind == Input::kPlain ? nullptr : rows.value_memory.resized(n_tasks * group_inputs);
  context.parallel(n_tasks, [&](size_t task) {
    for (size_t panel = panels * task / n_tasks; panel < panels * (task + 1) / n_tasks; ++panel) {
      int8_t* codes = rows.codes + panel * kRows * layout.quads * 4;
      for (size_t r = 0; r < std::min(kRows, n_rows - panel * kRows); ++r) {
        const size_t row = (panel * kRows + r) * inputs;
        for (size_t g = 0; g < groups; ++g) {
          const size_t first = g * group_inputs, place = (panel * groups + g) * kRows + r;
          quantize_group<kind>(x + row + first, kind == Input::kSwiGlu ? gate + row + first : nullptr,
                               std::min(group_inputs, inputs - first), zero,
                               values ? values + task * group_inputs : nullptr, codes + (first * kRows + 4 * r),
                               rows.scales + place, rows.sums + place);
        }
      }
    }
  });
}

// Int8Linear: codes int8 [inputs, outputs], scales [outputs], bias float [outputs] or [1], and the zero point of the
// body's codes, which is not used here.
struct RowScales {
  static constexpr const char* kNames[] = {"Int8Linear", "GeluInt8Linear", "SwiGluInt8Linear"};
  static constexpr int kCodes = ort::kInt8;
  static constexpr size_t kOptional = 0;

  static Weights weights(const Setup& setup, size_t codes) {
    return Weights(setup.constant(codes, "codes"), setup.constant(codes + 1, "scales"));
  }
};

// BlockLinear: codes uint8 [outputs, blocks, bytes of a block], scales [outputs, blocks], bias as above and, where the
// attribute `symmetric` is 0, zero points uint8 [outputs, bytes].
struct BlockScales {
  static constexpr const char* kNames[] = {"BlockLinear", "GeluBlockLinear", "SwiGluBlockLinear"};
  static constexpr int kCodes = ort::kUInt8;
  static constexpr size_t kOptional = 1;

  static Weights weights(const Setup& setup, size_t codes) {
    const int64_t inputs = setup.integer("K"), outputs = setup.integer("N");
    const int64_t bits = setup.integer("bits"), block = setup.integer("block_size");
    if (inputs < 1 || outputs < 1 || (bits != 4 && bits != 8) || block < 16 || block % 4 != 0)
      throw std::runtime_error("K, N, bits or block_size is none that the operator has");
    const Layout layout(inputs, outputs, block, static_cast<int>(bits));
    Tensor zeros;
    const bool has_zeros = setup.integer("symmetric") == 0;
    if (has_zeros) zeros = setup.constant(codes + 3, "zeros");
    return Weights(layout, setup.constant(codes, "codes"), setup.constant(codes + 1, "scales"),
                   has_zeros ? &zeros : nullptr);
  }
};

// Inputs: [gate,] x float [..., inputs], then those of the format.
template <typename Format, Input kind>
class Linear {
 public:
  static constexpr size_t kFirst = kind == Input::kSwiGlu ? 1 : 0;  // position of x
  static constexpr const char* kName = Format::kNames[static_cast<size_t>(kind)];
  static constexpr size_t kOptional = Format::kOptional;
  static constexpr auto kInputs = [] {
    std::array<int, kFirst + 5> types{};
    for (size_t i = 0; i <= kFirst; ++i) types[i] = ort::kFloat;
    types[kFirst + 1] = Format::kCodes;
    types[kFirst + 2] = ort::kAnyType;
    types[kFirst + 3] = ort::kFloat;
    types[kFirst + 4] = ort::kUInt8;
    return types;
  }();
  static constexpr int kOutputs[] = {ort::kFloat};

  explicit Linear(const Setup& setup) : weights_(Format::weights(setup, kFirst + 1)) {
    std::vector<float> bias = floats_of(setup.constant(kFirst + 3, "bias"));
    const size_t outputs = weights_.layout.outputs;
    if (bias.size() == 1 && outputs > 1) bias.assign(bias[0] == 0 ? 0 : outputs, bias[0]);
    if (!bias.empty() && bias.size() != outputs)
      throw std::runtime_error("the bias must have one value, or one for each output");
    bias_ = std::move(bias);
  }

  void run(const Context& context) const {
    const size_t inputs = weights_.layout.inputs, outputs = weights_.layout.outputs;
    const Tensor x = context.input(kFirst);
    const Tensor gate = kind == Input::kSwiGlu ? context.input(0) : Tensor();
    if (x.shape.rank == 0 || static_cast<size_t>(x.shape.last()) != inputs)
      throw std::runtime_error("the input's last axis does not fit the weights");
    if (kind == Input::kSwiGlu && gate.shape.count() != x.shape.count())
      throw std::runtime_error("gate and input differ in shape");
    Shape shape = x.shape;
    shape.sizes[shape.rank - 1] = static_cast<int64_t>(outputs);
    float* y = context.output(0, shape);
    const size_t n_rows = static_cast<size_t>(x.shape.count()) / inputs;
    if (n_rows == 0) return;
    static thread_local Rows rows;
    quantize_all<kind>(context, x.as<float>(), gate.as<float>(), n_rows, weights_, rows);
    multiply_all(context, rows, n_rows, weights_, bias_.empty() ? nullptr : bias_.data(), y);
  }

 private:
  Weights weights_;
  std::vector<float> bias_;
};

template <typename Format>
void add_operators(std::vector<const ort::CustomOp*>& list) {
  list.push_back(operator_of<Linear<Format, Input::kPlain>>());
  list.push_back(operator_of<Linear<Format, Input::kGelu>>());
  list.push_back(operator_of<Linear<Format, Input::kSwiGlu>>());
}

}  // namespace

std::vector<const ort::CustomOp*> quantized_linear_operators() {
  std::vector<const ort::CustomOp*> list;
  add_operators<RowScales>(list);
  add_operators<BlockScales>(list);
  return list;
}

}  // namespace zreward
