// The token mixer of a Gated DeltaNet layer, from its projections to the input of its output projection.
//
//   q, k, v = silu(causal depthwise convolution of width 4),  q and k divided by their length
//   decay = exp(−exp(A_log) softplus(a + dt_bias)),  β = sigmoid(b)
//   S ← decay · S,  S ← S + k (β (v − Sᵀ k))ᵀ,  o = Sᵀ q · scale
//   y = RMSNorm(o) · weight · silu(z)
//
// (Gated Delta Networks, arXiv 2412.06464.) The same arithmetic, in standard operators, is the body of the function of
// this name in every graph (export/passes/delta_net.py).
//
// A task is a key head of a sequence with the value heads that read it. It goes through the tokens in blocks, so that
// all that is between projections and output stays in the second cache. The recurrence runs on slices of 32 columns of
// S, which stay in the first cache, and takes two tokens a pass: with S before them,
//
//   d₁ = β₁ (v₁ − a₁ Sᵀ k₁),                       o₁ = a₁ Sᵀ q₁ + (q₁ · k₁) d₁
//   d₂ = β₂ (v₂ − a₁ a₂ Sᵀ k₂ − a₂ (k₂ · k₁) d₁),  o₂ = a₁ a₂ Sᵀ q₂ + a₂ (q₂ · k₁) d₁ + (q₂ · k₂) d₂
//   S ← a₁ a₂ S + a₂ k₁ d₁ᵀ + k₂ d₂ᵀ
//
// for decays a₁ and a₂. They are not multiplied into S but gathered in one factor D, S = D · S'; where D gets small it
// is multiplied in. The update for two tokens and the products of S' with the next two share one pass over it.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "avx512.h"
#include "kernels.h"
#include "op.h"

namespace zreward {

namespace {

constexpr size_t kWidth = 4, kPast = kWidth - 1;
constexpr size_t kSlice = 32;
constexpr size_t kMaxHead = 256;
constexpr size_t kBlock = 64;  // tokens; an even number
constexpr size_t kAhead = 8;   // tokens that are fetched ahead, as the rows of a head lie far apart
constexpr float kSmallFactor = 1e-4f;

struct Sizes {
  size_t batch, tokens, states, key_heads, value_heads, key_dim, value_dim;
  size_t state_of(size_t row) const { return row / (batch / states); }
  size_t group() const { return value_heads / key_heads; }
  size_t values() const { return value_heads * value_dim; }
  size_t channels() const { return 2 * key_heads * key_dim + values(); }
  size_t slices() const { return ceil_div(value_dim, kSlice); }
  size_t slice_floats() const { return key_dim * kSlice; }
};

// What a task remembers of one block of tokens.
struct Block {
  alignas(64) float query[kBlock * kMaxHead], key[kBlock * kMaxHead], value[kBlock * kMaxHead];
  float decay[kBlock], beta[kBlock];
  // q · k of a token with itself and, for the second token of a pair, q and k with the first one's k.
  float agreement[kBlock], earlier_query[kBlock], earlier_key[kBlock];
};

ZREWARD_AVX512_BEGIN
#include "vector_math.h"

// Convolve and activate the channels of one head for the tokens [first, last), and divide them by their length times
// 1 / factor where `factor` is not zero: out [last − first, dim]. x: the head's channels of token 0, rows at a stride.
void convolve(const float* x, size_t stride, size_t first, size_t last, size_t dim, const float* weights,
              size_t weight_stride, const float (*past)[kMaxHead], float epsilon, float factor, float* out) {
  for (size_t t = first; t < last; ++t, out += dim) {
    const float* rows[kWidth];
    for (size_t j = 0; j < kWidth; ++j) rows[j] = t + j < kPast ? past[t + j] : x + (t + j - kPast) * stride;
    __m512 square = _mm512_setzero_ps();
    for (size_t c = 0; c < dim; c += 16) {
      const __mmask16 mask = simd::first(dim - c);
      __m512 sum = _mm512_setzero_ps();
      _mm_prefetch(reinterpret_cast<const char*>(x + (t + kAhead) * stride + c), _MM_HINT_T0);
      for (size_t j = 0; j < kWidth; ++j)
        sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, rows[j] + c),
                              _mm512_maskz_loadu_ps(mask, weights + j * weight_stride + c), sum);
      const __m512 value = simd::silu(sum);
      square = _mm512_fmadd_ps(value, value, square);
      _mm512_mask_storeu_ps(out + c, mask, value);
    }
    if (factor == 0) continue;
    const __m512 scale = _mm512_set1_ps(factor / std::sqrt(_mm512_reduce_add_ps(square) + epsilon));
    for (size_t c = 0; c < dim; c += 16) {
      const __mmask16 mask = simd::first(dim - c);
      _mm512_mask_storeu_ps(out + c, mask, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, out + c), scale));
    }
  }
}

