// IEEE half precision, for the key-value cache.
#pragma once

#include <cstdint>
#include <cstring>

// Rounds to nearest, ties to even; what is too large becomes infinite.
inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits >= 0x47800000) return sign | (bits > 0x7f800000 ? 0x7e00 : 0x7c00);
  if (bits < 0x38800000) {  // subnormal: the sum with 1/2 rounds at the right place
    float shifted;
    std::memcpy(&shifted, &bits, sizeof shifted);
    shifted += 0.5f;
    std::memcpy(&bits, &shifted, sizeof bits);
    return sign | static_cast<uint16_t>(bits - 0x3f000000);
  }
  bits += 0xc8000000 + 0xfff + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>(bits >> 13);
}
