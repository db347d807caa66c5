// Attention of the vision tower and of the decoder, exact, in float32.
//
// Fourteen queries of one head are worked on at a time. Keys and values of a head are laid out once so that the inner
// loops read them in order: keys [tokens / 16][dim][16], values [dim / 32][tokens][32]. The scores of the fourteen
// queries lie as [tokens / 16][14][16], where both the softmax and the product with the values find them.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "avx512.h"
#include "kernels.h"
#include "op.h"

namespace zreward {

namespace {

constexpr size_t kQueries = 14, kLanes = 16, kPart = 32;
constexpr float kNever = -std::numeric_limits<float>::infinity();

// Keys and values of one head, laid out as above.
struct Head {
  float* keys;
  float* values;
  size_t tokens, dim;

  static size_t key_floats(size_t tokens, size_t dim) { return ceil_div(tokens, 2 * kLanes) * 2 * kLanes * dim; }
  static size_t value_floats(size_t tokens, size_t dim) { return tokens * ceil_div(dim, kPart) * kPart; }
};

struct Buffers {
  Scratch<float> keys, values, work;
};

void store_key(const Head& head, size_t token, const float* key) {
  float* place = head.keys + token / kLanes * kLanes * head.dim + token % kLanes;
  for (size_t d = 0; d < head.dim; ++d) place[d * kLanes] = key[d];
}

void store_value(const Head& head, size_t token, const float* value) {
  for (size_t d = 0; d < head.dim; d += kPart) {
    float* place = head.values + d * head.tokens + token * kPart;
    const size_t n = std::min(kPart, head.dim - d);
    std::memcpy(place, value + d, n * sizeof(float));
    std::fill(place + n, place + kPart, 0.0f);
  }
}

void clear_padding(const Head& head) {
  for (size_t token = head.tokens; token < ceil_div(head.tokens, 2 * kLanes) * 2 * kLanes; ++token) {
    float* place = head.keys + token / kLanes * kLanes * head.dim + token % kLanes;
    for (size_t d = 0; d < head.dim; ++d) place[d * kLanes] = 0;
  }
}

ZREWARD_AVX512_BEGIN
#include "vector_math.h"

// Scores of n queries, [dim][14], with two groups of sixteen keys, into [2][14][16].
template <size_t n>
void score(const float* queries, const float* keys, size_t dim, float* scores) {
  __m512 left[n], right[n];
#pragma GCC unroll 14
  for (size_t r = 0; r < n; ++r) left[r] = right[r] = _mm512_setzero_ps();
  const float* other = keys + dim * kLanes;
  for (size_t d = 0; d < dim; ++d) {
    const __m512 a = _mm512_load_ps(keys + d * kLanes), b = _mm512_load_ps(other + d * kLanes);
#pragma GCC unroll 14
    for (size_t r = 0; r < n; ++r) {
      const __m512 query = _mm512_set1_ps(queries[d * kQueries + r]);
      left[r] = _mm512_fmadd_ps(query, a, left[r]);
      right[r] = _mm512_fmadd_ps(query, b, right[r]);
    }
  }
#pragma GCC unroll 14
  for (size_t r = 0; r < n; ++r) {
    _mm512_store_ps(scores + r * kLanes, left[r]);
    _mm512_store_ps(scores + (kQueries + r) * kLanes, right[r]);
  }
}

// Sums of 32 columns of the values, weighted by n rows of scores; times one over each row's total.
template <size_t n>
void mix(const float* scores, const float* values, size_t tokens, const float* totals, float* out, size_t stride,
         size_t width) {
  __m512 left[n], right[n];
#pragma GCC unroll 14
  for (size_t r = 0; r < n; ++r) left[r] = right[r] = _mm512_setzero_ps();
  for (size_t start = 0; start < tokens; start += kLanes) {
    const float* group = scores + start * kQueries;
    const size_t count = std::min(kLanes, tokens - start);
    for (size_t t = 0; t < count; ++t) {
      const __m512 a = _mm512_load_ps(values), b = _mm512_load_ps(values + kLanes);
      values += kPart;
#pragma GCC unroll 14
      for (size_t r = 0; r < n; ++r) {
        const __m512 weight = _mm512_set1_ps(group[r * kLanes + t]);
        left[r] = _mm512_fmadd_ps(weight, a, left[r]);
        right[r] = _mm512_fmadd_ps(weight, b, right[r]);
      }
    }
  }
  const __mmask16 mask_left = simd::first(width), mask_right = width > kLanes ? simd::first(width - kLanes) : 0;
#pragma GCC unroll 14
  for (size_t r = 0; r < n; ++r) {
    const __m512 inverse = _mm512_set1_ps(1 / totals[r]);
    _mm512_mask_storeu_ps(out + r * stride, mask_left, _mm512_mul_ps(left[r], inverse));
    _mm512_mask_storeu_ps(out + r * stride + kLanes, mask_right, _mm512_mul_ps(right[r], inverse));
  }
}

// One row of scores to e^(score − largest), of which the sum is returned. The first `seen` keys count, and `mask`
// is added to them where it is given.
float exponentials(float* scores, size_t seen, size_t padded, const float* mask) {
  __m512 top = _mm512_set1_ps(kNever);
  for (size_t t = 0; t < padded; t += kLanes) {
    float* place = scores + t * kQueries;
    const __mmask16 valid = t < seen ? simd::first(seen - t) : 0;
    __m512 value = _mm512_mask_mov_ps(_mm512_set1_ps(kNever), valid, _mm512_load_ps(place));
    if (mask != nullptr) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(valid, mask + t));
    _mm512_store_ps(place, value);
    top = _mm512_max_ps(top, value);
  }
  const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(top));
  __m512 sum = _mm512_setzero_ps();
  for (size_t t = 0; t < padded; t += kLanes) {
    float* place = scores + t * kQueries;
    const __m512 value = simd::exp(_mm512_sub_ps(_mm512_load_ps(place), largest));
    _mm512_store_ps(place, value);
    sum = _mm512_add_ps(sum, value);
  }
  return _mm512_reduce_add_ps(sum);
}

