// Scalar reference kernels, written so that the compiler vectorises them without -ffast-math.
#include <cstring>
#include <vector>

#include "kernels.h"

namespace {

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Exact for every finite half. Both cases are computed and a mask selects, so loops vectorise; no
// float subnormal arises, so flush-to-zero modes do no harm.
float half_to_float(const uint8_t* bytes) {
  uint16_t half;
  std::memcpy(&half, bytes, sizeof half);
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t normal = (magnitude << 13) + ((127u - 15u) << 23);
  // With the exponent of 2^-14 a subnormal mantissa m reads as 2^-14 + m * 2^-24.
  const uint32_t subnormal = to_bits(from_bits((magnitude << 13) + (113u << 23)) - 0x1p-14f);
  const uint32_t is_subnormal = 0u - static_cast<uint32_t>(magnitude < 0x400u);
  return from_bits(sign | (subnormal & is_subnormal) | (normal & ~is_subnormal));
}

void dequantise_f16(const uint8_t* row, float* __restrict out, int cols) {
  for (int i = 0; i < cols; ++i) out[i] = half_to_float(row + 2 * static_cast<int64_t>(i));
}

void dequantise_q8(const uint8_t* row, float* __restrict out, int cols) {
  const uint8_t* scales = row + cols;
  for (int group = 0; group < cols / GROUP; ++group) {
    const float scale = half_to_float(scales + 2 * group);
    for (int i = 0; i < GROUP; ++i) out[i] = scale * static_cast<int8_t>(row[i]);
    row += GROUP;
    out += GROUP;
  }
}

// One group whose words of 4 bytes lie `word_stride` bytes apart.
template <const int8_t* kCodes>
void dequantise_q4_group(const uint8_t* words, int word_stride, float scale,
                         float* __restrict out) {
  for (int r = 0; r < 4; ++r) {
    uint32_t word;
    std::memcpy(&word, words + r * word_stride, sizeof word);
    for (int b = 0; b < 4; ++b) {
      out[4 * r + b] = scale * kCodes[word >> (8 * b) & 15];
      out[4 * r + b + GROUP / 2] = scale * kCodes[word >> (8 * b + 4) & 15];
    }
  }
}

template <const int8_t* kCodes>
void dequantise_q4(const uint8_t* row, float* __restrict out, int cols) {
  const uint8_t* scales = row + cols / 2;
  const int groups = cols / GROUP;
  for (int tile = 0; tile < groups; tile += TILE_GROUPS) {
    const int tile_groups = groups - tile < TILE_GROUPS ? groups - tile : TILE_GROUPS;
    const uint8_t* nibbles = row + tile * (GROUP / 2);
    for (int g = 0; g < tile_groups; ++g) {
      const float scale = half_to_float(scales + 2 * (tile + g));
      dequantise_q4_group<kCodes>(nibbles + 4 * g, 4 * tile_groups, scale,
                                  out + (tile + g) * GROUP);
    }
  }
}

// The partial sums are independent, which lets the compiler keep them in vector registers.
float dot(const float* __restrict a, const float* __restrict b, int n) {
  constexpr int kLanes = 16;
  float sums[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  }
  float total = 0;
  for (; i < n; ++i) total += a[i] * b[i];
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  }
  return total + sums[0];
}

void axpy(float a, const float* __restrict x, float* __restrict y, int n) {
  for (int i = 0; i < n; ++i) y[i] += a * x[i];
}

int64_t prepared_bytes(int cols) { return cols * static_cast<int64_t>(sizeof(float)); }

void prepare(const float* x, int cols, void* prepared) {
  std::memcpy(prepared, x, prepared_bytes(cols));
}

int64_t sum_floats(int cols) { return cols; }

void add_sum(const float* sum, int cols, float* out) { axpy(1, sum, out, cols); }

using Dequantise = void(const uint8_t* row, float* out, int cols);

const uint8_t* row_of(const Rows* rows, int64_t i) {
  return rows->data + (rows->indices ? rows->indices[i] : i) * rows->stride;
}

template <Dequantise* dequantise>
void dots(const Rows* rows, const void* prepared, int64_t tokens, int cols, float* out,
          int64_t out_stride) {
  const float* x = static_cast<const float*>(prepared);
  std::vector<float> row(cols);
  for (int64_t i = 0; i < rows->count; ++i) {
    dequantise(row_of(rows, i), row.data(), cols);
    for (int64_t t = 0; t < tokens; ++t) {
      out[t * out_stride + i] = dot(row.data(), x + t * cols, cols);
    }
  }
}

template <Dequantise* dequantise>
void axpys(const Rows* rows, const float* coefficients, int64_t stride, int64_t tokens, int cols,
           float* sums) {
  std::vector<float> row(cols);
  for (int64_t i = 0; i < rows->count; ++i) {
    dequantise(row_of(rows, i), row.data(), cols);
    for (int64_t t = 0; t < tokens; ++t) {
      axpy(coefficients[t * stride + i], row.data(), sums + t * cols, cols);
    }
  }
}

void agreements(const Rows* rows, const uint64_t* bits, int words, int32_t* out) {
  for (int64_t i = 0; i < rows->count; ++i) {
    const uint8_t* row = row_of(rows, i);
    out[i] = 0;
    for (int w = 0; w < words; ++w) {
      uint64_t word;
      std::memcpy(&word, row + 8 * w, sizeof word);
      out[i] += __builtin_popcountll(~(word ^ bits[w]));
    }
  }
}

template <Dequantise* dequantise>
constexpr Kernels table() {
  return {dequantise, prepared_bytes,    prepare, dots<dequantise>,
          sum_floats, axpys<dequantise>, add_sum};
}

}  // namespace

extern const KernelSet reference_kernels = {
    {table<dequantise_f16>(), table<dequantise_q8>(), table<dequantise_q4<Q4_CODES>>(),
     table<dequantise_q4<Q4_0_CODES>>()},
    agreements};
