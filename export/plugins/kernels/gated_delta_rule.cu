// The gated delta rule in chunks of 64 tokens.
//
// With S before a chunk, c_i the sum of the logarithms of the decays up to token i, L_ij = beta_i e^(c_i − c_j) k_i ·
// k_j below the diagonal and A_ij = scale e^(c_i − c_j) q_i · k_j on and below it, what the tokens of the chunk write
// is
//
//   D = T (V − e^c K S),  T = (I + L)⁻¹ diag(beta),        so that
//   O = scale e^c Q S + A D,   S ← e^(c_64) S + Σ_i e^(c_64 − c_i) k_i D_iᵀ
//
// (the chunkwise form of Gated Delta Networks, arXiv 2412.06464, with D in one product instead of two). A first kernel
// computes T and A, which do not depend on S, for all chunks at once. A second one takes a head and 32 of its value
// columns through the chunks, which is all that has to happen in order; S stays in its registers, in float32.
//
// Products are made of 16 × 8 × 8 products of TensorFloat-32 numbers (device.h). The order of the terms of a sum is
// free, so a lane takes columns that lie side by side in memory for the two that the instruction gives it: operands
// come from device memory in whole vectors, without a copy in shared memory, and what one product leaves in a lane is
// what the next one wants there. T and A are kept in that form, as lower triangles of 16 × 8 tiles.
//
// float32 operands are split in two TensorFloat-32 numbers and multiplied three times, which leaves 2⁻²² of error.
// Operands of 16 bits are such numbers already; T, A, D and the copy of S that is read are rounded to them.
#include <utility>

#include "checks.h"
#include "device.h"

namespace zreward {

namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 64, kTile = 16, kTiles = kChunk / kTile;
constexpr int kSlice = 32;  // value columns of a block of the second kernel
constexpr int kMaxHead = 256;
constexpr float kLeastDecay = -200.0f;  // e^-200 is zero, and sums of such logarithms stay exact

constexpr int kLaneTile = 128;  // floats of a 16 × 8 tile
constexpr int kTriangle = kTiles * (kTiles + 1) * kLaneTile;

// What the first kernel leaves for each chunk of each value head.
struct Prepared {
  float transform[kTriangle];   // T
  float attention[kTriangle];   // A
  float key_factor[kChunk];     // e^c, over the length of the key
  float query_factor[kChunk];   // scale e^c, over the length of the query
  float update_factor[kChunk];  // e^(c_64 − c), over the length of the key
  float decay;                  // e^(c_64)
  float unused[kChunk - 1];
};

struct Rule {
  zreward_gated_delta_rule_job job;
  Prepared* prepared;  // [batch, value_heads, chunks]
  int chunks;
};

// Tiles of a triangle before those of row tile `tile`, which has 2 (tile + 1).
__device__ constexpr int first_tile(int tile) { return tile * (tile + 1); }

template <typename T>
constexpr int products_of = is_float<T> ? 3 : 1;

// What an operand that is not an input is stored as.
template <int products>
__device__ inline float stored(float value) {
  return products == 1 ? device::round_to_tf32(value) : value;
}

template <int products>
__device__ inline void accumulate(float (&sum)[4], const float (&a)[4], const float (&b)[2]) {
  if constexpr (products == 1) {
    device::multiply_add(sum, a, b);
  } else {
    float a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a_high[i] = device::round_to_tf32(a[i]);
      a_low[i] = device::round_to_tf32(a[i] - a_high[i]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      b_high[i] = device::round_to_tf32(b[i]);
      b_low[i] = device::round_to_tf32(b[i] - b_high[i]);
    }
    device::multiply_add(sum, a_low, b_high);
    device::multiply_add(sum, a_high, b_low);
    device::multiply_add(sum, a_high, b_high);
  }
}

// The tokens of one chunk of one head in a tensor: rows of `width` elements, zero where there is no token or no column.
template <typename T>
struct Rows {
  const T* begin;
  int64_t stride;
  int tokens, width;

