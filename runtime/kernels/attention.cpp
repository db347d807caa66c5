// Attention of the vision tower and of the decoder.
//
// Fourteen queries of one head are worked on at a time. Keys and values of a head are laid out once so that the inner
// loops read them in order. The scores of the fourteen queries lie as [tokens / 16][14][16], where both the softmax and
// the product with the values find them.
//
// Products and sums are float32. Where a layer allows it and the processor has vdpbf16ps, the factors of both products
// are rounded to bfloat16 first, which halves their time; softmax and sums stay float32.
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

size_t padded_tokens(size_t tokens) { return ceil_div(tokens, 2 * kLanes) * 2 * kLanes; }

ZREWARD_AVX512_BEGIN
#include "vector_math.h"

// One over a row's total times its 32 sums, of which `width` are stored.
inline void store_mixed(__m512 left, __m512 right, float total, float* out, size_t width) {
  const __m512 inverse = _mm512_set1_ps(1 / total);
  const __mmask16 mask_left = simd::first(width), mask_right = width > kLanes ? simd::first(width - kLanes) : 0;
  _mm512_mask_storeu_ps(out, mask_left, _mm512_mul_ps(left, inverse));
  _mm512_mask_storeu_ps(out + kLanes, mask_right, _mm512_mul_ps(right, inverse));
}

// One row of scores, of which the first `seen` count, plus `factor` times the mask where it is given; the largest.
inline __m512 mask_scores(float* scores, size_t seen, size_t padded, const float* mask, float factor) {
  __m512 top = _mm512_set1_ps(kNever);
  for (size_t t = 0; t < padded; t += kLanes) {
    float* place = scores + t * kQueries;
    __m512 value = _mm512_load_ps(place);
    if (mask != nullptr || t + kLanes > seen) {
      const __mmask16 valid = t < seen ? simd::first(seen - t) : 0;
      value = _mm512_mask_mov_ps(_mm512_set1_ps(kNever), valid, value);
      if (mask != nullptr)
        value = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(valid, mask + t), _mm512_set1_ps(factor), value);
      _mm512_store_ps(place, value);
    }
    top = _mm512_max_ps(top, value);
  }
  return _mm512_set1_ps(_mm512_reduce_max_ps(top));
}

// x rotated by halves: [x₁ cos − x₂ sin, x₁ sin + x₂ cos] · factor.
void rotate(const float* x, const float* cos, const float* sin, size_t dim, float factor, float* out) {
  const size_t half = dim / 2;
  for (size_t d = 0; d < half; d += 16) {
    const __mmask16 mask = simd::first(half - d);
    const __m512 a = _mm512_maskz_loadu_ps(mask, x + d), b = _mm512_maskz_loadu_ps(mask, x + half + d);
    const __m512 scale = _mm512_set1_ps(factor);
    const __m512 c = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, cos + d), scale);
    const __m512 s = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, sin + d), scale);
    _mm512_mask_storeu_ps(out + d, mask, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
    _mm512_mask_storeu_ps(out + half + d, mask, _mm512_fmadd_ps(a, s, _mm512_mul_ps(b, c)));
  }
}

// Factors in float32: keys [tokens / 16][dim][16], values [dim / 32][tokens][32], queries [dim][14].
struct Float {
  using Word = float;
  static constexpr float kScoreFactor = 1;  // of scores in front of `exponentials`
  static size_t key_rows(size_t dim) { return dim; }
  static size_t value_rows(size_t tokens) { return tokens; }

  static void store_key(float* keys, size_t token, const float* key, size_t dim) {
    float* place = keys + token / kLanes * kLanes * dim + token % kLanes;
    for (size_t d = 0; d < dim; ++d) place[d * kLanes] = key[d];
  }
  static void clear_key(float* keys, size_t token, size_t dim) {
    float* place = keys + token / kLanes * kLanes * dim + token % kLanes;
    for (size_t d = 0; d < dim; ++d) place[d * kLanes] = 0;
  }
  static void store_query(float* queries, size_t r, const float* query, size_t dim) {
    for (size_t d = 0; d < dim; ++d) queries[d * kQueries + r] = query[d];
  }
  // Columns [first, first + width) of the values, of which row(token) tells the place.
  template <typename Row>
  static void store_values(float* part, size_t tokens, const Row& row, size_t first, size_t width) {
    for (size_t t = 0; t < tokens; ++t, part += kPart) {
      std::memcpy(part, row(t) + first, width * sizeof(float));
      std::fill(part + width, part + kPart, 0.0f);
    }
  }

