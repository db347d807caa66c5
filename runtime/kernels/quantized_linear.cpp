// Linear layers and feed-forward networks whose weights are codes (quantized_product.h): one scale for a row of inputs
// in Int8Linear, one for each block in BlockLinear. The same arithmetic, in operators of ONNX Runtime, is the body of
// the functions of these names in every graph (export/passes/quantized_linear.py, quantized_mlp.py).
#include <algorithm>
#include <memory>

#include "kernels.h"
#include "quantized_product.h"

namespace zreward {

namespace {

constexpr size_t kChunkBytes = 400000;  // of quantized rows that one pass over the weights keeps in the second cache
constexpr size_t kStreamedBytes = 2000000;  // outputs that are larger would not stay in the second cache
constexpr size_t kTaskPanels = 3;       // that a thread takes through a feed-forward network at once
constexpr size_t kFewPanels = 8;

// The attributes of one product of a node.
struct Attributes {
  const char *inputs, *outputs, *bits, *block_size, *symmetric;
};

// Codes int8 [inputs, outputs], scales [outputs], and the zero point of the body's codes, which is not used here.
struct RowScales {
  static constexpr const char* kLinear[] = {"Int8Linear", "GeluInt8Linear", "SwiGluInt8Linear"};
  static constexpr const char* kMlp[] = {nullptr, "GeluInt8Mlp", "SwiGluInt8Mlp"};
  static constexpr int kCodes = ort::kInt8;
  static constexpr size_t kZeros(size_t) { return 1; }  // of a node with so many products
  static constexpr bool kZerosAreOptional = false;

  static Weights weights(const Setup& setup, const Attributes&, size_t codes, size_t) {
    return Weights(setup.constant(codes, "codes"), setup.constant(codes + 1, "scales"));
  }
};

// Codes uint8 [outputs, blocks, bytes of a block], scales [outputs, blocks] and, where the attribute `symmetric` is 0,
// zero points uint8 [outputs, bytes].
struct BlockScales {
  static constexpr const char* kLinear[] = {"BlockLinear", "GeluBlockLinear", "SwiGluBlockLinear"};
  static constexpr const char* kMlp[] = {nullptr, "GeluBlockMlp", "SwiGluBlockMlp"};
  static constexpr int kCodes = ort::kUInt8;
  static constexpr size_t kZeros(size_t products) { return products; }
  static constexpr bool kZerosAreOptional = true;

  static Weights weights(const Setup& setup, const Attributes& names, size_t codes, size_t zeros) {
    const int64_t inputs = setup.integer(names.inputs), outputs = setup.integer(names.outputs);
    const int64_t bits = setup.integer(names.bits), block = setup.integer(names.block_size);
    if (inputs < 1 || outputs < 1 || (bits != 4 && bits != 8) || block < 16 || block % 4 != 0)
      throw std::runtime_error("a size, bits or block_size is none that the operator has");
    const Layout layout(inputs, outputs, block, static_cast<int>(bits));
    Tensor points;
    const bool has_zeros = setup.integer(names.symmetric) == 0;
    if (has_zeros) points = setup.constant(zeros, "zeros");
    return Weights(layout, setup.constant(codes, "codes"), setup.constant(codes + 1, "scales"),
                   has_zeros ? &points : nullptr);
  }
};

// Weights and bias float [outputs] or [1].
struct Product {
  template <typename Format>
  Product(Format, const Setup& setup, const Attributes& names, size_t codes, size_t zeros)
      : weights(Format::weights(setup, names, codes, zeros)), bias_(floats_of(setup.constant(codes + 2, "bias"))) {
    const size_t outputs = weights.layout.outputs;
    if (bias_.size() == 1 && outputs > 1) bias_.assign(bias_[0] == 0 ? 0 : outputs, bias_[0]);
    if (!bias_.empty() && bias_.size() != outputs)
      throw std::runtime_error("the bias must have one value, or one for each output");
  }

  // Null where there is none.
  const float* bias(size_t block) const { return bias_.empty() ? nullptr : bias_.data() + block * kBlockOutputs; }

  const Weights weights;

