// Products of rows with weights that are codes: rows are quantized, multiplied as whole numbers, and scaled back.
//
//   s_g = max|x_g| / 127,  a = round(x / s_g),  y = Σ_g s_g · scale_g · Σ a (w - zero_g) + bias
//
// where the inputs stand in groups g that share a scale. A row's result does not depend on the other rows.
#pragma once

#include <algorithm>

#include "op.h"

namespace zreward {

constexpr size_t kPanelRows = 14, kBlockOutputs = 32;  // that the micro-kernel multiplies at once

// What is done to inputs before they are quantized: nothing, gelu(x) (tanh approximation), or silu(gate) · x.
enum class Input { kPlain, kGelu, kSwiGlu };

// How a layer's inputs are grouped and its codes are stored.
struct Layout {
  Layout(size_t inputs, size_t outputs, size_t group, int bits)
      : inputs(inputs), outputs(outputs), quads(ceil_div(inputs, 4)), group_quads(group / 4), bits(bits) {}

  size_t n_blocks() const { return ceil_div(outputs, kBlockOutputs); }
  size_t n_groups() const { return ceil_div(quads, group_quads); }
  size_t quad_bytes() const { return kBlockOutputs * 4 * static_cast<size_t>(bits) / 8; }
  size_t block_bytes() const { return quads * quad_bytes(); }
  size_t panel_bytes() const { return quads * 4 * kPanelRows; }

  size_t inputs, outputs, quads, group_quads;
  int bits;
};

// Weights as the micro-kernel reads them.
class Weights {
 public:
  // Codes int8 [inputs, outputs] with a scale for each output.
  Weights(const Tensor& codes, const Tensor& scales);

  // Codes uint8 [outputs, blocks, bytes of a block], scales [outputs, blocks] and, where they are not in the middle,
  // zero points uint8 [outputs, bytes]: those of MatMulNBits.
  Weights(const Layout& layout, const Tensor& codes, const Tensor& scales, const Tensor* zero_points);

  const uint8_t* codes(size_t block) const { return codes_ + block * layout.block_bytes(); }
  const float* scales(size_t block) const { return scales_ + block * layout.n_groups() * kBlockOutputs; }
  const int32_t* zeros(size_t block) const {
    return zeros_ == nullptr ? nullptr : zeros_ + block * layout.n_groups() * kBlockOutputs;
  }
  size_t width(size_t block) const { return std::min(kBlockOutputs, layout.outputs - block * kBlockOutputs); }

  const Layout layout;
  const int zero;  // of all codes, where there are no zero points

 private:
  void allocate_codes();
  void copy_scales(const Tensor& given);
  void copy_zeros(const Tensor& given);
  void pack_columns(const int8_t* source, size_t n_inputs, size_t n_outputs, uint8_t* target) const;
  void pack_row_of_nibbles(const uint8_t* source, size_t column, uint8_t* block) const;
  size_t place_of(size_t output, size_t group) const;

  // Codes [outputs / 32][inputs / 4][32][4], or of 4 bits [outputs / 32][inputs / 4][16][4] with output j in the low
  // and 16 + j in the high half of a byte; scales and zero points [outputs / 32][groups][32]; padded with zeros.
  uint8_t* codes_ = nullptr;
  float* scales_ = nullptr;
  int32_t* zeros_ = nullptr;
  Scratch<uint8_t> code_memory_;
  Scratch<float> scale_memory_;
  Scratch<int32_t> zero_memory_;
};

// Quantized rows in panels of 14: codes [panels][inputs / 4][14][4], and [panels][groups][14] scales and negative sums.
struct Rows {
  Rows from(size_t panel, const Layout& layout) const {
    const size_t groups = panel * layout.n_groups() * kPanelRows;
    return {codes + panel * layout.panel_bytes(), scales + groups, sums + groups};
  }

  int8_t* codes;
  float* scales;
  int32_t* sums;
};

class RowMemory {
 public:
  Rows resized(size_t n_rows, const Layout& layout) {
    const size_t panels = ceil_div(n_rows, kPanelRows), scales = panels * layout.n_groups() * kPanelRows;
    return {codes_.resized(panels * layout.panel_bytes()), scales_.resized(scales), sums_.resized(scales)};
  }

 private:
  Scratch<int8_t> codes_;
  Scratch<float> scales_;
  Scratch<int32_t> sums_;
};

// Quantize x [n_rows, inputs] and, for kSwiGlu, the gate of the same shape.
void quantize(Input kind, const float* x, const float* gate, size_t n_rows, const Layout& layout, const Rows& rows);

// y [n_rows, stride] = rows · the outputs of one block (+ bias [width], where it is not null). Meanwhile the codes at
// `next`, as many as this block has, are fetched into the second cache. Where `streams` is set, y is written past the
// caches, which would first read what is overwritten.
void multiply(const Rows& rows, size_t n_rows, const Weights& weights, size_t block, const uint8_t* next,
              const float* bias, float* y, size_t stride, bool streams = false);

// x [n_rows, width] = silu(gate) · x, with rows of x_stride and gate_stride.
void apply_gate(const float* gate, size_t gate_stride, size_t n_rows, size_t width, float* x, size_t x_stride);

}  // namespace zreward