  __device__ Vector<T> vector(int token, int column) const {
    return token < tokens && column < width ? load_vector(begin + token * stride + column) : Vector<T>{};
  }
  __device__ Pair<T> pair(int token, int column) const {
    return token < tokens && column < width ? load_pair(begin + token * stride + column) : Pair<T>{};
  }
};

template <typename T>
__device__ Rows<T> rows_of(const void* tensor, int64_t stride, int width, const zreward_gated_delta_rule_job& job,
                           int row, int chunk, int head) {
  const int first = chunk * kChunk;
  const int64_t token = static_cast<int64_t>(row) * job.tokens + first;
  return {static_cast<const T*>(tensor) + token * stride + static_cast<int64_t>(head) * width, stride,
          min(kChunk, job.tokens - first), width};
}

struct PrepareMemory {
  // L below the diagonal, (I + L)⁻¹ transposed above it; its diagonal of ones is not stored.
  static constexpr int stride = kChunk + 4;
  float system[kChunk * stride];
  // c = high + low: differences of neighbours stay exact however far c has fallen.
  float high[kChunk], low[kChunk];
  float beta[kChunk], key_inverse[kChunk], query_inverse[kChunk];

  __device__ float lower(int i, int j) const { return system[i * stride + j]; }
  __device__ float& inverse(int i, int j) { return system[j * stride + i]; }
  __device__ float decay(int from, int to) const { return expf((high[to] - high[from]) + (low[to] - low[from])); }
};

// c, by one warp: lane l has tokens 2l and 2l + 1.
__device__ void sum_decays(const zreward_gated_delta_rule_job& job, int64_t first_gate, int tokens, int lane,
                           PrepareMemory& memory) {
  double parts[2];
  for (int i = 0; i < 2; ++i) {
    const int token = 2 * lane + i;
    float decay = 0.0f;
    if (token < tokens) decay = load_any(job.decay, first_gate + token * job.value_heads, job.decay_type);
    parts[i] = decay < kLeastDecay ? kLeastDecay : decay;  // NaN stays
  }
  double total = parts[0] + parts[1];
  for (int distance = 1; distance < 32; distance *= 2) {
    const double below = device::shuffle_up(total, distance);
    if (lane >= distance) total += below;
  }
  const double sums[2] = {total - parts[1], total};
  for (int i = 0; i < 2; ++i) {
    const auto high = static_cast<float>(sums[i]);
    memory.high[2 * lane + i] = high;
    memory.low[2 * lane + i] = static_cast<float>(sums[i] - high);
  }
}

// (I + L)⁻¹ of the first `tiles` tiles of rows, in place. The blocks on the diagonal come first, four lanes to a
// column; then those below it, further and further away: T_ij = −T_ii Σ_{j ≤ l < i} L_il T_lj.
__device__ void invert(PrepareMemory& memory, int tiles, int thread) {
  const int part = thread % 4, column = thread / 4, base = column / kTile * kTile;
  if (base / kTile < tiles)
    for (int i = base + 1; i < base + kTile; ++i) {
      float sum = 0.0f;
      if (i > column) {
        if (part == column % 4) sum = memory.lower(i, column);
        for (int l = column + 1 + ((part - column - 1) & 3); l < i; l += 4)
          sum += memory.lower(i, l) * memory.inverse(l, column);
      }
      sum += device::shuffle_xor(sum, 1);
      sum += device::shuffle_xor(sum, 2);
      if (i > column && part == i % 4) memory.inverse(i, column) = -sum;  // which the same lane reads
    }
  device::barrier();
  for (int distance = 1; distance < tiles; ++distance) {
    float results[kTiles - 1];
    for (int stage = 0; stage < 2; ++stage) {
#pragma unroll
      for (int block = 0; block < kTiles - 1; ++block) {
        if (block >= tiles - distance) continue;
        const int begin = (block + distance) * kTile, i = begin + thread % kTile, j = block * kTile + thread / kTile;
        float sum;
        if (stage == 0) {
          sum = memory.lower(i, j);
          for (int l = j + 1; l < begin; ++l) sum += memory.lower(i, l) * memory.inverse(l, j);
        } else {
          sum = memory.inverse(i, j);
          for (int l = begin; l < i; ++l) sum += memory.inverse(i, l) * memory.inverse(l, j);
          sum = -sum;
        }
        results[block] = sum;
      }
      device::barrier();
#pragma unroll
      for (int block = 0; block < kTiles - 1; ++block) {
        if (block >= tiles - distance) continue;
        memory.inverse((block + distance) * kTile + thread % kTile, block * kTile + thread / kTile) = results[block];
      }
      device::barrier();
    }
  }
}

// T and A of a chunk of a value head. Warps 0 to 3 multiply the keys with the keys, 4 to 7 the queries with the keys;
// each has 16 rows and the columns up to their diagonal.
template <typename T>
__global__ void __launch_bounds__(kThreads) prepare(const Rule rule) {
  constexpr int products = products_of<T>, width = Vector<T>::size;
  const zreward_gated_delta_rule_job& job = rule.job;
  auto& memory = *reinterpret_cast<PrepareMemory*>(device::shared_memory());
  const int chunk = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y),
            row = static_cast<int>(blockIdx.z);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int tile = warp % kTiles, n_columns = 2 * (tile + 1);
  const bool queries = warp >= kTiles;
  const int key_head = head / (job.value_heads / job.key_heads);
  const Rows<T> keys = rows_of<T>(job.key, job.key_stride, job.key_dim, job, row, chunk, key_head);
  const Rows<T> rows = queries ? rows_of<T>(job.query, job.query_stride, job.key_dim, job, row, chunk, key_head) : keys;
  const int tokens = keys.tokens, tiles = (tokens + kTile - 1) / kTile;
  Prepared& prepared = rule.prepared[(static_cast<int64_t>(row) * job.value_heads + head) * rule.chunks + chunk];
  const int64_t first_gate = (static_cast<int64_t>(row) * job.tokens + chunk * kChunk) * job.value_heads + head;