  // Scores of n queries with two groups of sixteen keys, into [2][14][16].
  template <size_t n>
  static void score(const float* queries, const float* keys, size_t dim, float* scores) {
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

  // One row of scores to e^(score − largest), of which the sum is returned.
  static float exponentials(float* scores, size_t seen, size_t padded, const float* mask) {
    const __m512 largest = mask_scores(scores, seen, padded, mask, kScoreFactor);
    __m512 sum = _mm512_setzero_ps();
    for (size_t t = 0; t < padded; t += kLanes) {
      float* place = scores + t * kQueries;
      const __m512 value = simd::exp(_mm512_sub_ps(_mm512_load_ps(place), largest));
      _mm512_store_ps(place, value);
      sum = _mm512_add_ps(sum, value);
    }
    return _mm512_reduce_add_ps(sum);
  }

  // Sums of 32 columns of the values, weighted by n rows of scores; times one over each row's total.
  template <size_t n>
  static void mix(const float* scores, const float* values, size_t tokens, const float* totals, float* out,
                  size_t stride, size_t width) {
    __m512 left[n], right[n];
#pragma GCC unroll 14
    for (size_t r = 0; r < n; ++r) left[r] = right[r] = _mm512_setzero_ps();
    for (size_t start = 0; start < tokens; start += kLanes) {
      const float* group = scores + start * kQueries;
      const size_t count = std::min(kLanes, tokens - start);
      for (size_t t = 0; t < count; ++t, values += kPart) {
        const __m512 a = _mm512_load_ps(values), b = _mm512_load_ps(values + kLanes);
#pragma GCC unroll 14
        for (size_t r = 0; r < n; ++r) {
          const __m512 weight = _mm512_set1_ps(group[r * kLanes + t]);
          left[r] = _mm512_fmadd_ps(weight, a, left[r]);
          right[r] = _mm512_fmadd_ps(weight, b, right[r]);
        }
      }
    }
#pragma GCC unroll 14
    for (size_t r = 0; r < n; ++r) store_mixed(left[r], right[r], totals[r], out + r * stride, width);
  }
};

ZREWARD_AVX512_END

ZREWARD_AVX512_BF16_BEGIN

// Factors in bfloat16, two in a word, which one vdpbf16ps multiplies and adds: keys [tokens / 16][dim / 2][16], values
// [dim / 32][tokens / 2][32], queries [dim / 2][14]. The weights of sixteen tokens take eight words of their sixteen.
struct Bfloat16 {
  using Word = uint32_t;
  static constexpr float kScoreFactor = 1.44269504f;  // scores are powers of two
  static size_t key_rows(size_t dim) { return ceil_div(dim, 2); }
  static size_t value_rows(size_t tokens) { return ceil_div(tokens, 2); }