 private:
  std::vector<float> bias_;
};

// Threads share the panels.
void quantize_all(const Context& context, Input kind, const float* x, const float* gate, size_t n_rows,
                  const Layout& layout, const Rows& rows) {
  const size_t panels = ceil_div(n_rows, kPanelRows), n_tasks = std::min<size_t>(panels, 16);
  context.parallel(n_tasks, [&](size_t task) {
    const size_t panel = panels * task / n_tasks, first = panel * kPanelRows;
    const size_t end = std::min(n_rows, panels * (task + 1) / n_tasks * kPanelRows);
    quantize(kind, x + first * layout.inputs, gate == nullptr ? nullptr : gate + first * layout.inputs, end - first,
             layout, rows.from(panel, layout));
  });
}

// y [n_rows, outputs]; threads share the outputs.
void multiply_all(const Context& context, const Rows& rows, size_t n_rows, const Product& product, float* y) {
  const Weights& weights = product.weights;
  const Layout& layout = weights.layout;
  const size_t blocks = layout.n_blocks(), n_tasks = std::min<size_t>(blocks, 16);
  const size_t chunk = std::max<size_t>(1, kChunkBytes / layout.panel_bytes()) * kPanelRows;
  const bool streams = n_rows * layout.outputs * sizeof(float) > kStreamedBytes;
  context.parallel(n_tasks, [&](size_t task) {
    const size_t end = blocks * (task + 1) / n_tasks;
    for (size_t row = 0; row < n_rows; row += chunk)
      for (size_t block = blocks * task / n_tasks; block < end; ++block)
        multiply(rows.from(row / kPanelRows, layout), std::min(chunk, n_rows - row), weights, block,
                 weights.codes(std::min(block + 1, end - 1)), product.bias(block),
                 y + row * layout.outputs + block * kBlockOutputs, layout.outputs, streams);
  });
}

// The rows of x, whose last axis must be as wide as the weights expect, and y of the same leading axes.
struct Operands {
  Operands(const Context& context, size_t index, size_t inputs, size_t outputs) {
    const Tensor tensor = context.input(index);
    if (tensor.shape.rank == 0 || static_cast<size_t>(tensor.shape.last()) != inputs)
      throw std::runtime_error("the input's last axis does not fit the weights");
    Shape shape = tensor.shape;
    shape.sizes[shape.rank - 1] = static_cast<int64_t>(outputs);
    x = tensor.as<float>();
    y = context.output(0, shape);
    n_rows = static_cast<size_t>(tensor.shape.count()) / inputs;
  }

  const float* x;
  float* y;
  size_t n_rows;
};

// Inputs: [gate,] x float [..., inputs], codes, scales, bias, zeros.
template <typename Format, Input kind>
class Linear {
 public:
  static constexpr size_t kFirst = kind == Input::kSwiGlu ? 1 : 0;  // position of x
  static constexpr const char* kName = Format::kLinear[static_cast<size_t>(kind)];
  static constexpr size_t kOptional = Format::kZerosAreOptional ? 1 : 0;
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

  explicit Linear(const Setup& setup)
      : product_(Format(), setup, {"K", "N", "bits", "block_size", "symmetric"}, kFirst + 1, kFirst + 4) {}

  void run(const Context& context) const {
    const Layout& layout = product_.weights.layout;
    const Operands given(context, kFirst, layout.inputs, layout.outputs);
    const Tensor gate = kind == Input::kSwiGlu ? context.input(0) : Tensor();
    if (kind == Input::kSwiGlu && static_cast<size_t>(gate.shape.count()) != given.n_rows * layout.inputs)
      throw std::runtime_error("gate and input differ in shape");
    if (given.n_rows == 0) return;
    static thread_local RowMemory memory;
    const Rows rows = memory.resized(given.n_rows, layout);
    quantize_all(context, kind, given.x, gate.as<float>(), given.n_rows, layout, rows);
    multiply_all(context, rows, given.n_rows, product_, given.y);
  }

 private:
  Product product_;
};

// A feed-forward network: y = down(gelu(up(x))) or down(silu(gate(x)) · up(x)).
//
// Inputs: x float [..., inputs]; codes, scales and bias of [gate,] up and down; then their zeros.
//
// The hidden layer is a few times as wide as the rest. Of many rows, each thread takes a few through all products at
// once, so that the hidden layer stays in its cache; of few rows, threads share the outputs, so that each of them reads
// a part of the weights.
template <typename Format, Input kind>
class Mlp {
 public:
  static constexpr size_t kProducts = kind == Input::kSwiGlu ? 3 : 2;
  static constexpr const char* kName = Format::kMlp[static_cast<size_t>(kind)];
  static constexpr size_t kOptional = Format::kZerosAreOptional ? kProducts : 0;
  static constexpr auto kInputs = [] {
    std::array<int, 1 + 3 * kProducts + Format::kZeros(kProducts)> types{};
    types[0] = ort::kFloat;
    for (size_t i = 0; i < kProducts; ++i) {
      types[1 + 3 * i] = Format::kCodes;
      types[2 + 3 * i] = ort::kAnyType;
      types[3 + 3 * i] = ort::kFloat;
    }
    for (size_t i = 1 + 3 * kProducts; i < types.size(); ++i) types[i] = ort::kUInt8;
    return types;
  }();
  static constexpr int kOutputs[] = {ort::kFloat};

  explicit Mlp(const Setup& setup)
      : up_(Format(), setup, {"K", "M", "up_bits", "up_block_size", "up_symmetric"}, codes(kProducts - 2),
            zeros(kProducts - 2)),
        down_(Format(), setup, {"M", "N", "down_bits", "down_block_size", "down_symmetric"}, codes(kProducts - 1),
              zeros(kProducts - 1)) {
    const Layout &in = up_.weights.layout, &out = down_.weights.layout;
    if constexpr (kind == Input::kSwiGlu) {
      constexpr Attributes names{"K", "M", "gate_bits", "gate_block_size", "gate_symmetric"};
      gate_ = std::make_unique<Product>(Format(), setup, names, codes(0), zeros(0));
      const Layout& gate = gate_->weights.layout;
      if (gate.inputs != in.inputs || gate.outputs != in.outputs || gate.group_quads != in.group_quads)
        throw std::runtime_error("gate and up differ in their sizes or blocks");
    }
    if (in.outputs != out.inputs) throw std::runtime_error("up and down do not fit each other");
  }