  if (thread < kChunk)
    memory.beta[thread] =
        thread < tokens ? load_any(job.beta, first_gate + thread * job.value_heads, job.beta_type) : 0.0f;
  if (warp == kTiles) sum_decays(job, first_gate, tokens, lane, memory);

  const int i[2] = {tile * kTile + g, tile * kTile + g + 8};
  float sums[2 * kTiles][4] = {}, squares[2] = {0.0f, 0.0f};
  if (tile < tiles)
    for (int column = width * t; column < job.key_dim + width * t; column += 4 * width) {
      const Vector<T> a[2] = {rows.vector(i[0], column), rows.vector(i[1], column)};
#pragma unroll
      for (int e = 0; e < width; ++e)
        for (int r = 0; r < 2; ++r) squares[r] += a[r][e] * a[r][e];
#pragma unroll
      for (int j = 0; j < 2 * kTiles; ++j) {
        if (j >= n_columns) continue;
        const Vector<T> b = keys.vector(8 * j + g, column);
#pragma unroll
        for (int e = 0; e < width; e += 2)
          accumulate<products>(sums[j], {a[0][e], a[1][e], a[0][e + 1], a[1][e + 1]}, {b[e], b[e + 1]});
      }
    }
  for (int r = 0; r < 2; ++r) {
    squares[r] += device::shuffle_xor(squares[r], 1);
    squares[r] += device::shuffle_xor(squares[r], 2);
    const float inverse = job.key_epsilon > 0.0f ? 1.0f / sqrtf(squares[r] + job.key_epsilon) : 1.0f;
    if (t == 0) (queries ? memory.query_inverse : memory.key_inverse)[i[r]] = inverse;
  }
  device::barrier();

  if (thread < kChunk) {
    const float decay = expf(memory.high[thread] + memory.low[thread]);
    prepared.key_factor[thread] = decay * memory.key_inverse[thread];
    prepared.query_factor[thread] = job.scale * decay * memory.query_inverse[thread];
    prepared.update_factor[thread] = memory.decay(thread, kChunk - 1) * memory.key_inverse[thread];
    if (thread == kChunk - 1) prepared.decay = decay;
  }
  if (tile < tiles) {
    auto* attention = reinterpret_cast<float4*>(prepared.attention) + first_tile(tile) * 32 + lane;
#pragma unroll
    for (int j = 0; j < 2 * kTiles; ++j) {
      if (j >= n_columns) continue;
      float values[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int from = 8 * j + 2 * t + e % 2, to = i[e / 2];
        const float factor = queries ? job.scale * memory.query_inverse[to] : memory.beta[to] * memory.key_inverse[to];
        const bool seen = queries ? from <= to : from < to;
        values[e] = seen ? sums[j][e] * (factor * memory.key_inverse[from] * memory.decay(from, to)) : 0.0f;
        if (!queries && seen) memory.system[to * PrepareMemory::stride + from] = values[e];
        values[e] = stored<products>(values[e]);
      }
      if (queries) attention[j * 32] = {values[0], values[2], values[1], values[3]};
    }
  }
  device::barrier();
  invert(memory, tiles, thread);

