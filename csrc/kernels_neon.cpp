// Kernels for ARM's NEON with dot products: the words of kernels_rows.inl.
#include <arm_neon.h>
#include <stdint.h>

#include "kernels.h"

namespace {

using Floats = float32x4_t;
using Ints = int32x4_t;
constexpr int kLanes = 4, kRows = 4, kDotTokens = 2, kAxpyTokens = 4, kWide = 4;

Floats zero() { return vdupq_n_f32(0); }
Floats broadcast(float value) { return vdupq_n_f32(value); }
Floats load(const float* p) { return vld1q_f32(p); }
void store(float* p, Floats v) { vst1q_f32(p, v); }
Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
float sum_of(Floats v) { return vaddvq_f32(v); }

Floats from_halves(const uint8_t* p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
Floats from_halves(const uint8_t* p, int lanes) {
  uint8_t padded[2 * kLanes] = {};
  __builtin_memcpy(padded, p, 2 * (lanes < kLanes ? lanes : kLanes));
  return from_halves(padded);
}
Floats from_bytes(const uint8_t* p) {
  uint32_t bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(bytes)))));
}
Ints load_words(const uint8_t* p, int lanes) {
  if (lanes >= kLanes) return vreinterpretq_s32_u8(vld1q_u8(p));
  uint8_t padded[4 * kLanes] = {};
  __builtin_memcpy(padded, p, 4 * lanes);
  return vreinterpretq_s32_u8(vld1q_u8(padded));
}
Ints load_ints(const void* p) {
  return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p)));
}
Ints low_nibbles(Ints v) {
  return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(v), vdupq_n_u8(15)));
}
Ints high_nibbles(Ints v) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(v), 4)); }

struct Signed {  // both kinds of weights fit a signed byte
  static constexpr bool kWhole = false;
  static Ints first_products(const int32_t* start) { return vld1q_s32(start); }
  static Ints products(Ints sum, Ints w, Ints x, int) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x));
  }
  static Floats total(const Ints (&sums)[2], const Q4Tile&, int) {
    return vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(sums[0], 8), sums[1]));
  }
};
struct Linear : Signed {
  static constexpr int kZero = 8;
  static Ints low(Ints words) { return low_nibbles(words); }
  static Ints high(Ints words) { return high_nibbles(words); }
  // less 8, a nibble is its own bits with the highest one turned, in two's complement
  static Ints expand(Ints words) {
    return veorq_s32(words, vreinterpretq_s32_u8(vdupq_n_u8(0x88)));
  }
  static Floats weight(Ints words, int k) {
    return vcvtq_f32_s32(vshrq_n_s32(vshlq_s32(words, vdupq_n_s32(28 - 4 * k)), 28));
  }
};
struct Coded : Signed {
  static constexpr int kZero = 0;
  struct Expanded {
    Ints of[2];  // the low and the high nibbles' weights, as bytes
  };
  static Ints look_up(Ints nibbles) {
    return vreinterpretq_s32_s8(vqtbl1q_s8(vld1q_s8(Q4_CODES), vreinterpretq_u8_s32(nibbles)));
  }
  static Ints low(Ints words) { return look_up(low_nibbles(words)); }
  static Ints high(Ints words) { return look_up(high_nibbles(words)); }
  static Expanded expand(Ints words) { return {{low(words), high(words)}}; }
  static Floats weight(const Expanded& expanded, int k) {
    const Ints top = vshlq_s32(expanded.of[k % 2], vdupq_n_s32(24 - 4 * (k - k % 2)));
    return vcvtq_f32_s32(vshrq_n_s32(top, 24));
  }
};

#include "kernels_rows.inl"
#include "kernels_simd.inl"

}  // namespace

extern const KernelSet neon_kernels = {{kKernels[0], kKernels[1], kKernels[2], kKernels[3]},
                                       agreements};
