// Functions between ZREWARD_AVX512_BEGIN and ZREWARD_AVX512_END may use AVX-512 with VNNI; whoever calls them has asked
// the processor first. Include every header before BEGIN.
#pragma once

#include <immintrin.h>


#if defined(__clang__)
#define ZREWARD_AVX512_BEGIN \
  _Pragma("clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma\"))), apply_to = function)")
#define ZREWARD_AVX512_END _Pragma("clang attribute pop")
#else
#define ZREWARD_AVX512_BEGIN \
  _Pragma("GCC push_options") _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma\")")
#define ZREWARD_AVX512_END _Pragma("GCC pop_options")
#endif