  // Row tile `tile`, its columns 8j + 2t and 8j + 2t + 1 to a lane; the tiles of rows are shared by two warps each.
  if (tile >= tiles) return;
  auto* transform = reinterpret_cast<float4*>(prepared.transform) + first_tile(tile) * 32 + lane;
  for (int j = warp / kTiles; j < n_columns; j += 2) {
    float values[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int to = i[e % 2], from = 8 * j + 2 * t + e / 2;
      const float inverse = from < to ? memory.inverse(to, from) : from == to ? 1.0f : 0.0f;
      values[e] = stored<products>(inverse * memory.beta[from]);
    }
    transform[j * 32] = {values[0], values[1], values[2], values[3]};
  }
}

template <int key_dim>
struct ScanMemory {
  // Strides at which the lanes of a warp read operands from 32 different banks.
  static constexpr int stride = kSlice + 4;
  static constexpr int wide_stride = kSlice + 1, float_stride = kSlice + 2;
  float state[key_dim * float_stride];
  float input[kChunk * stride];   // V − e^c K S
  float delta[kChunk * stride];   // D
  float update[kChunk * stride];  // e^(c_64 − c) D, over the length of the key
};

// Two consecutive rows of an operand in shared memory: b of `multiply_add`.
__device__ inline void load_rows(const float* from, int stride, float (&b)[2]) {
  b[0] = from[0];
  b[1] = from[stride];
}

__device__ inline void load_tile(const float* triangle, int index, int lane, float (&a)[4]) {
  const uint4 bits = device::load_constant(reinterpret_cast<const uint4*>(triangle) + index * 32 + lane);
  a[0] = device::float_from_bits(bits.x);
  a[1] = device::float_from_bits(bits.y);
  a[2] = device::float_from_bits(bits.z);
  a[3] = device::float_from_bits(bits.w);
}