float dot(const float* a, const float* b, size_t n) {
  __m512 sum = _mm512_setzero_ps();
  for (size_t i = 0; i < n; i += 16) {
    const __mmask16 mask = simd::first(n - i);
    sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, a + i), _mm512_maskz_loadu_ps(mask, b + i), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

// Two tokens: keys and queries [key_dim], and the two halves of d that each adds to S'.
struct Pair {
  const float *key[2], *query[2];
  __m512 delta[2][2];
};

// Σ k S' and Σ q S' of two tokens, two halves each.
struct Reading {
  __m512 key[2][2], query[2][2];
};

// Add the deltas of `now` to a slice, if any, and read from it for `next`, if any.
template <bool updates, bool reads>
void pass(float* slice, size_t n, const Pair& now, const Pair& next, Reading& reading) {
  __m512 key00, key01, key10, key11, query00, query01, query10, query11;
  key00 = key01 = key10 = key11 = query00 = query01 = query10 = query11 = _mm512_setzero_ps();
  const __m512 delta00 = now.delta[0][0], delta01 = now.delta[0][1];
  const __m512 delta10 = now.delta[1][0], delta11 = now.delta[1][1];
  const float *first = now.key[0], *second = now.key[1];
  const float *next_key0 = next.key[0], *next_key1 = next.key[1];
  const float *next_query0 = next.query[0], *next_query1 = next.query[1];
  for (size_t i = 0; i < n; ++i, slice += kSlice) {
    __m512 left = _mm512_load_ps(slice), right = _mm512_load_ps(slice + 16);
    if constexpr (updates) {
      const __m512 a = _mm512_set1_ps(first[i]), b = _mm512_set1_ps(second[i]);
      left = _mm512_fmadd_ps(b, delta10, _mm512_fmadd_ps(a, delta00, left));
      right = _mm512_fmadd_ps(b, delta11, _mm512_fmadd_ps(a, delta01, right));
      _mm512_store_ps(slice, left);
      _mm512_store_ps(slice + 16, right);
    }
    if constexpr (reads) {
      const __m512 k0 = _mm512_set1_ps(next_key0[i]), q0 = _mm512_set1_ps(next_query0[i]);
      const __m512 k1 = _mm512_set1_ps(next_key1[i]), q1 = _mm512_set1_ps(next_query1[i]);
      key00 = _mm512_fmadd_ps(k0, left, key00);
      key01 = _mm512_fmadd_ps(k0, right, key01);
      query00 = _mm512_fmadd_ps(q0, left, query00);
      query01 = _mm512_fmadd_ps(q0, right, query01);
      key10 = _mm512_fmadd_ps(k1, left, key10);
      key11 = _mm512_fmadd_ps(k1, right, key11);
      query10 = _mm512_fmadd_ps(q1, left, query10);
      query11 = _mm512_fmadd_ps(q1, right, query11);
    }
  }
  if constexpr (reads) reading = {{{key00, key01}, {key10, key11}}, {{query00, query01}, {query10, query11}}};
}

// The tokens of a block, whose number n_tokens is padded to pairs, on columns [first, first + width) of one head:
// o [n_tokens] rows at a stride. Slice and factor are the state.
void recur(const Block& block, size_t n_tokens, size_t key_dim, size_t value_dim, size_t first, size_t width,
           float* slice, float* factor, float* o, size_t o_stride) {
  const __mmask16 masks[2] = {simd::first(width), width > 16 ? simd::first(width - 16) : __mmask16{0}};
  auto pair_at = [&](size_t t) {
    Pair pair;
    for (size_t i = 0; i < 2; ++i) {
      pair.key[i] = block.key + (t + i) * key_dim;
      pair.query[i] = block.query + (t + i) * key_dim;
    }
    return pair;
  };
  Pair now = pair_at(0);
  Reading reading;
  pass<false, true>(slice, key_dim, now, now, reading);
  for (size_t t = 0; t < n_tokens; t += 2) {
    const float once = *factor * block.decay[t], decay = block.decay[t + 1], twice = once * decay;
    float next_factor = twice;
    if (!(twice >= kSmallFactor)) {  // multiply what is gathered into S'
      const __m512 scale = _mm512_set1_ps(twice);
      for (size_t i = 0; i < key_dim * kSlice; i += 16)
        _mm512_store_ps(slice + i, _mm512_mul_ps(_mm512_load_ps(slice + i), scale));
      next_factor = 1;
    }
    const __m512 old0 = _mm512_set1_ps(once), old1 = _mm512_set1_ps(twice);
    const __m512 beta0 = _mm512_set1_ps(block.beta[t]), beta1 = _mm512_set1_ps(block.beta[t + 1]);
    const __m512 same0 = _mm512_set1_ps(block.agreement[t]), same1 = _mm512_set1_ps(block.agreement[t + 1]);
    const __m512 other_key = _mm512_set1_ps(decay * block.earlier_key[t + 1]);
    const __m512 other_query = _mm512_set1_ps(decay * block.earlier_query[t + 1]);
    const __m512 inverse = _mm512_set1_ps(1 / next_factor), kept = _mm512_set1_ps(decay / next_factor);
    const float* values = block.value + t * value_dim + first;
    for (size_t half = 0; half < 2; ++half) {
      const __m512 v0 = _mm512_maskz_loadu_ps(masks[half], values + 16 * half);
      const __m512 v1 = _mm512_maskz_loadu_ps(masks[half], values + value_dim + 16 * half);
      const __m512 d0 = _mm512_mul_ps(_mm512_fnmadd_ps(old0, reading.key[0][half], v0), beta0);
      const __m512 rest = _mm512_fnmadd_ps(other_key, d0, _mm512_fnmadd_ps(old1, reading.key[1][half], v1));
      const __m512 d1 = _mm512_mul_ps(rest, beta1);
      const __m512 o0 = _mm512_fmadd_ps(same0, d0, _mm512_mul_ps(old0, reading.query[0][half]));
      const __m512 o1 = _mm512_fmadd_ps(
          same1, d1, _mm512_fmadd_ps(other_query, d0, _mm512_mul_ps(old1, reading.query[1][half])));
      _mm512_mask_storeu_ps(o + t * o_stride + 16 * half, masks[half], o0);
      if (t + 1 < n_tokens) _mm512_mask_storeu_ps(o + (t + 1) * o_stride + 16 * half, masks[half], o1);
      now.delta[0][half] = _mm512_mul_ps(d0, kept);
      now.delta[1][half] = _mm512_mul_ps(d1, inverse);
    }
    *factor = next_factor;
    if (t + 2 >= n_tokens) {
      pass<true, false>(slice, key_dim, now, now, reading);
    } else {
      const Pair next = pair_at(t + 2);
      pass<true, true>(slice, key_dim, now, next, reading);
      for (size_t i = 0; i < 2; ++i) now.key[i] = next.key[i];
    }
  }
}

// Columns [first, first + width) of a state [key_dim, value_dim] to a slice, and back, times the factor.
void load_slice(const float* state, size_t key_dim, size_t value_dim, size_t width, float* slice) {
  const __mmask16 left = simd::first(width), right = width > 16 ? simd::first(width - 16) : __mmask16{0};
  for (size_t i = 0; i < key_dim; ++i, state += value_dim, slice += kSlice) {
    _mm512_store_ps(slice, _mm512_maskz_loadu_ps(left, state));
    _mm512_store_ps(slice + 16, _mm512_maskz_loadu_ps(right, state + 16));
  }
}
void store_slice(const float* slice, float factor, size_t key_dim, size_t value_dim, size_t width, float* state) {
  const __mmask16 left = simd::first(width), right = width > 16 ? simd::first(width - 16) : __mmask16{0};
  const __m512 scale = _mm512_set1_ps(factor);
  for (size_t i = 0; i < key_dim; ++i, state += value_dim, slice += kSlice) {
    _mm512_mask_storeu_ps(state, left, _mm512_mul_ps(_mm512_load_ps(slice), scale));
    _mm512_mask_storeu_ps(state + 16, right, _mm512_mul_ps(_mm512_load_ps(slice + 16), scale));
  }
}

// o [dim] → RMSNorm(o) · weight · silu(z), in place.
void gate_and_norm(float* o, const float* z, const float* weight, size_t dim, float epsilon) {
  const float mean = dot(o, o, dim) / static_cast<float>(dim);
  const __m512 scale = _mm512_set1_ps(1 / std::sqrt(mean + epsilon));
  for (size_t c = 0; c < dim; c += 16) {
    const __mmask16 mask = simd::first(dim - c);
    const __m512 normed = _mm512_mul_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, o + c), scale),
                                        _mm512_maskz_loadu_ps(mask, weight + c));
    _mm512_mask_storeu_ps(o + c, mask, _mm512_mul_ps(normed, simd::silu(_mm512_maskz_loadu_ps(mask, z + c))));
  }
}