  // To the nearest, ties to even; a NaN stays one.
  static uint32_t rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
  static uint32_t pair(const float* values, size_t index, size_t n) {
    return rounded(values[index]) | (index + 1 < n ? rounded(values[index + 1]) << 16 : 0);
  }
  static void store_key(uint32_t* keys, size_t token, const float* key, size_t dim) {
    uint32_t* place = keys + token / kLanes * kLanes * key_rows(dim) + token % kLanes;
    for (size_t d = 0; d < dim; d += 2) place[d / 2 * kLanes] = pair(key, d, dim);
  }
  static void clear_key(uint32_t* keys, size_t token, size_t dim) {
    uint32_t* place = keys + token / kLanes * kLanes * key_rows(dim) + token % kLanes;
    for (size_t d = 0; d < key_rows(dim); ++d) place[d * kLanes] = 0;
  }
  static void store_query(uint32_t* queries, size_t r, const float* query, size_t dim) {
    for (size_t d = 0; d < dim; d += 2) queries[d / 2 * kQueries + r] = pair(query, d, dim);
  }
  template <typename Row>
  static void store_values(uint32_t* part, size_t tokens, const Row& row, size_t first, size_t width) {
    auto half = [&](size_t t, size_t d) {
      const __mmask16 mask = t < tokens && d < width ? simd::first(width - d) : __mmask16{0};
      const __m512 values = _mm512_maskz_loadu_ps(mask, row(t < tokens ? t : 0) + first + d);
      return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values));
    };
    for (size_t t = 0; t < tokens; t += 2, part += kPart)
      for (size_t d = 0; d < kPart; d += kLanes)
        _mm512_store_si512(part + d, _mm512_or_si512(half(t, d), _mm512_slli_epi32(half(t + 1, d), 16)));
  }

  // sum += the two products in each lane. Inline for the same reason as in quantized_product.cpp.
  static inline void add_products(__m512& sum, __m512i a, __m512i b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  }
  static inline __m512i broadcast(const void* word) {
    int32_t bits;
    std::memcpy(&bits, word, sizeof bits);
    return _mm512_set1_epi32(bits);
  }

  template <size_t n>
  static void score(const uint32_t* queries, const uint32_t* keys, size_t dim, float* scores) {
    __m512 left[n], right[n];
#pragma GCC unroll 14
    for (size_t r = 0; r < n; ++r) left[r] = right[r] = _mm512_setzero_ps();
    const size_t rows = key_rows(dim);
    const uint32_t* other = keys + rows * kLanes;
    for (size_t d = 0; d < rows; ++d) {
      const __m512i a = _mm512_load_si512(keys + d * kLanes), b = _mm512_load_si512(other + d * kLanes);
#pragma GCC unroll 14
      for (size_t r = 0; r < n; ++r) {
        const __m512i query = broadcast(queries + d * kQueries + r);
        add_products(left[r], query, a);
        add_products(right[r], query, b);
      }
    }
#pragma GCC unroll 14
    for (size_t r = 0; r < n; ++r) {
      _mm512_store_ps(scores + r * kLanes, left[r]);
      _mm512_store_ps(scores + (kQueries + r) * kLanes, right[r]);
    }
  }

  // One row of scores to 2^(score − largest) in bfloat16; their sum before they were rounded.
  static float exponentials(float* scores, size_t seen, size_t padded, const float* mask) {
    const __m512 largest = mask_scores(scores, seen, padded, mask, kScoreFactor);
    __m512 sum = _mm512_setzero_ps();
    for (size_t t = 0; t < padded; t += kLanes) {
      float* place = scores + t * kQueries;
      const __m512 value = simd::exp2_coarse(_mm512_sub_ps(_mm512_load_ps(place), largest));
      _mm256_store_si256(reinterpret_cast<__m256i*>(place), (__m256i)_mm512_cvtneps_pbh(value));
      sum = _mm512_add_ps(sum, value);
    }
    return _mm512_reduce_add_ps(sum);
  }

  template <size_t n>
  static void mix(const float* scores, const uint32_t* values, size_t tokens, const float* totals, float* out,
                  size_t stride, size_t width) {
    __m512 left[n], right[n];
#pragma GCC unroll 14
    for (size_t r = 0; r < n; ++r) left[r] = right[r] = _mm512_setzero_ps();
    for (size_t start = 0; start < tokens; start += kLanes) {
      const float* group = scores + start * kQueries;
      const size_t pairs = ceil_div(std::min(kLanes, tokens - start), 2);
      for (size_t t = 0; t < pairs; ++t, values += kPart) {
        const __m512i a = _mm512_load_si512(values), b = _mm512_load_si512(values + kLanes);
#pragma GCC unroll 14
        for (size_t r = 0; r < n; ++r) {
          const __m512i weight = broadcast(group + r * kLanes + t);
          add_products(left[r], weight, a);
          add_products(right[r], weight, b);
        }
      }
    }
#pragma GCC unroll 14
    for (size_t r = 0; r < n; ++r) store_mixed(left[r], right[r], totals[r], out + r * stride, width);
  }
};