// The chunks of a value head in order, for 32 value columns. Of those a warp has 16 for 16 tokens, and of the state all
// for 16 rows, or twice as many.
template <typename T, int max_key_dim>
__global__ void __launch_bounds__(kThreads, 1) scan(const Rule rule) {
  constexpr int products = products_of<T>, width = Vector<T>::size;
  using Memory = ScanMemory<max_key_dim>;
  constexpr int stride = Memory::stride, state_stride = is_float<T> ? Memory::float_stride : Memory::wide_stride;
  constexpr int slabs = max_key_dim / (4 * width);
  constexpr int own_rows = max_key_dim / (8 * kTile), columns = kSlice / 8;  // tiles of the state
  constexpr bool ahead = max_key_dim * sizeof(T) <= 256;                     // keys and queries come a chunk ahead

  const zreward_gated_delta_rule_job& job = rule.job;
  auto& memory = *reinterpret_cast<Memory*>(device::shared_memory());
  const int slice = static_cast<int>(blockIdx.x) * kSlice;
  const int head = static_cast<int>(blockIdx.y), row = static_cast<int>(blockIdx.z);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int key_head = head / (job.value_heads / job.key_heads);
  const int tile = warp % kTiles, half = warp / kTiles * 16;
  const int i[2] = {tile * kTile + g, tile * kTile + g + 8};
  const int64_t matrix = static_cast<int64_t>(job.key_dim) * job.value_dim;

  // The state: rows 16 m + 2g and the next, columns 8 n + 2t and the next, for each of the warp's tiles (m, n).
  float state[own_rows][columns][4];
  auto for_state = [&](auto&& work) {
#pragma unroll
    for (int m = 0; m < own_rows; ++m)
#pragma unroll
      for (int n = 0; n < columns; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) work(kTile * (warp + 8 * m) + 2 * g + r, 8 * n + 2 * t, state[m][n] + 2 * r);
  };
  auto publish_state = [&] {
    for_state([&](int key, int column, const float* values) {
      for (int k = 0; k < 2; ++k) memory.state[key * state_stride + column + k] = stored<products>(values[k]);
    });
  };
  const float* old_state = nullptr;
  if (job.states > 0)
    old_state = job.state + (static_cast<int64_t>(row / (job.batch / job.states)) * job.value_heads + head) * matrix;
  for_state([&](int key, int column, float* values) {
    const bool given = old_state != nullptr && key < job.key_dim && slice + column < job.value_dim;
    for (int k = 0; k < 2; ++k)
      values[k] = given ? old_state[static_cast<int64_t>(key) * job.value_dim + slice + column + k] : 0.0f;
  });
  publish_state();

  // Vectors of the warp's tokens: keys at 0 and 1, queries at 2 and 3.
  Vector<T> fetched[ahead ? slabs : 1][4];
  auto fetch = [&](int chunk, int slab, Vector<T>(&vectors)[4]) {
    const Rows<T> keys = rows_of<T>(job.key, job.key_stride, job.key_dim, job, row, chunk, key_head);
    const Rows<T> queries = rows_of<T>(job.query, job.query_stride, job.key_dim, job, row, chunk, key_head);
    const int column = (4 * slab + t) * width;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      vectors[r] = keys.vector(i[r], column);
      vectors[2 + r] = queries.vector(i[r], column);
    }
  };
  auto fetch_all = [&](int chunk) {
#pragma unroll
    for (int slab = 0; slab < slabs; ++slab) fetch(chunk, slab, fetched[slab]);
  };
  if constexpr (ahead) {
    if (rule.chunks > 0) fetch_all(0);
  }
  device::barrier();

  for (int chunk = 0; chunk < rule.chunks; ++chunk) {
    const Prepared& prepared =
        rule.prepared[(static_cast<int64_t>(row) * job.value_heads + head) * rule.chunks + chunk];
    const Rows<T> keys = rows_of<T>(job.key, job.key_stride, job.key_dim, job, row, chunk, key_head);
    const int tokens = keys.tokens;
    const bool busy = tile * kTile < tokens;
    float output[2][4] = {};

    if (busy) {
      float read[2][4] = {};
#pragma unroll(ahead ? slabs : 1)
      for (int slab = 0; slab < slabs; ++slab) {
        if (4 * slab * width >= job.key_dim) continue;
        if constexpr (!ahead) fetch(chunk, slab, fetched[0]);
        const Vector<T>(&a)[4] = fetched[ahead ? slab : 0];
#pragma unroll
        for (int e = 0; e < width; e += 2)
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            float b[2];
            load_rows(memory.state + (width * (4 * slab + t) + e) * state_stride + half + 8 * n + g, state_stride, b);
            accumulate<products>(read[n], {a[0][e], a[1][e], a[0][e + 1], a[1][e + 1]}, b);
            accumulate<products>(output[n], {a[2][e], a[3][e], a[2][e + 1], a[3][e + 1]}, b);
          }
      }
      const Rows<T> values = rows_of<T>(job.value, job.value_stride, job.value_dim, job, row, chunk, head);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float key_factor = device::load_constant(prepared.key_factor + i[r]);
        const float query_factor = device::load_constant(prepared.query_factor + i[r]);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int column = half + 8 * n + 2 * t;
          const Pair<T> value = values.pair(i[r], slice + column);
          for (int k = 0; k < 2; ++k) {
            const float input = value[k] - key_factor * read[n][2 * r + k];
            memory.input[i[r] * stride + column + k] = stored<products>(input);
            output[n][2 * r + k] *= query_factor;
          }
        }
      }
    }
    if constexpr (ahead) {
      if (chunk + 1 < rule.chunks) fetch_all(chunk + 1);
    }
    device::barrier();

    if (busy) {
      float delta[2][4] = {};
#pragma unroll
      for (int j = 0; j < 2 * kTiles; ++j) {
        if (j >= 2 * (tile + 1)) continue;
        float a[4];
        load_tile(prepared.transform, first_tile(tile) + j, lane, a);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float b[2];
          load_rows(memory.input + (8 * j + 2 * t) * stride + half + 8 * n + g, stride, b);
          accumulate<products>(delta[n], a, b);
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float factor = device::load_constant(prepared.update_factor + i[r]);
#pragma unroll
        for (int n = 0; n < 2; ++n)
          for (int k = 0; k < 2; ++k) {
            const int at = i[r] * stride + half + 8 * n + 2 * t + k;
            memory.delta[at] = stored<products>(delta[n][2 * r + k]);
            memory.update[at] = stored<products>(factor * delta[n][2 * r + k]);
          }
      }
    }
    // The keys of the update, transposed: rows 16 m + 2g and the next, tokens 8 j + 2t and the next.
    Pair<T> transposed[ahead ? own_rows : 1][ahead ? 2 * kTiles : 1][2];
    auto fetch_transposed = [&](int m, int j, Pair<T>(&pairs)[2]) {
      for (int r = 0; r < 2; ++r) pairs[r] = keys.pair(8 * j + 2 * t + r, kTile * (warp + 8 * m) + 2 * g);
    };
    if constexpr (ahead) {
#pragma unroll
      for (int m = 0; m < own_rows; ++m)
#pragma unroll
        for (int j = 0; j < 2 * kTiles; ++j) fetch_transposed(m, j, transposed[m][j]);
    }
    device::barrier();

    if (busy) {
#pragma unroll
      for (int j = 0; j < 2 * kTiles; ++j) {
        if (j >= 2 * (tile + 1)) continue;
        float a[4];
        load_tile(prepared.attention, first_tile(tile) + j, lane, a);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float b[2];
          load_rows(memory.delta + (8 * j + 2 * t) * stride + half + 8 * n + g, stride, b);
          accumulate<products>(output[n], a, b);
        }
      }
      T* to = static_cast<T*>(job.output) +
              (static_cast<int64_t>(row) * job.tokens + chunk * kChunk) * job.value_heads * job.value_dim +
              static_cast<int64_t>(head) * job.value_dim + slice;
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int column = half + 8 * n + 2 * t;
          if (i[r] < tokens && slice + column < job.value_dim)
            store_pair(to + static_cast<int64_t>(i[r]) * job.value_heads * job.value_dim + column, output[n][2 * r],
                       output[n][2 * r + 1]);
        }
    }

    const float decay = device::load_constant(&prepared.decay);
    for_state([&](int, int, float* values) {
      for (int k = 0; k < 2; ++k) values[k] *= decay;
    });
