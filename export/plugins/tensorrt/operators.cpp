// The three operators: their tables, what sizes they take, and their calls of the kernels.
#include "operator.h"
#include "zreward_kernels.h"

namespace zreward::tensorrt {

namespace {

constexpr double kMostInteger = 1 << 20;

int32_t narrow(int64_t size) { return static_cast<int32_t>(size); }

std::string check_states(const char* name, const Sizes& sizes) {
  if (!sizes.known("nB") || (sizes['n'] > 0 && sizes['B'] % sizes['n'] == 0)) return "";
  return text("%s: %lld states cannot serve %lld rows; the rows must be a multiple of the states", name,
              static_cast<long long>(sizes['n']), static_cast<long long>(sizes['B']));
}

// B rows of hidden width H, n bins.
const Definition rubric_expectation{
    "RubricExpectation",
    {{"hidden", "BH", true},
     {"norm_weight", "H", false},
     {"score_rows", "nH", false},
     {"temperature", "B", false},
     {"bins", "n", false}},
    {{"probs", "Bn", false}, {"mean", "B", false}, {"variance", "B", false}},
    {{"epsilon", false, 0.0, 1.0}}};

class RubricExpectation final : public Operator {
 public:
  using Operator::Operator;
  const Definition& definition() const override { return rubric_expectation; }

  std::string check(const Sizes& sizes) const override {
    if (!sizes.known("n") || (sizes['n'] >= 2 && sizes['n'] <= 32)) return "";
    return text("RubricExpectation: there are %lld bins; 2 to 32 are taken", static_cast<long long>(sizes['n']));
  }

  int run(const Call& call) const override {
    zreward_rubric_expectation_job job{};
    job.batch = narrow(call.sizes['B']);
    job.width = narrow(call.sizes['H']);
    job.bins = narrow(call.sizes['n']);
    job.hidden_type = call.type;
    job.norm_type = job.rows_type = ZREWARD_FLOAT32;
    job.epsilon = value(0).number;
    job.hidden = call.inputs[0];
    job.norm_weight = call.inputs[1];
    job.rows = call.inputs[2];
    job.temperature = static_cast<const float*>(call.inputs[3]);
    job.bin_values = static_cast<const float*>(call.inputs[4]);
    job.probs = static_cast<float*>(call.outputs[0]);
    job.mean = static_cast<float*>(call.outputs[1]);
    job.variance = static_cast<float*>(call.outputs[2]);
    return zreward_rubric_expectation(&job, call.stream);
  }
};

// B rows of S tokens and C channels, W taps of which P = W − 1 reach the past, n states.
const Definition causal_conv1d{"CausalConv1d",
                               {{"x", "BSC", true}, {"weight", "CW", false}, {"state", "nCP", false}},
                               {{"y", "BSC", true}, {"new_state", "BCP", false}},
                               {}};

class CausalConv1d final : public Operator {
 public:
  using Operator::Operator;
  const Definition& definition() const override { return causal_conv1d; }

  std::string check(const Sizes& sizes) const override {
    const auto taps = static_cast<long long>(sizes['W']), past = static_cast<long long>(sizes['P']);
    if (sizes.known("C") && sizes['C'] % 8 != 0)
      return text("CausalConv1d: there are %lld channels; multiples of 8 are taken", static_cast<long long>(sizes['C']));
    if (sizes.known("W") && (taps < 2 || taps > 4))
      return text("CausalConv1d: the kernel has width %lld; 2 to 4 are taken", taps);
    if (sizes.known("WP") && past != taps - 1)
      return text("CausalConv1d: the state holds %lld inputs; a kernel of width %lld needs %lld", past, taps, taps - 1);
    return check_states("CausalConv1d", sizes);
  }

