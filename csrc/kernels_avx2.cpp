// Kernels for AVX2 with FMA and F16C: the words of kernels_rows.inl.
#include <immintrin.h>
#include <stdint.h>

#include "kernels.h"

namespace {

using Floats = __m256;
using Ints = __m256i;
constexpr int kLanes = 8, kRows = 4, kDotTokens = 2, kAxpyTokens = 2, kWide = 4;

Floats zero() { return _mm256_setzero_ps(); }
Floats broadcast(float value) { return _mm256_set1_ps(value); }
Floats load(const float* p) { return _mm256_load_ps(p); }
void store(float* p, Floats v) { _mm256_store_ps(p, v); }
Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
float sum_of(Floats v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

Floats from_halves(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
Floats from_halves(const uint8_t* p, int lanes) {
  if (lanes >= kLanes) return from_halves(p);
  uint8_t padded[2 * kLanes] = {};
  __builtin_memcpy(padded, p, 2 * lanes);
  return from_halves(padded);
}
Floats from_bytes(const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
Ints load_words(const uint8_t* p, int lanes) {
  if (lanes >= kLanes) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_epi32(reinterpret_cast<const int*>(p),
                               _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), places));
}
Ints load_ints(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }
Ints low_nibbles(Ints v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
Ints high_nibbles(Ints v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }

struct Linear {
  static constexpr int kZero = 8;
  static constexpr bool kWhole = false;
  static Ints low(Ints words) { return low_nibbles(words); }
  static Ints high(Ints words) { return high_nibbles(words); }
  // 16 bits hold the sums of a tile: 8 times 2 products of at most 15 * 128.
  static Ints first_products(const int32_t*) { return _mm256_setzero_si256(); }
  static Ints products(Ints sum, Ints w, Ints x, int) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x));
  }
  static Floats total(const Ints (&sums)[2], const Q4Tile& tile, int lane) {
    const Ints high = lane_sums(sums[0], tile.start[0] + lane);
    const Ints low = lane_sums(sums[1], tile.start[1] + lane);
    return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32(high, 8), low));
  }
  static Ints lane_sums(Ints products, const int32_t* start) {
    return _mm256_add_epi32(_mm256_madd_epi16(products, _mm256_set1_epi16(1)), load_ints(start));
  }
  // less 8, a nibble is its own bits with the highest one turned, in two's complement
  static Ints expand(Ints words) {
    return _mm256_xor_si256(words, _mm256_set1_epi8(static_cast<char>(0x88)));
  }
  static Floats weight(Ints words, int k) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, 28 - 4 * k), 28));
  }
};

// Products of two bytes do not fit the 16 bits of maddubs: weights and x are taken as 16 bits.
struct Coded {
  static constexpr int kZero = 128;
  static constexpr bool kWhole = true;
  struct Expanded {
    Ints of[2];  // the low and the high nibbles' weights, as bytes
  };
  static Ints look_up(Ints nibbles, int zero) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(Q4_CODES));
    const __m128i moved = _mm_add_epi8(codes, _mm_set1_epi8(static_cast<char>(zero)));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(moved), nibbles);
  }
  static Ints low(Ints words) { return look_up(low_nibbles(words), kZero); }
  static Ints high(Ints words) { return look_up(high_nibbles(words), kZero); }
  static Ints first_products(const int32_t* start) { return load_ints(start); }
  static Ints products(Ints sum, Ints w, Ints x, int half) {
    const Ints part = half ? _mm256_srli_epi16(w, 8) : _mm256_and_si256(w, _mm256_set1_epi16(0xff));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(part, x));
  }
  static Floats total(const Ints (&sums)[1], const Q4Tile&, int) {
    return _mm256_cvtepi32_ps(sums[0]);
  }
  static Expanded expand(Ints words) {
    return {{look_up(low_nibbles(words), 0), look_up(high_nibbles(words), 0)}};
  }
  static Floats weight(const Expanded& expanded, int k) {
    const Ints top = _mm256_slli_epi32(expanded.of[k % 2], 24 - 4 * (k - k % 2));
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 24));
  }
};

#include "kernels_rows.inl"
#include "kernels_simd.inl"

}  // namespace

extern const KernelSet avx2_kernels = {{kKernels[0], kKernels[1], kKernels[2], kKernels[3]},
                                       agreements};