#pragma unroll(ahead ? 2 * kTiles : 1)
    for (int j = 0; j < 2 * kTiles; ++j) {
      if (8 * j >= tokens) continue;
#pragma unroll
      for (int m = 0; m < own_rows; ++m) {
        if (kTile * (warp + 8 * m) >= job.key_dim) continue;
        if constexpr (!ahead) fetch_transposed(m, j, transposed[0][0]);
        const Pair<T>(&a)[2] = transposed[ahead ? m : 0][ahead ? j : 0];
#pragma unroll
        for (int n = 0; n < columns; ++n) {
          float b[2];
          load_rows(memory.update + (8 * j + 2 * t) * stride + 8 * n + g, stride, b);
          accumulate<products>(state[m][n], {a[0][0], a[0][1], a[1][0], a[1][1]}, b);
        }
      }
    }
    if (chunk + 1 < rule.chunks) {
      publish_state();
      device::barrier();
    }
  }

  if (job.new_state == nullptr) return;
  float* new_state = job.new_state + (static_cast<int64_t>(row) * job.value_heads + head) * matrix;
  for_state([&](int key, int column, const float* values) {
    if (key < job.key_dim && slice + column < job.value_dim)
      *reinterpret_cast<float2*>(new_state + static_cast<int64_t>(key) * job.value_dim + slice + column) = {values[0],
                                                                                                            values[1]};
  });
}

int chunks_of(int32_t tokens) { return (tokens + kChunk - 1) / kChunk; }