  int run(const Call& call) const override {
    zreward_causal_conv1d_job job{};
    job.batch = narrow(call.sizes['B']);
    job.tokens = narrow(call.sizes['S']);
    job.channels = narrow(call.sizes['C']);
    job.taps = narrow(call.sizes['W']);
    job.states = narrow(call.sizes['n']);
    job.type = call.type;
    job.weight_type = job.state_type = ZREWARD_FLOAT32;
    job.silu = 1;
    job.input = call.inputs[0];
    job.weight = call.inputs[1];
    job.state = call.inputs[2];
    job.output = call.outputs[0];
    job.new_state = call.outputs[1];
    return zreward_causal_conv1d(&job, call.stream);
  }
};

// B rows of S tokens, V value heads, keys of K and values of D elements; Q holds queries, keys and values; n states.
const Definition gated_delta_rule{
    "GatedDeltaRule",
    {{"qkv", "BSQ", true}, {"decay", "BSV", false}, {"beta", "BSV", false}, {"state", "nVKD", false}},
    {{"y", "BSY", true}, {"new_state", "BVKD", false}},
    {{"key_heads", true, 1, kMostInteger},
     {"value_heads", true, 1, kMostInteger},
     {"scale", false, -1e30, 1e30},
     {"key_epsilon", false, 0.0, 1.0}}};

class GatedDeltaRule final : public Operator {
 public:
  using Operator::Operator;
  const Definition& definition() const override { return gated_delta_rule; }
  const char* product(char letter) const override { return letter == 'Y' ? "VD" : ""; }

  std::string check(const Sizes& sizes) const override {
    const long long keys = key_heads(), values = value_heads();
    if (values % keys != 0)
      return text("GatedDeltaRule: value_heads is %lld, which is no multiple of key_heads, %lld", values, keys);
    if (sizes.known("V") && sizes['V'] != values)
      return text("GatedDeltaRule: value_heads is %lld, but state, decay or beta has %lld heads", values,
                  static_cast<long long>(sizes['V']));
    for (const char letter : {'K', 'D'}) {
      const auto size = static_cast<long long>(sizes[letter]);
      if (size != Sizes::kUnknown && (size < 8 || size > 256 || size % 8 != 0))
        return text("GatedDeltaRule: heads of %s have %lld elements; multiples of 8 up to 256 are taken",
                    letter == 'K' ? "keys" : "values", size);
    }
    if (sizes.known("QKD")) {
      const long long expected = 2 * keys * sizes['K'] + values * sizes['D'];
      if (sizes['Q'] != expected)
        return text("GatedDeltaRule: qkv has %lld channels; %lld key heads of %lld and %lld value heads of %lld need %lld",
                    static_cast<long long>(sizes['Q']), keys, static_cast<long long>(sizes['K']), values,
                    static_cast<long long>(sizes['D']), expected);
    }
    return check_states("GatedDeltaRule", sizes);
  }

  size_t workspace(const Sizes& largest) const override {
    return zreward_gated_delta_rule_workspace(narrow(largest['B']), narrow(largest['S']), value_heads());
  }

  int run(const Call& call) const override {
    const int64_t element = call.type == ZREWARD_FLOAT32 ? 4 : 2, keys = key_heads() * call.sizes['K'];
    const auto* qkv = static_cast<const unsigned char*>(call.inputs[0]);
    zreward_gated_delta_rule_job job{};
    job.batch = narrow(call.sizes['B']);
    job.tokens = narrow(call.sizes['S']);
    job.key_heads = key_heads();
    job.value_heads = value_heads();
    job.key_dim = narrow(call.sizes['K']);
    job.value_dim = narrow(call.sizes['D']);
    job.states = narrow(call.sizes['n']);
    job.type = call.type;
    job.decay_type = job.beta_type = ZREWARD_FLOAT32;
    job.scale = value(2).number;
    job.key_epsilon = value(3).number;
    job.query_stride = job.key_stride = job.value_stride = call.sizes['Q'];
    job.query = qkv;
    job.key = qkv + keys * element;
    job.value = qkv + 2 * keys * element;
    job.decay = call.inputs[1];
    job.beta = call.inputs[2];
    job.state = static_cast<const float*>(call.inputs[3]);
    job.output = call.outputs[0];
    job.new_state = static_cast<float*>(call.outputs[1]);
    job.workspace = call.workspace;
    return zreward_gated_delta_rule(&job, call.stream);
  }

 private:
  int32_t key_heads() const { return value(0).integer; }
  int32_t value_heads() const { return value(1).integer; }
};

template <typename Kind>
Operator* make(std::vector<Value> values) {
  return new Kind(std::move(values));
}

}  // namespace

const Entry kRubricExpectation{&rubric_expectation, make<RubricExpectation>};
const Entry kCausalConv1d{&causal_conv1d, make<CausalConv1d>};
const Entry kGatedDeltaRule{&gated_delta_rule, make<GatedDeltaRule>};

}  // namespace zreward::tensorrt