  void run(const Context& context) const {
    const Operands given(context, 0, up_.weights.layout.inputs, down_.weights.layout.outputs);
    const size_t panels = ceil_div(given.n_rows, kPanelRows);
    if (panels == 0) return;
    if (panels < kFewPanels) return run_by_outputs(context, given);
    const size_t n_tasks = ceil_div(panels, 2 * kTaskPanels) * 2;
    context.parallel(n_tasks, [&](size_t task) {
      const size_t first = panels * task / n_tasks * kPanelRows;
      const size_t end = std::min(given.n_rows, panels * (task + 1) / n_tasks * kPanelRows);
      run_rows(given.x + first * up_.weights.layout.inputs, end - first,
               given.y + first * down_.weights.layout.outputs);
    });
  }

 private:
  static constexpr size_t codes(size_t product) { return 1 + 3 * product; }
  static constexpr size_t zeros(size_t product) { return 1 + 3 * kProducts + product; }

  void run_by_outputs(const Context& context, const Operands& given) const {
    static thread_local Memory memory;
    const Layout &in = up_.weights.layout, &out = down_.weights.layout;
    const Rows rows = memory.rows.resized(given.n_rows, in);
    quantize_all(context, Input::kPlain, given.x, nullptr, given.n_rows, in, rows);
    float* hidden = memory.hidden.resized(given.n_rows * in.outputs);
    multiply_all(context, rows, given.n_rows, up_, hidden);
    float* gate = nullptr;
    if constexpr (kind == Input::kSwiGlu) {
      gate = memory.gate.resized(given.n_rows * in.outputs);
      multiply_all(context, rows, given.n_rows, *gate_, gate);
    }
    const Rows hidden_rows = memory.hidden_rows.resized(given.n_rows, out);
    quantize_all(context, kind, hidden, gate, given.n_rows, out, hidden_rows);
    multiply_all(context, hidden_rows, given.n_rows, down_, given.y);
  }

  // All products of n rows, on this thread.
  void run_rows(const float* x, size_t n_rows, float* y) const {
    static thread_local Memory memory;
    const Weights &up = up_.weights, &down = down_.weights;
    const size_t width = up.layout.outputs, blocks = up.layout.n_blocks();
    const Rows rows = memory.rows.resized(n_rows, up.layout);
    quantize(Input::kPlain, x, nullptr, n_rows, up.layout, rows);
    float* hidden = memory.hidden.resized(n_rows * width);
    for (size_t block = 0; block < blocks; ++block) {
      float* place = hidden + block * kBlockOutputs;
      const Weights& first = kind == Input::kSwiGlu ? gate_->weights : up;
      const uint8_t* next = block + 1 < blocks ? first.codes(block + 1) : down.codes(0);
      if constexpr (kind == Input::kSwiGlu) {
        float* gate = memory.gate.resized(n_rows * kBlockOutputs);
        multiply(rows, n_rows, first, block, up.codes(block), gate_->bias(block), gate, kBlockOutputs);
        multiply(rows, n_rows, up, block, next, up_.bias(block), place, width);
        apply_gate(gate, kBlockOutputs, n_rows, up.width(block), place, width);
      } else {
        multiply(rows, n_rows, up, block, next, up_.bias(block), place, width);
      }
    }
    const Rows hidden_rows = memory.hidden_rows.resized(n_rows, down.layout);
    const Input then = kind == Input::kGelu ? Input::kGelu : Input::kPlain;
    quantize(then, hidden, nullptr, n_rows, down.layout, hidden_rows);
    for (size_t block = 0; block < down.layout.n_blocks(); ++block) {
      const uint8_t* next = down.codes(std::min(block + 1, down.layout.n_blocks() - 1));
      multiply(hidden_rows, n_rows, down, block, next, down_.bias(block), y + block * kBlockOutputs,
               down.layout.outputs);
    }
  }

  struct Memory {
    RowMemory rows, hidden_rows;
    Scratch<float> hidden, gate;
  };

  std::unique_ptr<Product> gate_;
  Product up_, down_;
};

template <typename Format>
void add_operators(std::vector<const ort::CustomOp*>& list) {
  list.push_back(operator_of<Linear<Format, Input::kPlain>>());
  list.push_back(operator_of<Linear<Format, Input::kGelu>>());
  list.push_back(operator_of<Linear<Format, Input::kSwiGlu>>());
  list.push_back(operator_of<Mlp<Format, Input::kGelu>>());
  list.push_back(operator_of<Mlp<Format, Input::kSwiGlu>>());
}

}  // namespace

std::vector<const ort::CustomOp*> quantized_linear_operators() {
  std::vector<const ort::CustomOp*> list;
  add_operators<RowScales>(list);
  add_operators<BlockScales>(list);
  return list;
}

}  // namespace zreward