int check(const zreward_gated_delta_rule_job& job) {
  constexpr int bad = ZREWARD_BAD_ARGUMENT;
  if (job.batch < 0 || job.batch > kMaxBlocks)
    return refuse(bad, "GatedDeltaRule: the batch is %d; 0 to %d are taken", job.batch, kMaxBlocks);
  if (job.tokens < 0) return refuse(bad, "GatedDeltaRule: there are %d tokens", job.tokens);
  if (job.key_heads < 1 || job.value_heads < 1 || job.value_heads > kMaxBlocks || job.value_heads % job.key_heads != 0)
    return refuse(bad, "GatedDeltaRule: %d value heads are no multiple of %d key heads", job.value_heads,
                  job.key_heads);
  for (const auto& [name, dim] : {std::pair{"key_dim", job.key_dim}, {"value_dim", job.value_dim}})
    if (dim < 8 || dim > kMaxHead || dim % 8 != 0)
      return refuse(bad, "GatedDeltaRule: %s is %d; multiples of 8 from 8 to %d are taken", name, dim, kMaxHead);
  if (job.states < 0 || (job.states > 0 && job.batch % job.states != 0))
    return refuse(bad, "GatedDeltaRule: %d states cannot serve a batch of %d rows", job.states, job.batch);
  if (!is_type(job.type) || !is_type(job.decay_type) || !is_type(job.beta_type))
    return refuse(bad, "GatedDeltaRule: types must be float32, float16 or bfloat16");
  if (!(job.key_epsilon >= 0.0f))
    return refuse(bad, "GatedDeltaRule: key_epsilon is %g; it must be at least 0", job.key_epsilon);
  if (job.batch == 0) return ZREWARD_OK;
  const Named states[] = {{"state", job.state}, {"new_state", job.new_state}};
  for (const Named& named : states)
    if (!is_aligned(named.pointer))
      return refuse(bad, "GatedDeltaRule: %s does not begin at a multiple of 16 bytes", named.name);
  if (job.states > 0 && job.state == nullptr) return refuse(bad, "GatedDeltaRule: state is null");
  if (job.tokens == 0) return ZREWARD_OK;
  const std::pair<const char*, int64_t> strides[] = {
      {"query_stride", job.query_stride}, {"key_stride", job.key_stride}, {"value_stride", job.value_stride}};
  for (const auto& [name, stride] : strides)
    if (stride % 8 != 0)
      return refuse(bad, "GatedDeltaRule: %s is %lld; multiples of 8 are taken", name, static_cast<long long>(stride));
  const Named vectors[] = {{"query", job.query},
                           {"key", job.key},
                           {"value", job.value},
                           {"output", job.output},
                           {"workspace", job.workspace}};
  if (const char* name = misplaced(vectors))
    return refuse(bad, "GatedDeltaRule: %s is null or does not begin at a multiple of 16 bytes", name);
  if (job.decay == nullptr || job.beta == nullptr) return refuse(bad, "GatedDeltaRule: decay or beta is null");
  return ZREWARD_OK;
}

template <typename T, int key_dim>
cudaError_t start_scan(const Rule& rule, cudaStream_t stream) {
  const auto& job = rule.job;
  const dim3 grid(static_cast<unsigned>((job.value_dim + kSlice - 1) / kSlice), static_cast<unsigned>(job.value_heads),
                  static_cast<unsigned>(job.batch));
  return device::launch(scan<T, key_dim>, grid, kThreads, sizeof(ScanMemory<key_dim>), stream, rule);
}

template <typename T>
cudaError_t start(const Rule& rule, cudaStream_t stream) {
  const auto& job = rule.job;
  if (rule.chunks > 0) {
    const dim3 grid(static_cast<unsigned>(rule.chunks), static_cast<unsigned>(job.value_heads),
                    static_cast<unsigned>(job.batch));
    const cudaError_t status = device::launch(prepare<T>, grid, kThreads, sizeof(PrepareMemory), stream, rule);
    if (status != cudaSuccess) return status;
  }
  return job.key_dim <= 128 ? start_scan<T, 128>(rule, stream) : start_scan<T, 256>(rule, stream);
}

}  // namespace

}  // namespace zreward

extern "C" size_t zreward_gated_delta_rule_workspace(int32_t batch, int32_t tokens, int32_t value_heads) {
  if (batch <= 0 || tokens <= 0 || value_heads <= 0) return 0;
  return static_cast<size_t>(batch) * static_cast<size_t>(value_heads) *
         static_cast<size_t>(zreward::chunks_of(tokens)) * sizeof(zreward::Prepared);
}

extern "C" int zreward_gated_delta_rule(const struct zreward_gated_delta_rule_job* job, void* stream) {
  using namespace zreward;
  const int status = check(*job);
  if (status != ZREWARD_OK || job->batch == 0) return status;
  const Rule rule{*job, static_cast<Prepared*>(job->workspace), chunks_of(job->tokens)};
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t error = job->type == ZREWARD_FLOAT32   ? start<float>(rule, on)
                            : job->type == ZREWARD_FLOAT16 ? start<Half>(rule, on)
                                                           : start<BFloat16>(rule, on);
  return status_of(error, "GatedDeltaRule");
}
