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
// The recurrence runs token by token on slices of 32 columns of S, which stay in the first cache. Decays are not
// multiplied into S but gathered in one factor D, S = D · S'; where D gets small it is multiplied in. A token's update
// and the next token's two products with S' share one pass over it.
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
constexpr float kSmallFactor = 1e-4f;

struct Sizes {
  size_t batch, tokens, states, key_heads, value_heads, key_dim, value_dim;
  size_t state_of(size_t row) const { return row / (batch / states); }
  size_t keys() const { return key_heads * key_dim; }
  size_t values() const { return value_heads * value_dim; }
  size_t channels() const { return 2 * keys() + values(); }
  size_t heads() const { return 2 * key_heads + value_heads; }
  size_t channel_of(size_t head) const {
    return head < 2 * key_heads ? head * key_dim : 2 * keys() + (head - 2 * key_heads) * value_dim;
  }
};

struct Buffers {
  Scratch<float> mixed, decay, beta;
};

ZREWARD_AVX512_BEGIN
#include "vector_math.h"

// Convolve, activate and (q, k) normalize the channels of one head of one sequence: out [tokens, dim].
void convolve_head(const float* x, size_t stride, size_t tokens, size_t dim, const float* weights,
                   size_t weight_stride, const float* state, float* new_state, bool normalize, float epsilon,
                   float factor, float* out) {
  float past[kPast][kMaxHead];
  for (size_t c = 0; c < dim; ++c)
    for (size_t j = 0; j < kPast; ++j) past[j][c] = state[c * kPast + j];
  auto row = [&](ptrdiff_t t) -> const float* { return t < 0 ? past[t + ptrdiff_t{kPast}] : x + t * stride; };
  for (size_t t = 0; t < tokens; ++t) {
    const float* rows[kWidth];
    for (size_t j = 0; j < kWidth; ++j) rows[j] = row(static_cast<ptrdiff_t>(t + j) - ptrdiff_t{kPast});
    __m512 square = _mm512_setzero_ps();
    for (size_t c = 0; c < dim; c += 16) {
      const __mmask16 mask = simd::first(dim - c);
      __m512 sum = _mm512_setzero_ps();
      for (size_t j = 0; j < kWidth; ++j)
        sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, rows[j] + c),
                              _mm512_maskz_loadu_ps(mask, weights + j * weight_stride + c), sum);
      const __m512 value = simd::silu(sum);
      square = _mm512_fmadd_ps(value, value, square);
      _mm512_mask_storeu_ps(out + t * dim + c, mask, value);
    }
    if (!normalize) continue;
    const __m512 scale = _mm512_set1_ps(factor / std::sqrt(_mm512_reduce_add_ps(square) + epsilon));
    for (size_t c = 0; c < dim; c += 16) {
      const __mmask16 mask = simd::first(dim - c);
      float* place = out + t * dim + c;
      _mm512_mask_storeu_ps(place, mask, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, place), scale));
    }
  }
  for (size_t j = 0; j < kPast; ++j) {
    const float* last = row(static_cast<ptrdiff_t>(tokens + j) - ptrdiff_t{kPast});
    for (size_t c = 0; c < dim; ++c) new_state[c * kPast + j] = last[c];
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

// Add k dᵀ to the slice S' and read the next token's Σ k' S' and Σ q' S' from it.
struct Reading {
  __m512 key[2], query[2];
};
Reading update_and_read(float* slice, size_t n, const float* k, __m512 d0, __m512 d1, const float* next_k,
                        const float* next_q) {
  __m512 key0 = _mm512_setzero_ps(), key1 = key0, key2 = key0, key3 = key0;
  __m512 query0 = key0, query1 = key0, query2 = key0, query3 = key0;
  size_t i = 0;
  for (; i + 2 <= n; i += 2, slice += 2 * kSlice) {  // two rows of S', with sums of their own
    const __m512 s0 = _mm512_fmadd_ps(_mm512_set1_ps(k[i]), d0, _mm512_load_ps(slice));
    const __m512 s1 = _mm512_fmadd_ps(_mm512_set1_ps(k[i]), d1, _mm512_load_ps(slice + 16));
    const __m512 s2 = _mm512_fmadd_ps(_mm512_set1_ps(k[i + 1]), d0, _mm512_load_ps(slice + 32));
    const __m512 s3 = _mm512_fmadd_ps(_mm512_set1_ps(k[i + 1]), d1, _mm512_load_ps(slice + 48));
    _mm512_store_ps(slice, s0);
    _mm512_store_ps(slice + 16, s1);
    _mm512_store_ps(slice + 32, s2);
    _mm512_store_ps(slice + 48, s3);
    key0 = _mm512_fmadd_ps(_mm512_set1_ps(next_k[i]), s0, key0);
    key1 = _mm512_fmadd_ps(_mm512_set1_ps(next_k[i]), s1, key1);
    key2 = _mm512_fmadd_ps(_mm512_set1_ps(next_k[i + 1]), s2, key2);
    key3 = _mm512_fmadd_ps(_mm512_set1_ps(next_k[i + 1]), s3, key3);
    query0 = _mm512_fmadd_ps(_mm512_set1_ps(next_q[i]), s0, query0);
    query1 = _mm512_fmadd_ps(_mm512_set1_ps(next_q[i]), s1, query1);
    query2 = _mm512_fmadd_ps(_mm512_set1_ps(next_q[i + 1]), s2, query2);
    query3 = _mm512_fmadd_ps(_mm512_set1_ps(next_q[i + 1]), s3, query3);
  }
  if (i < n) {
    const __m512 s0 = _mm512_fmadd_ps(_mm512_set1_ps(k[i]), d0, _mm512_load_ps(slice));
    const __m512 s1 = _mm512_fmadd_ps(_mm512_set1_ps(k[i]), d1, _mm512_load_ps(slice + 16));
    _mm512_store_ps(slice, s0);
    _mm512_store_ps(slice + 16, s1);
    key0 = _mm512_fmadd_ps(_mm512_set1_ps(next_k[i]), s0, key0);
    key1 = _mm512_fmadd_ps(_mm512_set1_ps(next_k[i]), s1, key1);
    query0 = _mm512_fmadd_ps(_mm512_set1_ps(next_q[i]), s0, query0);
    query1 = _mm512_fmadd_ps(_mm512_set1_ps(next_q[i]), s1, query1);
  }
  return {{_mm512_add_ps(key0, key2), _mm512_add_ps(key1, key3)},
          {_mm512_add_ps(query0, query2), _mm512_add_ps(query1, query3)}};
}

// All tokens of columns [first, first + width) of one head. q, k: [tokens, key_dim]; v, o: [tokens] rows at a stride.
void recur(const Sizes& sizes, const float* q, const float* k, const float* v, const float* decay, const float* beta,
           size_t gate_stride, const float* state, float* new_state, float* o, size_t o_stride, size_t width) {
  alignas(64) float slice[kMaxHead * kSlice];
  static const float zeros[kMaxHead] = {};
  const size_t n = sizes.key_dim, tokens = sizes.tokens;
  const __mmask16 m0 = simd::first(width), m1 = width > 16 ? simd::first(width - 16) : 0;
  for (size_t i = 0; i < n; ++i) {
    _mm512_store_ps(slice + i * kSlice, _mm512_maskz_loadu_ps(m0, state + i * sizes.value_dim));
    _mm512_store_ps(slice + i * kSlice + 16, _mm512_maskz_loadu_ps(m1, state + i * sizes.value_dim + 16));
  }
  float factor = 1;
  if (tokens != 0) {
    Reading read = update_and_read(slice, n, zeros, _mm512_setzero_ps(), _mm512_setzero_ps(), k, q);
    for (size_t t = 0; t < tokens; ++t) {
      const float *key = k + t * n, *query = q + t * n;
      float next = factor * decay[t * gate_stride];
      const float kept = next;
      if (!(next >= kSmallFactor)) {  // multiply what is gathered into S'
        const __m512 scale = _mm512_set1_ps(next);
        for (size_t i = 0; i < n * kSlice; i += 16)
          _mm512_store_ps(slice + i, _mm512_mul_ps(_mm512_load_ps(slice + i), scale));
        next = 1;
      }
      const __m512 old = _mm512_set1_ps(kept), b = _mm512_set1_ps(beta[t * gate_stride]);
      const float* value = v + t * sizes.value_dim;
      const __m512 v0 = _mm512_maskz_loadu_ps(m0, value), v1 = _mm512_maskz_loadu_ps(m1, value + 16);
      const __m512 d0 = _mm512_mul_ps(_mm512_fnmadd_ps(old, read.key[0], v0), b);
      const __m512 d1 = _mm512_mul_ps(_mm512_fnmadd_ps(old, read.key[1], v1), b);
      const __m512 agreement = _mm512_set1_ps(dot(query, key, n));
      _mm512_mask_storeu_ps(o + t * o_stride, m0, _mm512_fmadd_ps(agreement, d0, _mm512_mul_ps(old, read.query[0])));
      _mm512_mask_storeu_ps(o + t * o_stride + 16, m1,
                            _mm512_fmadd_ps(agreement, d1, _mm512_mul_ps(old, read.query[1])));
      const __m512 inverse = _mm512_set1_ps(1 / next);
      const bool is_last = t + 1 == tokens;
      read = update_and_read(slice, n, key, _mm512_mul_ps(d0, inverse), _mm512_mul_ps(d1, inverse),
                             is_last ? zeros : key + n, is_last ? zeros : query + n);
      factor = next;
    }
  }
  const __m512 scale = _mm512_set1_ps(factor);
  for (size_t i = 0; i < n; ++i) {
    _mm512_mask_storeu_ps(new_state + i * sizes.value_dim, m0, _mm512_mul_ps(_mm512_load_ps(slice + i * kSlice), scale));
    _mm512_mask_storeu_ps(new_state + i * sizes.value_dim + 16, m1,
                          _mm512_mul_ps(_mm512_load_ps(slice + i * kSlice + 16), scale));
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
                                    ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat};
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
    float* new_conv_state = context.output(1, conv_shape);
    float* new_state = context.output(2, state_shape);
    if (batch == 0) return;
    static thread_local Buffers buffers;
    float* mixed = buffers.mixed.resized(sizes.batch * sizes.tokens * sizes.channels());
    float* decay = buffers.decay.resized(sizes.batch * sizes.tokens * sizes.value_heads);
    float* beta = buffers.beta.resized(sizes.batch * sizes.tokens * sizes.value_heads);

    // Heads of q, then of k, then of v, each [tokens, dim], for every sequence.
    auto head_offset = [&](size_t row, size_t head) {
      return (row * sizes.channels() + sizes.channel_of(head)) * sizes.tokens;
    };
    context.parallel(sizes.batch * sizes.heads() + 1, [&](size_t task) {
      if (task == sizes.batch * sizes.heads()) return gates(b, a, sizes, decay, beta);
      const size_t row = task / sizes.heads(), head = task % sizes.heads();
      const size_t channel = sizes.channel_of(head);
      const bool is_query = head < sizes.key_heads, is_value = head >= 2 * sizes.key_heads;
      const size_t old_offset = (sizes.state_of(row) * sizes.channels() + channel) * kPast;
      const size_t new_offset = (row * sizes.channels() + channel) * kPast;
      convolve_head(x.as<float>() + row * sizes.tokens * sizes.channels() + channel, sizes.channels(), sizes.tokens,
                    is_value ? sizes.value_dim : sizes.key_dim, conv_.data() + channel, sizes.channels(),
                    conv_state.as<float>() + old_offset, new_conv_state + new_offset, !is_value, key_epsilon_,
                    is_query ? scale_ : 1.0f, mixed + head_offset(row, head));
    });

    const size_t slices = ceil_div(sizes.value_dim, kSlice), group = sizes.value_heads / sizes.key_heads;
    context.parallel(sizes.batch * sizes.value_heads * slices, [&](size_t task) {
      const size_t row = task / (sizes.value_heads * slices), head = task / slices % sizes.value_heads;
      const size_t first = task % slices * kSlice;
      const size_t gate = row * sizes.tokens * sizes.value_heads + head;
      const size_t matrix = sizes.key_dim * sizes.value_dim;
      const size_t old_at = (sizes.state_of(row) * sizes.value_heads + head) * matrix + first;
      const size_t new_at = (row * sizes.value_heads + head) * matrix + first;
      recur(sizes, mixed + head_offset(row, head / group), mixed + head_offset(row, sizes.key_heads + head / group),
            mixed + head_offset(row, 2 * sizes.key_heads + head) + first, decay + gate, beta + gate, sizes.value_heads,
            state.as<float>() + old_at, new_state + new_at,
            y + row * sizes.tokens * sizes.values() + head * sizes.value_dim + first, sizes.values(),
            std::min(kSlice, sizes.value_dim - first));
    });

    const size_t rows = sizes.batch * sizes.tokens, n_tasks = std::min<size_t>(rows, 16);
    context.parallel(n_tasks, [&](size_t task) {
      for (size_t row = rows * task / n_tasks; row < rows * (task + 1) / n_tasks; ++row)
        for (size_t head = 0; head < sizes.value_heads; ++head) {
          const size_t at = row * sizes.values() + head * sizes.value_dim;
          gate_and_norm(y + at, z.as<float>() + at, norm_weight_.data(), sizes.value_dim, norm_epsilon_);
        }
    });
  }

 private:
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

  // decay and β of every token and head, [batch, tokens, heads].
  void gates(const Tensor& b, const Tensor& a, const Sizes& sizes, float* decay, float* beta) const {
    for (size_t i = 0; i < sizes.batch * sizes.tokens * sizes.value_heads; ++i) {
      const size_t head = i % sizes.value_heads;
      decay[i] = std::exp(decay_rates_[head] * softplus(a.as<float>()[i] + dt_bias_[head]));
      beta[i] = 1 / (1 + std::exp(-b.as<float>()[i]));
    }
  }

  int64_t key_heads_, value_heads_;
  float scale_, norm_epsilon_, key_epsilon_;
  std::vector<float> decay_rates_, dt_bias_, norm_weight_, conv_;
  size_t channels_ = 0, key_dim_ = 0;
};

}  // namespace

std::vector<const ort::CustomOp*> delta_net_operators() { return {operator_of<GatedDeltaNet>()}; }

}  // namespace zreward