ZREWARD_AVX512_END

using Score = void (*)(const float*, const float*, size_t, float*);
using Mix = void (*)(const float*, const float*, size_t, const float*, float*, size_t, size_t);
template <size_t... n>
constexpr std::array<Score, sizeof...(n)> score_table(std::index_sequence<n...>) {
  return {score<n + 1>...};
}
template <size_t... n>
constexpr std::array<Mix, sizeof...(n)> mix_table(std::index_sequence<n...>) {
  return {mix<n + 1>...};
}
constexpr auto kScore = score_table(std::make_index_sequence<kQueries>());
constexpr auto kMix = mix_table(std::make_index_sequence<kQueries>());

// Scores and queries of fourteen rows and one more row, in whole cache lines.
size_t work_floats(size_t tokens, size_t dim) {
  const size_t floats = kQueries * (ceil_div(tokens, 2 * kLanes) * 2 * kLanes + dim) + dim;
  return ceil_div(floats, kLanes) * kLanes;
}

// n queries, [dim][14] in `queries`, over the first `seen` keys of a head (query r: seen − (n − 1 − r) if causal).
void attend(const float* queries, size_t n, const Head& head, size_t seen, bool is_causal, const float* mask,
            size_t mask_stride, float* scores, float* out, size_t out_stride) {
  const size_t padded = ceil_div(seen, 2 * kLanes) * 2 * kLanes;
  for (size_t t = 0; t < padded; t += 2 * kLanes)
    kScore[n - 1](queries, head.keys + t * head.dim, head.dim, scores + t * kQueries);
  float totals[kQueries];
  for (size_t r = 0; r < n; ++r) {
    const size_t visible = is_causal ? seen - (n - 1 - r) : seen;
    totals[r] = exponentials(scores + r * kLanes, visible, padded, mask ? mask + r * mask_stride : nullptr);
  }
  for (size_t d = 0; d < head.dim; d += kPart)
    kMix[n - 1](scores, head.values + d * head.tokens, seen, totals, out + d, out_stride,
                std::min(kPart, head.dim - d));
}

// Inputs: qkv float [tokens, 3 · heads · dim], cos and sin float [tokens, …, dim / 2]. Every token sees every token.
class RotaryAttention {
 public:
  static constexpr const char* kName = "RotaryAttention";
  static constexpr int kInputs[] = {ort::kFloat, ort::kFloat, ort::kFloat};
  static constexpr int kOutputs[] = {ort::kFloat};

  explicit RotaryAttention(const Setup& setup) : heads_(setup.integer("heads")), scale_(setup.number("scale")) {
    if (heads_ < 1) throw std::runtime_error("there must be at least one head");
  }

