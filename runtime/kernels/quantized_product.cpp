// The micro-kernel multiplies a panel of 14 rows by a block of 32 outputs: 28 sums of sixteen 32-bit lanes, each step
// of four inputs being one vpdpbusd a sum. That instruction takes unsigned by signed bytes; the weights are the
// unsigned side. Sums begin at -zero · Σ a. Codes of 4 bits stay packed in memory and are parted in registers.
#include "quantized_product.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "avx512.h"

namespace zreward {

namespace {

constexpr int kSignedOffset = 128;  // of int8 codes; adding it flips a code's highest bit
constexpr float kSmallestPeak = 1e-30f;
constexpr size_t kLanes = 16;

}  // namespace

Weights::Weights(const Tensor& codes, const Tensor& scales)
    : layout(codes.shape[0], codes.shape[1], 4 * ceil_div(codes.shape[0], 4), 8), zero(kSignedOffset) {
  copy_scales(scales);
  allocate_codes();
  const int8_t* source = codes.as<int8_t>();
  const size_t outputs = layout.outputs;
  for (size_t quad = 0; quad < layout.quads; ++quad)
    for (size_t block = 0; block < layout.n_blocks(); ++block)
      pack_columns(source + 4 * quad * outputs + block * kBlockOutputs,
                   std::min<size_t>(4, layout.inputs - 4 * quad), width(block),
                   codes_ + block * layout.block_bytes() + quad * layout.quad_bytes());
}

Weights::Weights(const Layout& layout, const Tensor& codes, const Tensor& scales, const Tensor* zero_points)
    : layout(layout), zero(1 << (layout.bits - 1)) {
  const size_t row_bytes = layout.n_groups() * layout.group_quads * static_cast<size_t>(layout.bits) / 2;
  if (codes.type != ort::kUInt8 || static_cast<size_t>(codes.shape.count()) != layout.outputs * row_bytes)
    throw std::runtime_error("the codes do not fit K, N, bits and block_size");
  copy_scales(scales);
  if (zero_points != nullptr) copy_zeros(*zero_points);
  allocate_codes();
  for (size_t output = 0; output < layout.outputs; ++output) {
    const uint8_t* source = codes.as<uint8_t>() + output * row_bytes;
    uint8_t* block = codes_ + output / kBlockOutputs * layout.block_bytes();
    const size_t column = output % kBlockOutputs;
    if (layout.bits == 4)
      pack_row_of_nibbles(source, column, block);
    else
      for (size_t quad = 0; quad < layout.quads; ++quad)
        std::memcpy(block + (quad * kBlockOutputs + column) * 4, source + 4 * quad, 4);
  }
}

void Weights::allocate_codes() {
  const size_t size = layout.n_blocks() * layout.block_bytes();
  codes_ = code_memory_.resized(size);
  std::memset(codes_, 0, size);
}

void Weights::copy_scales(const Tensor& given) {
  const std::vector<float> values = floats_of(given);
  const size_t groups = layout.n_groups(), size = layout.n_blocks() * groups * kBlockOutputs;
  if (values.size() != layout.outputs * groups)
    throw std::runtime_error("there must be one scale for each output and group");
  scales_ = scale_memory_.resized(size);
  std::fill(scales_, scales_ + size, 0.0f);
  for (size_t j = 0; j < layout.outputs; ++j)
    for (size_t g = 0; g < groups; ++g) scales_[place_of(j, g)] = values[j * groups + g];
}

void Weights::copy_zeros(const Tensor& given) {
  const size_t groups = layout.n_groups(), size = layout.n_blocks() * groups * kBlockOutputs;
  const size_t row_bytes = ceil_div(groups * static_cast<size_t>(layout.bits), 8);
  if (given.type != ort::kUInt8 || static_cast<size_t>(given.shape.count()) != layout.outputs * row_bytes)
    throw std::runtime_error("there must be one packed zero point for each output and group");
  zeros_ = zero_memory_.resized(size);
  std::fill(zeros_, zeros_ + size, 0);
  for (size_t j = 0; j < layout.outputs; ++j) {
    const uint8_t* row = given.as<uint8_t>() + j * row_bytes;
    for (size_t g = 0; g < groups; ++g)
      zeros_[place_of(j, g)] = layout.bits == 4 ? row[g / 2] >> (g % 2 * 4) & 15 : row[g];
  }
}

size_t Weights::place_of(size_t output, size_t group) const {
  return (output / kBlockOutputs * layout.n_groups() + group) * kBlockOutputs + output % kBlockOutputs;
}

// Four inputs (or the last n_inputs) of a block's outputs, row-major in the source, to [32][4].
void Weights::pack_columns(const int8_t* source, size_t n_inputs, size_t n_outputs, uint8_t* target) const {
  alignas(16) int8_t rows[4][kBlockOutputs] = {};
  for (size_t k = 0; k < n_inputs; ++k) std::memcpy(rows[k], source + k * layout.outputs, n_outputs);
  const __m128i offset = _mm_set1_epi8(static_cast<char>(kSignedOffset));
  for (size_t j = 0; j < kBlockOutputs; j += 16) {
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
void Weights::pack_row_of_nibbles(const uint8_t* source, size_t column, uint8_t* block) const {
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

namespace {

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

// Quantize one group of a row. `values` has room for it where it is not used as it is. What is written behind the last
// code, up to a multiple of 16, is zero.
template <Input kind>
void quantize_group(const float* x, const float* gate, size_t n, float* values, int8_t* codes, float* scale,
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
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + k), _mm512_cvtsepi32_epi8(code));
  }
  *sum = -_mm512_reduce_add_epi32(total);
}

// Codes of 14 rows, each `stride` bytes behind the one before, to [quads][14][4].
void interleave(const int8_t* rows, size_t stride, size_t quads, int8_t* panel) {
  const auto load = [&](size_t row, size_t quad) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + row * stride + 4 * quad));
  };
  const auto place = [&](size_t row, size_t quad) {
    return reinterpret_cast<__m128i*>(panel + (quad * kPanelRows + row) * 4);
  };
  size_t quad = 0;
  for (; quad + 4 <= quads; quad += 4) {
    for (size_t row = 0; row < 12; row += 4) {
      const __m128i a = load(row, quad), b = load(row + 1, quad), c = load(row + 2, quad), d = load(row + 3, quad);
      const __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d);
      const __m128i ab2 = _mm_unpackhi_epi32(a, b), cd2 = _mm_unpackhi_epi32(c, d);
      _mm_storeu_si128(place(row, quad), _mm_unpacklo_epi64(ab, cd));
      _mm_storeu_si128(place(row, quad + 1), _mm_unpackhi_epi64(ab, cd));
      _mm_storeu_si128(place(row, quad + 2), _mm_unpacklo_epi64(ab2, cd2));
      _mm_storeu_si128(place(row, quad + 3), _mm_unpackhi_epi64(ab2, cd2));
    }
    const __m128i a = load(12, quad), b = load(13, quad);
    const __m128i low = _mm_unpacklo_epi32(a, b), high = _mm_unpackhi_epi32(a, b);
    _mm_storel_epi64(place(12, quad), low);
    _mm_storel_epi64(place(12, quad + 1), _mm_unpackhi_epi64(low, low));
    _mm_storel_epi64(place(12, quad + 2), high);
    _mm_storel_epi64(place(12, quad + 3), _mm_unpackhi_epi64(high, high));
  }
  for (; quad < quads; ++quad)
    for (size_t row = 0; row < kPanelRows; ++row) std::memcpy(place(row, quad), rows + row * stride + 4 * quad, 4);
}