ZREWARD_AVX512_END

float softplus(float x) { return x > 20 ? x : std::log1p(std::exp(x)); }

class GatedDeltaNet {
 public:
  static constexpr const char* kName = "GatedDeltaNet";
  static constexpr int kInputs[] = {ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat,
                                    ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kInt64};
  static constexpr int kOutputs[] = {ort::kFloat, ort::kFloat, ort::kFloat};

  // Attributes: key_heads, value_heads; scale of the queries; norm_epsilon, key_epsilon.
  explicit GatedDeltaNet(const Setup& setup)
      : key_heads_(setup.integer("key_heads")),
        value_heads_(setup.integer("value_heads")),
        scale_(setup.number("scale")),
        norm_epsilon_(setup.number("norm_epsilon")),
        key_epsilon_(setup.number("key_epsilon")),
        decay_rates_(floats_of(setup.constant(5, "A_log"))),
        dt_bias_(floats_of(setup.constant(6, "dt_bias"))),
        norm_weight_(floats_of(setup.constant(7, "norm_weight"))) {
    const Tensor weight = setup.constant(4, "conv_weight");
    const std::vector<float> given = floats_of(weight);
    channels_ = static_cast<size_t>(weight.shape[0]);
    if (key_heads_ < 1 || value_heads_ < 1 || value_heads_ % key_heads_ != 0)
      throw std::runtime_error("value_heads must be a multiple of key_heads");
    if (weight.shape.last() != kWidth) throw std::runtime_error("the convolution must have width 4");
    const size_t values = value_heads_ * norm_weight_.size();
    if (channels_ <= values || (channels_ - values) % (2 * key_heads_) != 0)
      throw std::runtime_error("the convolution's channels do not fit the heads");
    key_dim_ = (channels_ - values) / (2 * key_heads_);
    if (std::max(key_dim_, norm_weight_.size()) > kMaxHead) throw std::runtime_error("heads are larger than 256");
    if (decay_rates_.size() != static_cast<size_t>(value_heads_) || dt_bias_.size() != decay_rates_.size())
      throw std::runtime_error("A_log and dt_bias must have one value for each value head");
    conv_.resize(given.size());
    for (size_t c = 0; c < channels_; ++c)
      for (size_t j = 0; j < kWidth; ++j) conv_[j * channels_ + c] = given[c * kWidth + j];
    for (float& rate : decay_rates_) rate = -std::exp(rate);
  }