  void run(const Context& context) const {
    const Tensor qkv = context.input(0), cos = context.input(1), sin = context.input(2);
    const auto heads = static_cast<size_t>(heads_);
    if (qkv.shape.rank != 2 || qkv.shape[1] % (6 * heads_) != 0)
      throw std::runtime_error("the input must be [tokens, 3 · heads · dim] with an even dim");
    const size_t tokens = static_cast<size_t>(qkv.shape[0]), width = static_cast<size_t>(qkv.shape[1]);
    const size_t dim = width / 3 / heads;
    if (static_cast<size_t>(cos.shape.count()) != tokens * dim / 2 || cos.shape.count() != sin.shape.count())
      throw std::runtime_error("cos and sin must have dim / 2 values for each token");
    float* y = context.output(0, {static_cast<int64_t>(tokens), static_cast<int64_t>(width / 3)});
    if (tokens == 0) return;

    static thread_local Buffers buffers;
    const size_t key_floats = Head::key_floats(tokens, dim), value_floats = Head::value_floats(tokens, dim);
    const size_t blocks = ceil_div(tokens, kQueries), work = work_floats(tokens, dim);
    float* keys = buffers.keys.resized(heads * key_floats);
    float* values = buffers.values.resized(heads * value_floats);
    // A share of a head's queries to a task: the work of a task's queries lies in the task's own memory.
    const size_t shares = std::min<size_t>(blocks, 4), n_tasks = heads * shares;
    float* memory = buffers.work.resized(n_tasks * work);
    auto head_of = [&](size_t h) { return Head{keys + h * key_floats, values + h * value_floats, tokens, dim}; };
    auto rotated = [&](size_t token, size_t part, size_t h, float factor, float* out) {
      const float* x = qkv.as<float>() + token * width + part * width / 3 + h * dim;
      const float *c = cos.as<float>() + token * dim / 2, *s = sin.as<float>() + token * dim / 2;
      for (size_t d = 0; d < dim / 2; ++d) {
        out[d] = factor * (x[d] * c[d] - x[d + dim / 2] * s[d]);
        out[d + dim / 2] = factor * (x[d] * s[d] + x[d + dim / 2] * c[d]);
      }
    };
    context.parallel(heads, [&](size_t h) {
      const Head head = head_of(h);
      float* row = memory + h * shares * work;
      for (size_t token = 0; token < tokens; ++token) {
        rotated(token, 1, h, 1.0f, row);
        store_key(head, token, row);
        store_value(head, token, qkv.as<float>() + token * width + 2 * width / 3 + h * dim);
      }
      clear_padding(head);
    });
    context.parallel(n_tasks, [&](size_t task) {
      const size_t h = task / shares, share = task % shares;
      float* scores = memory + task * work;
      float* queries = scores + kQueries * ceil_div(tokens, 2 * kLanes) * 2 * kLanes;
      float* row = queries + kQueries * dim;
      for (size_t block = blocks * share / shares; block < blocks * (share + 1) / shares; ++block) {
        const size_t first = block * kQueries, n = std::min(kQueries, tokens - first);
        for (size_t r = 0; r < n; ++r) {
          rotated(first + r, 0, h, scale_, row);
          for (size_t d = 0; d < dim; ++d) queries[d * kQueries + r] = row[d];
        }
        attend(queries, n, head_of(h), tokens, false, nullptr, 0, scores, y + first * width / 3 + h * dim, width / 3);
      }
    });
  }

 private:
  int64_t heads_;
  float scale_;
};

// Inputs: q float [batch, tokens, query_heads · dim], k and v [batch, tokens, heads · dim], mask to be added
// [batch or 1, 1, tokens, past + tokens], past keys and values [states, heads, past, dim], where a state serves
// batch / states consecutive rows. Outputs: y as q, and each row's keys and values with the new ones behind. A token
// sees the past and what stands before it.
class CausalAttention {
 public:
  static constexpr const char* kName = "CausalAttention";
  static constexpr int kInputs[] = {ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat};
  static constexpr int kOutputs[] = {ort::kFloat, ort::kFloat, ort::kFloat};

  explicit CausalAttention(const Setup& setup)
      : query_heads_(setup.integer("query_heads")), heads_(setup.integer("heads")), scale_(setup.number("scale")) {
    if (heads_ < 1 || query_heads_ < 1 || query_heads_ % heads_ != 0)
      throw std::runtime_error("query_heads must be a multiple of heads");
  }

