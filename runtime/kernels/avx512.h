// Functions between ZREWARD_AVX512_BEGIN and ZREWARD_AVX512_END may use AVX-512 with VNNI, those between
// ZREWARD_AVX512_BF16_BEGIN and ZREWARD_AVX512_BF16_END bfloat16 as well; whoever calls them has asked the processor
// first. Include every header before BEGIN.
#pragma once

#include <immintrin.h>

#define ZREWARD_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define ZREWARD_TARGET(features) \
  ZREWARD_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define ZREWARD_TARGET_END _Pragma("clang attribute pop")
#else
#define ZREWARD_TARGET(features) _Pragma("GCC push_options") ZREWARD_PRAGMA(GCC target(features))
#define ZREWARD_TARGET_END _Pragma("GCC pop_options")
#endif

#define ZREWARD_AVX512_BEGIN ZREWARD_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")
#define ZREWARD_AVX512_END ZREWARD_TARGET_END
#define ZREWARD_AVX512_BF16_BEGIN ZREWARD_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma")
#define ZREWARD_AVX512_BF16_END ZREWARD_TARGET_END
