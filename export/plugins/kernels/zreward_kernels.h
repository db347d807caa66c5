/* CUDA kernels of zreward's three operators, for C and whatever calls C.
 *
 * All tensors are contiguous in row-major order, in device memory, and begin at multiples of 16 bytes. A call puts its
 * work into `stream` and does not wait for it. It returns 0, or a status whose message zreward_last_error() gives on
 * the same thread. Where a call is refused nothing was started. Outputs must not overlap inputs, except where it says
 * so.
 */
#ifndef ZREWARD_KERNELS_H
#define ZREWARD_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define ZREWARD_API __attribute__((visibility("default")))
#else
#define ZREWARD_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define ZREWARD_KERNELS_VERSION 1 /* of the structures below */

enum zreward_type { ZREWARD_FLOAT32 = 0, ZREWARD_FLOAT16 = 1, ZREWARD_BFLOAT16 = 2 };

enum zreward_status {
  ZREWARD_OK = 0,
  ZREWARD_BAD_ARGUMENT = 1, /* a size, type or pointer that the kernels do not take */
  ZREWARD_CUDA_ERROR = 2    /* the driver refused the launch */
};

/* The score head: probabilities q = softmax(rows · (x / √(mean(x²) + epsilon) · norm_weight) / temperature), their
 * mean μ = Σ s q(s) over the bins s, and variance Σ (s − μ)² q(s), in float32. */
struct zreward_rubric_expectation_job {
  int32_t batch, width, bins; /* any batch; width ≥ 1; 1 to 1024 bins */
  int32_t hidden_type, norm_type, rows_type;
  float epsilon;
  const void* hidden;       /* [batch, width] hidden_type */
  const void* norm_weight;  /* [width] norm_type; Qwen's offset of one is already in it */
  const void* rows;         /* [bins, width] rows_type */
  const float* temperature; /* [batch], above zero */
  const float* bin_values;  /* [bins] */
  float* probs;             /* [batch, bins] */
  float* mean;              /* [batch] */
  float* variance;          /* [batch] */
};
ZREWARD_API int zreward_rubric_expectation(const struct zreward_rubric_expectation_job* job, void* stream);

/* The gated delta rule (Gated Delta Networks, arXiv 2412.06464). For the value heads h of a sequence, each with the key
 * head h / (value_heads / key_heads), and from one token to the next,
 *
 *   S ← e^decay S,   S ← S + k (beta (v − Sᵀ k))ᵀ,   o = scale Sᵀ q
 *
 * where q and k are first divided by √(Σ x² + key_epsilon) if key_epsilon is above zero. Sums are in float32; float32
 * tensors are multiplied as the sum of two TensorFloat-32 numbers, the others with their own digits.
 *
 * States serve rows: with n states for B rows, state i belongs to rows i B/n to (i + 1) B/n − 1. new_state may be
 * state where there are as many states as rows. */
struct zreward_gated_delta_rule_job {
  int32_t batch, tokens;          /* any */
  int32_t key_heads, value_heads; /* value_heads is a multiple of key_heads */
  int32_t key_dim, value_dim;     /* of a head: 8 to 256, multiples of 8 */
  int32_t states;                 /* a divisor of batch; 0: all states are zero */
  int32_t type, decay_type, beta_type;
  float scale, key_epsilon;
  int64_t query_stride, key_stride, value_stride; /* elements from one token to the next, multiples of 8 */
  const void* query;                              /* [batch, tokens, key_heads · key_dim] type */
  const void* key;                                /* [batch, tokens, key_heads · key_dim] type */
  const void* value;                              /* [batch, tokens, value_heads · value_dim] type */
  const void* decay;  /* [batch, tokens, value_heads] decay_type, logarithms: at most zero */
  const void* beta;   /* [batch, tokens, value_heads] beta_type */
  const float* state; /* [states, value_heads, key_dim, value_dim], not read if states is 0 */
  void* output;       /* [batch, tokens, value_heads · value_dim] type */
  float* new_state;   /* [batch, value_heads, key_dim, value_dim], or null: not wanted */
  void* workspace;    /* zreward_gated_delta_rule_workspace() bytes */
};
ZREWARD_API size_t zreward_gated_delta_rule_workspace(int32_t batch, int32_t tokens, int32_t value_heads);
ZREWARD_API int zreward_gated_delta_rule(const struct zreward_gated_delta_rule_job* job, void* stream);

/* Causal depthwise convolution over the tokens, y_t = f(Σ_j weight_j x_{t−taps+1+j}), with the inputs before the first
 * token in `state`, oldest first. f is x / (1 + e^−x) where silu is not 0, else nothing. States serve rows as above. */
struct zreward_causal_conv1d_job {
  int32_t batch, tokens; /* any */
  int32_t channels;      /* a multiple of 8 */
  int32_t taps;          /* 2 to 4 */
  int32_t states;        /* a divisor of batch; 0: all states are zero */
  int32_t type, weight_type, state_type;
  int32_t silu;
  const void* input;  /* [batch, tokens, channels] type */
  const void* weight; /* [channels, taps] weight_type */
  const void* state;  /* [states, channels, taps − 1] state_type, not read if states is 0 */
  void* output;       /* [batch, tokens, channels] type */
  void* new_state;    /* [batch, channels, taps − 1] state_type, or null: not wanted */
};
ZREWARD_API int zreward_causal_conv1d(const struct zreward_causal_conv1d_job* job, void* stream);

/* What the last refused call of this thread was refused for; "" before any. */
ZREWARD_API const char* zreward_last_error(void);
ZREWARD_API int zreward_kernels_version(void);

#ifdef __cplusplus
}
#endif

#endif