  void run(const Context& context) const {
    const Tensor x = context.input(0), z = context.input(1), b = context.input(2), a = context.input(3);
    const Tensor conv_state = context.input(8), state = context.input(9);
    const Sizes sizes = checked_sizes(x, z, b, a, conv_state, state);
    const auto batch = static_cast<int64_t>(sizes.batch), tokens = static_cast<int64_t>(sizes.tokens);
    float* y = context.output(0, {batch, tokens, static_cast<int64_t>(sizes.values())});
    Shape conv_shape = conv_state.shape, state_shape = state.shape;
    conv_shape.sizes[0] = state_shape.sizes[0] = batch;
    const bool keeps = keeps_states(context.input(10));
    float* new_conv_state = keeps ? context.output(1, conv_shape) : nullptr;
    float* new_state = keeps ? context.output(2, state_shape) : nullptr;
    context.parallel(sizes.batch * sizes.key_heads, [&](size_t task) {
      const size_t row = task / sizes.key_heads, head = task % sizes.key_heads;
      const size_t first_token = row * sizes.tokens, old_row = sizes.state_of(row), channels = sizes.channels();
      const size_t matrix = sizes.key_dim * sizes.value_dim;
      const Sequence sequence{x.as<float>() + first_token * channels,
                              z.as<float>() + first_token * sizes.values(),
                              b.as<float>() + first_token * sizes.value_heads,
                              a.as<float>() + first_token * sizes.value_heads,
                              conv_state.as<float>() + old_row * channels * kPast,
                              state.as<float>() + old_row * sizes.value_heads * matrix,
                              y + first_token * sizes.values(),
                              keeps ? new_conv_state + row * channels * kPast : nullptr,
                              keeps ? new_state + row * sizes.value_heads * matrix : nullptr};
      run_head(sizes, sequence, head);
    });
  }