// sum += the products of four unsigned and four signed bytes in each lane. As an intrinsic, GCC 12 copies every sum
// once a step, which takes twice as many registers as there are.
inline void add_products(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

// A block of 32 outputs: its codes, scales and zero points (one, or one for each), and how many of its outputs exist.
struct Block {
  const uint8_t* codes;
  const float* scales;
  const int32_t* zeros;
  int zero;
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
  bool streams;
};

// What to fetch into the second cache meanwhile: one line for every four inputs.
struct Ahead {
  const uint8_t* line;
  size_t step;
};

// The product of `n` rows of a panel and a block.
template <size_t n, int bits, bool has_zeros>
void multiply_panel(Panel panel, Block block, Ahead ahead, const Layout& layout) {
  const __mmask16 mask_left = simd::first(block.width);
  const __mmask16 mask_right = block.width > 16 ? simd::first(block.width - 16) : 0;
  __m512 bias_left = _mm512_setzero_ps(), bias_right = bias_left;
  if (block.bias != nullptr) {
    bias_left = _mm512_maskz_loadu_ps(mask_left, block.bias);
    bias_right = _mm512_maskz_loadu_ps(mask_right, block.bias + 16);
  }
  alignas(64) float totals[n][kBlockOutputs];  // of the groups so far; rows of y may lie in one set of the cache
  for (size_t first = 0; first < layout.quads; first += layout.group_quads) {
    __m512i left[n], right[n];
#pragma GCC unroll 14
    for (size_t r = 0; r < n; ++r) {
      if constexpr (has_zeros) {
        const __m512i sum = _mm512_set1_epi32(panel.sums[r]);
        left[r] = _mm512_mullo_epi32(sum, _mm512_load_si512(block.zeros));
        right[r] = _mm512_mullo_epi32(sum, _mm512_load_si512(block.zeros + 16));
      } else {
        left[r] = right[r] = _mm512_set1_epi32(block.zero * panel.sums[r]);
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
      panel.codes += 4 * kPanelRows;
      block.codes += 4 * kBlockOutputs * bits / 8;
    }
    const __m512 scales_left = _mm512_load_ps(block.scales), scales_right = _mm512_load_ps(block.scales + 16);
    const bool is_last = last == layout.quads;
#pragma GCC unroll 14
    for (size_t r = 0; r < n; ++r) {
      const __m512 scale = _mm512_set1_ps(panel.scales[r]);
      const __m512 a = _mm512_mul_ps(_mm512_cvtepi32_ps(left[r]), scales_left);
      const __m512 b = _mm512_mul_ps(_mm512_cvtepi32_ps(right[r]), scales_right);
      const __m512 total_left = _mm512_fmadd_ps(a, scale, first == 0 ? bias_left : _mm512_load_ps(totals[r]));
      const __m512 total_right = _mm512_fmadd_ps(b, scale, first == 0 ? bias_right : _mm512_load_ps(totals[r] + 16));
      if (is_last) {
        float* y = panel.y + r * panel.stride;
        if (panel.streams) {
          _mm512_stream_ps(y, total_left);
          _mm512_stream_ps(y + 16, total_right);
        } else {
          _mm512_mask_storeu_ps(y, mask_left, total_left);
          _mm512_mask_storeu_ps(y + 16, mask_right, total_right);
        }
      } else {
        _mm512_store_ps(totals[r], total_left);
        _mm512_store_ps(totals[r] + 16, total_right);
      }
    }
    panel.sums += kPanelRows;
    panel.scales += kPanelRows;
    block.scales += kBlockOutputs;
    if constexpr (has_zeros) block.zeros += kBlockOutputs;
  }
}

void gate_rows(const float* gate, size_t gate_stride, size_t n_rows, size_t width, float* x, size_t x_stride) {
  for (size_t r = 0; r < n_rows; ++r)
    for (size_t j = 0; j < width; j += 16) {
      const __mmask16 mask = simd::first(width - j);
      float* place = x + r * x_stride + j;
      const __m512 value = loaded<Input::kSwiGlu>(mask, place, gate + r * gate_stride + j);
      _mm512_mask_storeu_ps(place, mask, value);
    }
}

template <Input kind>
void quantize_panels(const float* x, const float* gate, size_t n_rows, const Layout& layout, const Rows& rows) {
  static thread_local Scratch<int8_t> line_memory;
  static thread_local Scratch<float> value_memory;
  const size_t inputs = layout.inputs, groups = layout.n_groups(), group = 4 * layout.group_quads;
  const size_t stride = ceil_div(inputs, 16) * 16;
  int8_t* lines = line_memory.resized(kPanelRows * stride);
  float* values = kind == Input::kPlain ? nullptr : value_memory.resized(group);
  for (size_t panel = 0; panel * kPanelRows < n_rows; ++panel) {
    const Rows place = rows.from(panel, layout);
    for (size_t r = 0; r < std::min(kPanelRows, n_rows - panel * kPanelRows); ++r) {
      const size_t row = (panel * kPanelRows + r) * inputs;
      for (size_t g = 0; g < groups; ++g) {
        const size_t first = g * group;
        quantize_group<kind>(x + row + first, kind == Input::kSwiGlu ? gate + row + first : nullptr,
                             std::min(group, inputs - first), values, lines + r * stride + first,
                             place.scales + g * kPanelRows + r, place.sums + g * kPanelRows + r);
      }
    }
    interleave(lines, stride, layout.quads, place.codes);
  }
}

ZREWARD_AVX512_END

using Multiply = void (*)(Panel, Block, Ahead, const Layout&);
template <int bits, bool has_zeros, size_t... n>
constexpr std::array<Multiply, sizeof...(n)> multiply_table(std::index_sequence<n...>) {
  return {multiply_panel<n + 1, bits, has_zeros>...};
}
using PanelSizes = std::make_index_sequence<kPanelRows>;
constexpr std::array<Multiply, kPanelRows> kMultiply[2][2] = {
    {multiply_table<4, false>(PanelSizes()), multiply_table<4, true>(PanelSizes())},
    {multiply_table<8, false>(PanelSizes()), multiply_table<8, true>(PanelSizes())}};

}  // namespace

void quantize(Input kind, const float* x, const float* gate, size_t n_rows, const Layout& layout, const Rows& rows) {
  switch (kind) {
    case Input::kPlain:
      return quantize_panels<Input::kPlain>(x, gate, n_rows, layout, rows);
    case Input::kGelu:
      return quantize_panels<Input::kGelu>(x, gate, n_rows, layout, rows);
    case Input::kSwiGlu:
      return quantize_panels<Input::kSwiGlu>(x, gate, n_rows, layout, rows);
  }
}

void multiply(const Rows& rows, size_t n_rows, const Weights& weights, size_t block, const uint8_t* next,
              const float* bias, float* y, size_t stride, bool streams) {
  const Layout& layout = weights.layout;
  const auto& products = kMultiply[layout.bits == 8][weights.zeros(block) != nullptr];
  const Block operand{weights.codes(block), weights.scales(block), weights.zeros(block),
                      weights.zero,         bias,                  weights.width(block)};
  const bool fits = operand.width == kBlockOutputs && stride % kLanes == 0 && reinterpret_cast<uintptr_t>(y) % 64 == 0;
  const size_t lines = layout.quad_bytes() / 64;  // of codes, for every four inputs
  for (size_t panel = 0; panel * kPanelRows < n_rows; ++panel) {
    const size_t first = panel * kPanelRows;
    const Rows part = rows.from(panel, layout);
    // The first panels fetch the parts of the next block, which may lie in main memory.
    const Ahead ahead = panel < lines ? Ahead{next + panel * layout.quads * 64, 64} : Ahead{next, 0};
    products[std::min(kPanelRows, n_rows - first) - 1](
        Panel{part.codes, part.scales, part.sums, y + first * stride, stride, streams && fits}, operand, ahead, layout);
  }
  if (streams) _mm_sfence();
}

void apply_gate(const float* gate, size_t gate_stride, size_t n_rows, size_t width, float* x, size_t x_stride) {
  gate_rows(gate, gate_stride, n_rows, width, x, x_stride);
}

}  // namespace zreward