  void run(const Context& context) const {
    const Tensor q = context.input(0), k = context.input(1), v = context.input(2), mask = context.input(3);
    const Tensor past_keys = context.input(4), past_values = context.input(5);
    if (q.shape.rank != 3 || past_keys.shape.rank != 4 || mask.shape.rank != 4)
      throw std::runtime_error("q must have three axes, the past and the mask four");
    const size_t batch = q.shape[0], new_tokens = q.shape[1], past = past_keys.shape[2], dim = past_keys.shape[3];
    const size_t heads = heads_, query_heads = query_heads_, group = query_heads / heads;
    const size_t tokens = past + new_tokens, q_width = query_heads * dim, width = heads * dim;
    auto has = [](const Tensor& tensor, size_t count) { return static_cast<size_t>(tensor.shape.count()) == count; };
    const bool one_mask = mask.shape[0] == 1;
    const size_t states = past_keys.shape[0];
    if (states == 0 ? batch != 0 : batch % states != 0)
      throw std::runtime_error("the batch must be a multiple of the number of states");
    const size_t rows_of_state = states ? batch / states : 1;
    if (!has(q, batch * new_tokens * q_width) || !has(k, batch * new_tokens * width) || !has(v, k.shape.count()) ||
        !has(past_keys, states * heads * past * dim) || !has(past_values, states * heads * past * dim) ||
        !has(mask, (one_mask ? 1 : batch) * new_tokens * tokens))
      throw std::runtime_error("the shapes of q, k, v, mask and past do not fit each other");
    Shape present = past_keys.shape;
    present.sizes[0] = static_cast<int64_t>(batch);
    present.sizes[2] = static_cast<int64_t>(tokens);
    float* y = context.output(0, q.shape);
    float* new_keys = context.output(1, present);
    float* new_values = context.output(2, present);
    if (batch * tokens == 0) return;

    static thread_local Buffers buffers;
    const size_t key_floats = Head::key_floats(tokens, dim), value_floats = Head::value_floats(tokens, dim);
    const size_t blocks = ceil_div(new_tokens, kQueries), work = work_floats(tokens, dim);
    float* keys = buffers.keys.resized(batch * heads * key_floats);
    float* values = buffers.values.resized(batch * heads * value_floats);
    auto head_of = [&](size_t h) { return Head{keys + h * key_floats, values + h * value_floats, tokens, dim}; };
    context.parallel(batch * heads, [&](size_t h) {
      const size_t row = h / heads, column = h % heads * dim;
      float *all_keys = new_keys + h * tokens * dim, *all_values = new_values + h * tokens * dim;
      const size_t before = (row / rows_of_state * heads + h % heads) * past * dim;
      std::memcpy(all_keys, past_keys.as<float>() + before, past * dim * sizeof(float));
      std::memcpy(all_values, past_values.as<float>() + before, past * dim * sizeof(float));
      for (size_t t = 0; t < new_tokens; ++t) {
        const size_t at = (row * new_tokens + t) * width + column;
        std::memcpy(all_keys + (past + t) * dim, k.as<float>() + at, dim * sizeof(float));
        std::memcpy(all_values + (past + t) * dim, v.as<float>() + at, dim * sizeof(float));
      }
      if (new_tokens == 0) return;
      const Head head = head_of(h);
      for (size_t t = 0; t < tokens; ++t) {
        store_key(head, t, all_keys + t * dim);
        store_value(head, t, all_values + t * dim);
      }
      clear_padding(head);
    });

    // Later blocks see more keys, so a task takes every n-th block of a head.
    const size_t shares = std::max<size_t>(1, std::min<size_t>(blocks, 4));
    const size_t n_tasks = new_tokens ? batch * query_heads * shares : 0;
    float* memory = buffers.work.resized(n_tasks * work);
    context.parallel(n_tasks, [&](size_t task) {
      const size_t share = task % shares, h = task / shares % query_heads, row = task / shares / query_heads;
      float* scores = memory + task * work;
      float* queries = scores + kQueries * ceil_div(tokens, 2 * kLanes) * 2 * kLanes;
      const float* masks = mask.as<float>() + (one_mask ? 0 : row * new_tokens * tokens);
      for (size_t block = share; block < blocks; block += shares) {
        const size_t first = block * kQueries, n = std::min(kQueries, new_tokens - first);
        for (size_t r = 0; r < n; ++r) {
          const float* query = q.as<float>() + (row * new_tokens + first + r) * q_width + h * dim;
          for (size_t d = 0; d < dim; ++d) queries[d * kQueries + r] = scale_ * query[d];
        }
        attend(queries, n, head_of(row * heads + h / group), past + first + n, true, masks + first * tokens, tokens,
               scores, y + (row * new_tokens + first) * q_width + h * dim, q_width);
      }
    });
  }

 private:
  int64_t query_heads_, heads_;
  float scale_;
};

}  // namespace

std::vector<const ort::CustomOp*> attention_operators() {
  return {operator_of<RotaryAttention>(), operator_of<CausalAttention>()};
}

}  // namespace zreward