 private:
  // Where the rows of one sequence begin; the new states are null where nobody reads them.
  struct Sequence {
    const float *x, *z, *b, *a, *conv_state, *state;
    float *y, *new_conv_state, *new_state;
  };

  // All tokens of a key head and its value heads.
  void run_head(const Sizes& sizes, const Sequence& sequence, size_t head) const {
    static thread_local Scratch<Block> block_memory;
    static thread_local Scratch<float> slice_memory, factor_memory;
    const size_t group = sizes.group(), n_slices = group * sizes.slices(), channels = sizes.channels();
    const size_t key_dim = sizes.key_dim, value_dim = sizes.value_dim, matrix = key_dim * value_dim;
    Block& block = *block_memory.resized(1);
    float* slices = slice_memory.resized(n_slices * sizes.slice_floats());
    float* factors = factor_memory.resized(n_slices);
    auto for_slices = [&](size_t g, auto&& work) {
      for (size_t s = 0; s < sizes.slices(); ++s) {
        const size_t index = g * sizes.slices() + s, first = s * kSlice;
        work(slices + index * sizes.slice_floats(), factors + index, first, std::min(kSlice, value_dim - first));
      }
    };
    for (size_t g = 0; g < group; ++g)
      for_slices(g, [&](float* slice, float* factor, size_t first, size_t width) {
        load_slice(sequence.state + (head * group + g) * matrix + first, key_dim, value_dim, width, slice);
        *factor = 1;
      });
    auto convolve_block = [&](size_t channel, size_t dim, size_t first, size_t last, float factor, float* out) {
      float past[kPast][kMaxHead];
      if (first < kPast)
        for (size_t c = 0; c < dim; ++c)
          for (size_t j = 0; j < kPast; ++j) past[j][c] = sequence.conv_state[(channel + c) * kPast + j];
      convolve(sequence.x + channel, channels, first, last, dim, conv_.data() + channel, channels, past,
               key_epsilon_, factor, out);
    };
    const size_t query_channel = head * key_dim, key_channel = (sizes.key_heads + head) * key_dim;
    const size_t value_channel = 2 * sizes.key_heads * key_dim + head * group * value_dim;
    for (size_t start = 0; start < sizes.tokens; start += kBlock) {
      const size_t n = std::min(kBlock, sizes.tokens - start);
      convolve_block(query_channel, key_dim, start, start + n, scale_, block.query);
      convolve_block(key_channel, key_dim, start, start + n, 1.0f, block.key);
      if (n % 2 != 0) {  // a token that changes nothing makes the last pair whole
        std::fill_n(block.query + n * key_dim, key_dim, 0.0f);
        std::fill_n(block.key + n * key_dim, key_dim, 0.0f);
        std::fill_n(block.value + n * value_dim, value_dim, 0.0f);
        block.decay[n] = 1;
        block.beta[n] = block.agreement[n] = block.earlier_key[n] = block.earlier_query[n] = 0;
      }
      for (size_t t = 0; t < n; ++t) {
        const float *query = block.query + t * key_dim, *key = block.key + t * key_dim;
        block.agreement[t] = dot(query, key, key_dim);
        if (t % 2 == 0) continue;
        block.earlier_query[t] = dot(query, key - key_dim, key_dim);
        block.earlier_key[t] = dot(key, key - key_dim, key_dim);
      }
      for (size_t g = 0; g < group; ++g) {
        const size_t value_head = head * group + g;
        convolve_block(value_channel + g * value_dim, value_dim, start, start + n, 0.0f, block.value);
        for (size_t t = 0; t < n; ++t) {
          const size_t at = (start + t) * sizes.value_heads + value_head;
          block.decay[t] = std::exp(decay_rates_[value_head] * softplus(sequence.a[at] + dt_bias_[value_head]));
          block.beta[t] = 1 / (1 + std::exp(-sequence.b[at]));
        }
        float* out = sequence.y + start * sizes.values() + value_head * value_dim;
        for_slices(g, [&](float* slice, float* factor, size_t first, size_t width) {
          recur(block, n, key_dim, value_dim, first, width, slice, factor, out + first, sizes.values());
        });
        const float* z = sequence.z + start * sizes.values() + value_head * value_dim;
        for (size_t t = 0; t < n; ++t)
          gate_and_norm(out + t * sizes.values(), z + t * sizes.values(), norm_weight_.data(), value_dim, norm_epsilon_);
      }
    }
    if (sequence.new_state == nullptr) return;
    for (size_t g = 0; g < group; ++g)
      for_slices(g, [&](float* slice, float* factor, size_t first, size_t width) {
        store_slice(slice, *factor, key_dim, value_dim, width,
                    sequence.new_state + (head * group + g) * matrix + first);
      });
    keep_past(sizes, sequence, query_channel, key_dim);
    keep_past(sizes, sequence, key_channel, key_dim);
    keep_past(sizes, sequence, value_channel, group * value_dim);
  }