ZREWARD_AVX512_BF16_END

// The functions for 1 … 14 queries.
template <typename Factors>
struct Tables {
  using Word = typename Factors::Word;
  using Score = void (*)(const Word*, const Word*, size_t, float*);
  using Mix = void (*)(const float*, const Word*, size_t, const float*, float*, size_t, size_t);
  template <size_t... n>
  static constexpr std::array<Score, kQueries> scores(std::index_sequence<n...>) {
    return {Factors::template score<n + 1>...};
  }
  template <size_t... n>
  static constexpr std::array<Mix, kQueries> mixes(std::index_sequence<n...>) {
    return {Factors::template mix<n + 1>...};
  }
  static constexpr auto kScore = scores(std::make_index_sequence<kQueries>());
  static constexpr auto kMix = mixes(std::make_index_sequence<kQueries>());
};

// Keys and values of one head as `Factors` lays them out.
template <typename Factors>
struct Head {
  using Word = typename Factors::Word;
  Word* keys;
  Word* values;
  size_t tokens, dim;

  static size_t key_words(size_t tokens, size_t dim) { return padded_tokens(tokens) * Factors::key_rows(dim); }
  static size_t value_words(size_t tokens, size_t dim) {
    return Factors::value_rows(tokens) * ceil_div(dim, kPart) * kPart;
  }
  const Word* key_group(size_t token) const { return keys + token * Factors::key_rows(dim); }
  Word* value_part(size_t d) const { return values + d * Factors::value_rows(tokens); }

  // Lay out all tokens; the arguments tell where the key and the value of a token lie.
  template <typename KeyRow, typename ValueRow>
  void store(const KeyRow& key, const ValueRow& value) const {
    for (size_t token = 0; token < tokens; ++token) Factors::store_key(keys, token, key(token), dim);
    for (size_t d = 0; d < dim; d += kPart)
      Factors::store_values(value_part(d), tokens, value, d, std::min(kPart, dim - d));
    for (size_t token = tokens; token < padded_tokens(tokens); ++token) Factors::clear_key(keys, token, dim);
  }
};

template <typename Factors>
struct Buffers {
  Scratch<typename Factors::Word> keys, values, queries;
  Scratch<float> work;
};

// Memory of one task: the scores of fourteen queries, and one row.
size_t work_floats(size_t tokens, size_t dim) {
  return kQueries * padded_tokens(tokens) + ceil_div(dim, kLanes) * kLanes;
}
template <typename Factors>
size_t query_words(size_t dim) {
  return ceil_div(kQueries * Factors::key_rows(dim), kLanes) * kLanes;
}

// n queries over the first `seen` keys of a head (query r: seen − (n − 1 − r) if causal).
template <typename Factors>
void attend(const typename Factors::Word* queries, size_t n, const Head<Factors>& head, size_t seen, bool is_causal,
            const float* mask, size_t mask_stride, float* scores, float* out, size_t out_stride) {
  const size_t padded = padded_tokens(seen);
  for (size_t t = 0; t < padded; t += 2 * kLanes)
    Tables<Factors>::kScore[n - 1](queries, head.key_group(t), head.dim, scores + t * kQueries);
  float totals[kQueries];
  for (size_t r = 0; r < n; ++r) {
    const size_t visible = is_causal ? seen - (n - 1 - r) : seen;
    totals[r] = Factors::exponentials(scores + r * kLanes, visible, padded, mask ? mask + r * mask_stride : nullptr);
  }
  for (size_t d = 0; d < head.dim; d += kPart)
    Tables<Factors>::kMix[n - 1](scores, head.value_part(d), seen, totals, out + d, out_stride,
                                 std::min(kPart, head.dim - d));
}

bool rounds(const Setup& setup) { return setup.integer("bfloat16", 0) != 0 && has_bfloat16(); }

