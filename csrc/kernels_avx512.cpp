// Kernels for AVX-512 with VNNI: the words of kernels_rows.inl. Compiled a second time with VBMI,
// by kernels_avx512vbmi.cpp.
#include <immintrin.h>
#include <stdint.h>

#include "kernels.h"

namespace {

using Floats = __m512;
using Ints = __m512i;
constexpr int kLanes = 16, kRows = 4, kDotTokens = 2, kAxpyTokens = 4, kWide = 4;

Floats zero() { return _mm512_setzero_ps(); }
Floats broadcast(float value) { return _mm512_set1_ps(value); }
Floats load(const float* p) { return _mm512_load_ps(p); }
void store(float* p, Floats v) { _mm512_store_ps(p, v); }
Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
float sum_of(Floats v) { return _mm512_reduce_add_ps(v); }

__mmask16 first(int lanes) {
  return static_cast<__mmask16>(lanes < kLanes ? (1 << lanes) - 1 : 0xffff);
}

Floats from_halves(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
Floats from_halves(const uint8_t* p, int lanes) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(lanes), p));
}
Floats from_bytes(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
Ints load_words(const uint8_t* p, int lanes) { return _mm512_maskz_loadu_epi32(first(lanes), p); }
Ints load_ints(const void* p) { return _mm512_load_si512(p); }
Ints low_nibbles(Ints v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
Ints high_nibbles(Ints v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }
__m128i sixteen(const int8_t* codes) { return _mm_loadu_si128((const __m128i*)codes); }

template <const int8_t* kCodes>
struct Looked {
  static constexpr bool kWhole = false;
  static Ints first_products(const int32_t* start) { return load_ints(start); }
  static Ints products(Ints sum, Ints w, Ints x, int) { return _mm512_dpbusd_epi32(sum, w, x); }
  static Floats total(const Ints (&sums)[2], const Q4Tile&, int) {
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sums[0], 8), sums[1]));
  }
  static Ints expand(Ints words) { return words; }
  // A permutation looks at the low four bits of its index only.
  static Floats weight(Ints words, int k) {
    const Floats weights = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen(kCodes)));
    return _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * k), weights);
  }
};
struct Linear : Looked<Q4_0_CODES> {
  static constexpr int kZero = 8;
  static Ints low(Ints words) { return low_nibbles(words); }
  static Ints high(Ints words) { return high_nibbles(words); }
};
struct Coded : Looked<Q4_CODES> {
  static constexpr int kZero = 128;
  static Ints codes() {
    const __m128i moved = _mm_xor_si128(sixteen(Q4_CODES), _mm_set1_epi8(-128));
    return _mm512_broadcast_i32x4(moved);
  }
#ifdef __AVX512VBMI__
  // A permutation of bytes looks at the low six bits of its index: the codes are there four times.
  static Ints low(Ints words) { return _mm512_permutexvar_epi8(words, codes()); }
  static Ints high(Ints words) {
    return _mm512_permutexvar_epi8(_mm512_srli_epi16(words, 4), codes());
  }
#else
  static Ints low(Ints words) { return _mm512_shuffle_epi8(codes(), low_nibbles(words)); }
  static Ints high(Ints words) { return _mm512_shuffle_epi8(codes(), high_nibbles(words)); }
#endif
};

#include "kernels_rows.inl"
#include "kernels_simd.inl"

}  // namespace

#ifdef __AVX512VBMI__
#define KERNELS avx512vbmi_kernels
#else
#define KERNELS avx512_kernels
#endif
extern const KernelSet KERNELS = {{kKernels[0], kKernels[1], kKernels[2], kKernels[3]}, agreements};