  // The last inputs of the convolution of n channels.
  void keep_past(const Sizes& sizes, const Sequence& sequence, size_t channel, size_t n) const {
    for (size_t c = channel; c < channel + n; ++c)
      for (size_t j = 0; j < kPast; ++j) {
        const size_t t = sizes.tokens + j;  // counted from the first of the past
        sequence.new_conv_state[c * kPast + j] =
            t < kPast ? sequence.conv_state[c * kPast + t] : sequence.x[(t - kPast) * sizes.channels() + c];
      }
  }

  Sizes checked_sizes(const Tensor& x, const Tensor& z, const Tensor& b, const Tensor& a, const Tensor& conv_state,
                      const Tensor& state) const {
    if (x.shape.rank != 3 || conv_state.shape.rank != 3 || state.shape.rank != 4)
      throw std::runtime_error("the projections must have three axes, the states three and four");
    const auto key_heads = static_cast<size_t>(key_heads_), value_heads = static_cast<size_t>(value_heads_);
    const Sizes sizes{static_cast<size_t>(x.shape[0]), static_cast<size_t>(x.shape[1]),
                      static_cast<size_t>(state.shape[0]), key_heads, value_heads, key_dim_, norm_weight_.size()};
    if (sizes.states == 0 ? sizes.batch != 0 : sizes.batch % sizes.states != 0)
      throw std::runtime_error("the batch must be a multiple of the number of states");
    const size_t rows = sizes.batch * sizes.tokens;
    auto has = [](const Tensor& tensor, size_t count) { return static_cast<size_t>(tensor.shape.count()) == count; };
    if (!has(x, rows * channels_) || !has(z, rows * sizes.values()) || !has(b, rows * value_heads) ||
        !has(a, rows * value_heads) || !has(conv_state, sizes.states * channels_ * kPast) ||
        !has(state, sizes.states * value_heads * key_dim_ * sizes.value_dim))
      throw std::runtime_error("the shapes of projections and states do not fit each other");
    return sizes;
  }

  int64_t key_heads_, value_heads_;
  float scale_, norm_epsilon_, key_epsilon_;
  std::vector<float> decay_rates_, dt_bias_, norm_weight_, conv_;
  size_t channels_ = 0, key_dim_ = 0;
};

}  // namespace

std::vector<const ort::CustomOp*> delta_net_operators() { return {operator_of<GatedDeltaNet>()}; }

}  // namespace zreward