// Inputs: qkv float [tokens, 3 · heads · dim], cos and sin float [tokens, …, dim / 2]. Every token sees every token.
class RotaryAttention {
 public:
  static constexpr const char* kName = "RotaryAttention";
  static constexpr int kInputs[] = {ort::kFloat, ort::kFloat, ort::kFloat};
  static constexpr int kOutputs[] = {ort::kFloat};

  explicit RotaryAttention(const Setup& setup)
      : heads_(setup.integer("heads")), scale_(setup.number("scale")), rounds_(rounds(setup)) {
    if (heads_ < 1) throw std::runtime_error("there must be at least one head");
  }

  void run(const Context& context) const { rounds_ ? run_in<Bfloat16>(context) : run_in<Float>(context); }

 private:
  template <typename Factors>
  void run_in(const Context& context) const {
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

    static thread_local Buffers<Factors> buffers;
    using Heads = Head<Factors>;
    const size_t key_words = Heads::key_words(tokens, dim), value_words = Heads::value_words(tokens, dim);
    const size_t blocks = ceil_div(tokens, kQueries), work = work_floats(tokens, dim);
    auto* keys = buffers.keys.resized(heads * key_words);
    auto* values = buffers.values.resized(heads * value_words);
    // A share of a head's queries to a task: the work of a task's queries lies in the task's own memory.
    const size_t shares = std::min<size_t>(blocks, 4), n_tasks = heads * shares;
    float* memory = buffers.work.resized(n_tasks * work);
    auto* query_memory = buffers.queries.resized(n_tasks * query_words<Factors>(dim));
    auto head_of = [&](size_t h) { return Heads{keys + h * key_words, values + h * value_words, tokens, dim}; };
    auto rotated = [&](size_t token, size_t part, size_t h, float factor, float* out) {
      rotate(qkv.as<float>() + token * width + part * width / 3 + h * dim, cos.as<float>() + token * dim / 2,
             sin.as<float>() + token * dim / 2, dim, factor, out);
    };
    context.parallel(heads, [&](size_t h) {
      float* row = memory + h * shares * work;
      auto key = [&](size_t token) -> const float* {
        rotated(token, 1, h, 1.0f, row);
        return row;
      };
      auto value = [&](size_t token) { return qkv.as<float>() + token * width + 2 * width / 3 + h * dim; };
      head_of(h).store(key, value);
    });
    context.parallel(n_tasks, [&](size_t task) {
      const size_t h = task / shares, share = task % shares;
      float* row = memory + task * work;
      float* scores = row + ceil_div(dim, kLanes) * kLanes;
      auto* queries = query_memory + task * query_words<Factors>(dim);
      for (size_t block = blocks * share / shares; block < blocks * (share + 1) / shares; ++block) {
        const size_t first = block * kQueries, n = std::min(kQueries, tokens - first);
        for (size_t r = 0; r < n; ++r) {
          rotated(first + r, 0, h, scale_ * Factors::kScoreFactor, row);
          Factors::store_query(queries, r, row, dim);
        }
        attend<Factors>(queries, n, head_of(h), tokens, false, nullptr, 0, scores, y + first * width / 3 + h * dim,
                        width / 3);
      }
    });
  }

  int64_t heads_;
  float scale_;
  bool rounds_;
};

// Inputs: q float [batch, tokens, query_heads · dim], k and v [batch, tokens, heads · dim], mask to be added
// [batch or 1, 1, tokens, past + tokens], past keys and values [states, heads, past, dim], where a state serves
// batch / states consecutive rows, and keep_states. Outputs: y as q, and each row's keys and values with the new ones
// behind unless keep_states is 0. A token sees the past and what stands before it.
class CausalAttention {
 public:
  static constexpr const char* kName = "CausalAttention";
  static constexpr int kInputs[] = {ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat,
                                    ort::kFloat, ort::kFloat, ort::kInt64};
  static constexpr int kOutputs[] = {ort::kFloat, ort::kFloat, ort::kFloat};

  explicit CausalAttention(const Setup& setup)
      : query_heads_(setup.integer("query_heads")),
        heads_(setup.integer("heads")),
        scale_(setup.number("scale")),
        rounds_(rounds(setup)) {
    if (heads_ < 1 || query_heads_ < 1 || query_heads_ % heads_ != 0)
      throw std::runtime_error("query_heads must be a multiple of heads");
  }

  void run(const Context& context) const { rounds_ ? run_in<Bfloat16>(context) : run_in<Float>(context); }

 private:
  template <typename Factors>
  void run_in(const Context& context) const {
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
    const bool keeps = keeps_states(context.input(6));
    float* new_keys = keeps ? context.output(1, present) : nullptr;
    float* new_values = keeps ? context.output(2, present) : nullptr;
    if (batch * tokens == 0) return;

    static thread_local Buffers<Factors> buffers;
    using Heads = Head<Factors>;
    const size_t key_words = Heads::key_words(tokens, dim), value_words = Heads::value_words(tokens, dim);
    const size_t blocks = ceil_div(new_tokens, kQueries), work = work_floats(tokens, dim);
    auto* keys = buffers.keys.resized(batch * heads * key_words);
    auto* values = buffers.values.resized(batch * heads * value_words);
    auto head_of = [&](size_t h) { return Heads{keys + h * key_words, values + h * value_words, tokens, dim}; };
    context.parallel(batch * heads, [&](size_t h) {
      const size_t row = h / heads, column = h % heads * dim;
      const size_t before = (row / rows_of_state * heads + h % heads) * past * dim;
      // Where a token's row lies: in the past, or where the projection left it.
      auto rows_of = [&](const Tensor& old, const Tensor& fresh) {
        return [=, old = old.as<float>() + before, fresh = fresh.as<float>() + row * new_tokens * width + column](
                   size_t t) { return t < past ? old + t * dim : fresh + (t - past) * width; };
      };
      const auto key = rows_of(past_keys, k), value = rows_of(past_values, v);
      if (keeps)
        for (size_t t = 0; t < tokens; ++t) {
          std::memcpy(new_keys + (h * tokens + t) * dim, key(t), dim * sizeof(float));
          std::memcpy(new_values + (h * tokens + t) * dim, value(t), dim * sizeof(float));
        }
      if (new_tokens != 0) head_of(h).store(key, value);
    });

    // Later blocks see more keys, so a task takes every n-th block of a head.
    const size_t shares = std::max<size_t>(1, std::min<size_t>(blocks, 4));
    const size_t n_tasks = new_tokens ? batch * query_heads * shares : 0;
    float* memory = buffers.work.resized(n_tasks * work);
    auto* query_memory = buffers.queries.resized(n_tasks * query_words<Factors>(dim));
    context.parallel(n_tasks, [&](size_t task) {
      const size_t share = task % shares, h = task / shares % query_heads, row = task / shares / query_heads;
      float* scaled = memory + task * work;
      float* scores = scaled + ceil_div(dim, kLanes) * kLanes;
      auto* queries = query_memory + task * query_words<Factors>(dim);
      const float* masks = mask.as<float>() + (one_mask ? 0 : row * new_tokens * tokens);
      for (size_t block = share; block < blocks; block += shares) {
        const size_t first = block * kQueries, n = std::min(kQueries, new_tokens - first);
        for (size_t r = 0; r < n; ++r) {
          const float* query = q.as<float>() + (row * new_tokens + first + r) * q_width + h * dim;
          for (size_t d = 0; d < dim; ++d) scaled[d] = scale_ * Factors::kScoreFactor * query[d];
          Factors::store_query(queries, r, scaled, dim);
        }
        attend<Factors>(queries, n, head_of(row * heads + h / group), past + first + n, true, masks + first * tokens, tokens,
               scores, y + (row * new_tokens + first) * q_width + h * dim, q_width);
      }
    });
  }

  int64_t query_heads_, heads_;
  float scale_;
  bool rounds_;
};

}  // namespace

std::vector<const ort::CustomOp*> attention_operators() {
  return {operator_of<RotaryAttention>(), operator_of<CausalAttention>()};
}

}  // namespace zreward
