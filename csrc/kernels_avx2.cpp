// Kernels for AVX2 with FMA and F16C. The twin of kernels_avx512.cpp, which is the one to read
// first.
#include <immintrin.h>
#include <stdint.h>

#include "kernels.h"

namespace {

constexpr int kSideBySide = 4;  // rows of a dot product
constexpr int kLane = 8;        // floats of a register

const uint8_t* row_at(const Rows& rows, int64_t i) {
  return rows.data + (rows.indices ? rows.indices[i] : i) * rows.stride;
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

int smaller(int a, int b) { return a < b ? a : b; }

__m256 load_halves(const void* halves) {
  return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(halves)));
}

__m256 load_bytes(const uint8_t* bytes) {
  const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(packed));
}

// The scales of up to 16 groups, zeros behind.
void load_scales(const uint8_t* halves, int groups, float* out) {
  uint16_t padded[TILE_GROUPS] = {};
  if (groups < TILE_GROUPS) {
    __builtin_memcpy(padded, halves, 2 * groups);
    halves = reinterpret_cast<const uint8_t*>(padded);
  }
  _mm256_store_ps(out, load_halves(halves));
  _mm256_store_ps(out + kLane, load_halves(halves + 2 * kLane));
}

float sum_of(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

void prefetch(const uint8_t* from, int bytes) {
  for (int i = 0; i < bytes; i += 64) _mm_prefetch(from + i, _MM_HINT_T0);
}

template <int N>
struct Group {
  const uint8_t* row[N];
  const uint8_t* next[N];

  Group(const Rows& rows, int64_t i) {
    for (int n = 0; n < N; ++n) {
      row[n] = row_at(rows, i + n);
      next[n] = row_at(rows, i + N + n < rows.count ? i + N + n : i + n);
    }
  }
};

template <typename Many, typename One>
void for_groups(const Rows& rows, Many many, One one) {
  int64_t i = 0;
  for (; i + kSideBySide <= rows.count; i += kSideBySide) many(i);
  for (; i < rows.count; ++i) one(i);
}

// -- x as floats, zeros behind: f16 and q8 -------------------------------------------------------

int64_t prepared_bytes(int cols) { return round_up(cols, GROUP) * sizeof(float); }

void prepare(const float* x, int cols, void* prepared) {
  float* out = static_cast<float*>(prepared);
  for (int c = 0; c < round_up(cols, GROUP); ++c) out[c] = c < cols ? x[c] : 0;
}

int64_t sum_floats(int cols) { return round_up(cols, GROUP); }

void add_sum(const float* sum, int cols, float* out) {
  for (int c = 0; c < cols; ++c) out[c] += sum[c];
}

// -- f16 -----------------------------------------------------------------------------------------

void dequantise_f16(const uint8_t* row, float* out, int cols) {
  int c = 0;
  for (; c + kLane <= cols; c += kLane) _mm256_storeu_ps(out + c, load_halves(row + 2 * c));
  for (; c < cols; ++c) out[c] = _cvtsh_ss(reinterpret_cast<const uint16_t*>(row)[c]);
}

template <int N>
void dot_f16(const Rows& rows, int64_t i, const float* x, int cols, float* out) {
  const Group<N> group(rows, i);
  __m256 sums[N][2];
  for (int n = 0; n < N; ++n) sums[n][0] = sums[n][1] = _mm256_setzero_ps();
  for (int c = 0; c < cols; c += GROUP) {
    for (int n = 0; n < N; ++n) {
      const uint8_t* halves = group.row[n] + 2 * c;
      prefetch(group.next[n] + 2 * c, 64);
      for (int k = 0; k < 4; ++k) {
        const __m256 w = load_halves(halves + 2 * k * kLane);
        sums[n][k % 2] = _mm256_fmadd_ps(w, _mm256_load_ps(x + c + k * kLane), sums[n][k % 2]);
      }
    }
  }
  for (int n = 0; n < N; ++n) out[i + n] = sum_of(_mm256_add_ps(sums[n][0], sums[n][1]));
}

void dots_f16(const Rows* rows, const void* prepared, int cols, float* out) {
  const float* x = static_cast<const float*>(prepared);
  for_groups(
      *rows, [&](int64_t i) { dot_f16<kSideBySide>(*rows, i, x, cols, out); },
      [&](int64_t i) { dot_f16<1>(*rows, i, x, cols, out); });
}

template <int N>
void axpy_f16(const Rows& rows, int64_t i, const float* coefficients, int cols, float* sum) {
  const Group<N> group(rows, i);
  for (int c = 0; c < cols; c += GROUP) {
    __m256 y[4];
    for (int k = 0; k < 4; ++k) y[k] = _mm256_load_ps(sum + c + k * kLane);
    for (int n = 0; n < N; ++n) {
      const uint8_t* halves = group.row[n] + 2 * c;
      prefetch(group.next[n] + 2 * c, 64);
      const __m256 a = _mm256_set1_ps(coefficients[i + n]);
      for (int k = 0; k < 4; ++k) {
        y[k] = _mm256_fmadd_ps(load_halves(halves + 2 * k * kLane), a, y[k]);
      }
    }
    for (int k = 0; k < 4; ++k) _mm256_store_ps(sum + c + k * kLane, y[k]);
  }
}

void axpys_f16(const Rows* rows, const float* coefficients, int cols, float* sum) {
  for_groups(
      *rows, [&](int64_t i) { axpy_f16<kSideBySide>(*rows, i, coefficients, cols, sum); },
      [&](int64_t i) { axpy_f16<1>(*rows, i, coefficients, cols, sum); });
}

// -- q8 ------------------------------------------------------------------------------------------

void dequantise_q8(const uint8_t* row, float* out, int cols) {
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(row + cols);
  for (int c = 0; c < cols; c += kLane) {
    const __m256 scale = _mm256_set1_ps(_cvtsh_ss(scales[c / GROUP]));
    _mm256_storeu_ps(out + c, _mm256_mul_ps(scale, load_bytes(row + c)));
  }
}

template <int N>
struct Scales {
  alignas(32) float of[N][TILE_GROUPS];

  void load(const Group<N>& group, int cols, int tile) {
    const int offset = cols + tile / GROUP * 2;
    for (int n = 0; n < N; ++n) {
      prefetch(group.next[n] + offset, 1);
      load_scales(group.row[n] + offset, smaller((cols - tile) / GROUP, TILE_GROUPS), of[n]);
    }
  }
};

template <int N>
void dot_q8(const Rows& rows, int64_t i, const float* x, int cols, float* out) {
  const Group<N> group(rows, i);
  Scales<N> scales;
  __m256 sums[N];
  for (int n = 0; n < N; ++n) sums[n] = _mm256_setzero_ps();
  for (int tile = 0; tile < cols; tile += TILE) {
    scales.load(group, cols, tile);
    for (int c = tile; c < smaller(tile + TILE, cols); c += GROUP) {
      for (int n = 0; n < N; ++n) {
        const uint8_t* bytes = group.row[n] + c;
        if (c % 64 == 0) prefetch(group.next[n] + c, 64);
        __m256 product = _mm256_mul_ps(load_bytes(bytes), _mm256_load_ps(x + c));
        for (int k = kLane; k < GROUP; k += kLane) {
          product = _mm256_fmadd_ps(load_bytes(bytes + k), _mm256_load_ps(x + c + k), product);
        }
        const __m256 scale = _mm256_set1_ps(scales.of[n][(c - tile) / GROUP]);
        sums[n] = _mm256_fmadd_ps(product, scale, sums[n]);
      }
    }
  }
  for (int n = 0; n < N; ++n) out[i + n] = sum_of(sums[n]);
}

void dots_q8(const Rows* rows, const void* prepared, int cols, float* out) {
  const float* x = static_cast<const float*>(prepared);
  for_groups(
      *rows, [&](int64_t i) { dot_q8<kSideBySide>(*rows, i, x, cols, out); },
      [&](int64_t i) { dot_q8<1>(*rows, i, x, cols, out); });
}

template <int N>
void axpy_q8(const Rows& rows, int64_t i, const float* coefficients, int cols, float* sum) {
  const Group<N> group(rows, i);
  Scales<N> scales;
  for (int tile = 0; tile < cols; tile += TILE) {
    scales.load(group, cols, tile);
    for (int c = tile; c < smaller(tile + TILE, cols); c += GROUP) {
      __m256 y[4];
      for (int k = 0; k < 4; ++k) y[k] = _mm256_load_ps(sum + c + k * kLane);
      for (int n = 0; n < N; ++n) {
        const uint8_t* bytes = group.row[n] + c;
        if (c % 64 == 0) prefetch(group.next[n] + c, 64);
        const __m256 a = _mm256_set1_ps(coefficients[i + n] * scales.of[n][(c - tile) / GROUP]);
        for (int k = 0; k < 4; ++k) {
          y[k] = _mm256_fmadd_ps(load_bytes(bytes + k * kLane), a, y[k]);
        }
      }
      for (int k = 0; k < 4; ++k) _mm256_store_ps(sum + c + k * kLane, y[k]);
    }
  }
}

void axpys_q8(const Rows* rows, const float* coefficients, int cols, float* sum) {
  for_groups(
      *rows, [&](int64_t i) { axpy_q8<kSideBySide>(*rows, i, coefficients, cols, sum); },
      [&](int64_t i) { axpy_q8<1>(*rows, i, coefficients, cols, sum); });
}

// -- q4 ------------------------------------------------------------------------------------------

// One half of a tile of a row: 8 lanes are groups, and the last tile of a row may have fewer.
struct Nibbles {
  int groups;  // of the whole tile
  __m256i lanes;
  int64_t words, scales;  // where they lie in the row
  int64_t lines;          // a half of the tile's bytes

  Nibbles(int cols, int tile, int from)
      : groups(smaller((cols - tile) / GROUP, TILE_GROUPS)),
        lanes(_mm256_cmpgt_epi32(_mm256_set1_epi32(groups - from),
                                 _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))),
        words(tile / 2 + 4 * from),
        scales(cols / 2 + tile / GROUP * 2),
        lines(tile / 2 + groups * from) {}

  __m256i word(const uint8_t* row, int r) const {
    return _mm256_maskload_epi32(reinterpret_cast<const int*>(row + words + 4 * groups * r), lanes);
  }
  void fetch(const uint8_t* next) const {
    prefetch(next + lines, 2 * 4 * groups);
    prefetch(next + scales, 1);
  }
};

void dequantise_q4(const uint8_t* row, float* out, int cols) {
  const __m128i low = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
  for (int tile = 0; tile < cols; tile += TILE) {
    const int groups = smaller((cols - tile) / GROUP, TILE_GROUPS);
    alignas(32) float scales[TILE_GROUPS];
    load_scales(row + cols / 2 + tile / GROUP * 2, groups, scales);
    const int32_t* words = reinterpret_cast<const int32_t*>(row + tile / 2);
    for (int g = 0; g < groups; ++g, ++words, out += GROUP) {
      const __m256 scale = _mm256_set1_ps(scales[g]);
      const __m128i bytes =
          _mm_set_epi32(words[3 * groups], words[2 * groups], words[groups], words[0]);
      const __m128i halves[] = {_mm_and_si128(bytes, low),
                                _mm_and_si128(_mm_srli_epi16(bytes, 4), low)};
      for (int h = 0; h < 2; ++h) {
        const __m128i codes = _mm_sub_epi8(halves[h], eight);
        const __m256i w0 = _mm256_cvtepi8_epi32(codes);
        const __m256i w1 = _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(codes, codes));
        _mm256_storeu_ps(out + 16 * h, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(w0)));
        _mm256_storeu_ps(out + 16 * h + kLane, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(w1)));
      }
    }
  }
}

int64_t prepared_bytes_q4(int cols) { return round_up(cols, TILE) / TILE * sizeof(Q4Tile); }

// 2^n, for n in -126..127.
float power_of_two(int n) {
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_set1_epi32((n + 127) << 23)));
}

// One group of x as integers below 2^22; returns their scale, which is NaN if any x is not finite.
float to_integers(const float* x, int32_t integers[GROUP]) {
  int32_t largest = 0;
  for (int i = 0; i < GROUP; ++i) {
    int32_t bits;
    __builtin_memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    largest = largest > bits ? largest : bits;
  }
  const int biased = largest >> 23;
  if (biased == 255) {
    for (int i = 0; i < GROUP; ++i) integers[i] = 0;
    return __builtin_nanf("");
  }
  const int exponent = biased < 27 ? -100 : biased - 127;  // of what is too small little remains
  const __m256 inverse = _mm256_set1_ps(power_of_two(21 - exponent));
  for (int i = 0; i < GROUP; i += kLane) {
    const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x + i), inverse);
    _mm256_store_si256(reinterpret_cast<__m256i*>(integers + i), _mm256_cvtps_epi32(scaled));
  }
  return power_of_two(exponent - 21);
}

void prepare_q4(const float* x, int cols, void* prepared) {
  Q4Tile* tiles = static_cast<Q4Tile*>(prepared);
  const __m128i last_bytes = _mm_set1_epi32(0x0c080400);
  for (int tile = 0; tile < cols; tile += TILE) {
    Q4Tile& out = *tiles++;
    __builtin_memset(&out, 0, sizeof out);
    for (int g = 0; g < TILE_GROUPS && tile + g * GROUP < cols; ++g, x += GROUP) {
      alignas(32) int32_t integers[GROUP];
      out.scale[g] = to_integers(x, integers);
      for (int i = 0; i < 8; ++i) {
        __m128i word = _mm_load_si128(reinterpret_cast<const __m128i*>(integers + 4 * i));
        for (int limb = 2; limb >= 0; --limb) {
          reinterpret_cast<int32_t*>(out.limbs[limb][i])[g] =
              _mm_cvtsi128_si32(_mm_shuffle_epi8(word, last_bytes));
          const __m128i last = _mm_srai_epi32(_mm_slli_epi32(word, 24), 24);
          word = _mm_srai_epi32(_mm_sub_epi32(word, last), 8);
        }
      }
    }
    for (int limb = 0; limb < 3; ++limb) {
      for (int i = 0; i < 8; ++i) {
        for (int b = 0; b < 4 * TILE_GROUPS; ++b) {
          out.start[limb][b / 4] -= 8 * out.limbs[limb][i][b];
        }
      }
    }
  }
}

// The products of 8 groups, but for the scales. 16 bits hold the sums of a tile: 8 times 2 products
// of at most 15 * 128. Inlined, gcc 12 copies x to the stack for several rows: half the speed.
__attribute__((noinline)) __m256 dot_groups(const Nibbles& nibbles, const uint8_t* row,
                                            const Q4Tile* x, int from) {
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const auto load = [](const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); };
  __m256i limbs[3] = {};
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    const __m256i word = nibbles.word(row, r);
    const __m256i w0 = _mm256_and_si256(word, low);
    const __m256i w1 = _mm256_and_si256(_mm256_srli_epi16(word, 4), low);
#pragma GCC unroll 3
    for (int k = 0; k < 3; ++k) {
      const __m256i p0 = _mm256_maddubs_epi16(w0, load(x->limbs[k][r] + 4 * from));
      const __m256i p1 = _mm256_maddubs_epi16(w1, load(x->limbs[k][4 + r] + 4 * from));
      limbs[k] = _mm256_add_epi16(limbs[k], _mm256_add_epi16(p0, p1));
    }
  }
#pragma GCC unroll 3
  for (int k = 0; k < 3; ++k) {
    limbs[k] = _mm256_add_epi32(_mm256_madd_epi16(limbs[k], ones), load(x->start[k] + from));
  }
  const __m256i small = _mm256_add_epi32(_mm256_slli_epi32(limbs[1], 8), limbs[2]);
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(limbs[0]), _mm256_set1_ps(65536),
                         _mm256_cvtepi32_ps(small));
}

template <int N>
void dot_q4(const Rows& rows, int64_t i, const Q4Tile* x, int cols, float* out) {
  const Group<N> group(rows, i);
  __m256 sums[N];
  for (int n = 0; n < N; ++n) sums[n] = _mm256_setzero_ps();
  for (int tile = 0; tile < cols; tile += TILE, ++x) {
    for (int n = 0; n < N; ++n) {
      alignas(32) float scales[TILE_GROUPS];
      for (int from = 0; from < TILE_GROUPS; from += kLane) {
        const Nibbles nibbles(cols, tile, from);
        nibbles.fetch(group.next[n]);
        if (from == 0) load_scales(group.row[n] + nibbles.scales, nibbles.groups, scales);
        const __m256 scale =
            _mm256_mul_ps(_mm256_load_ps(scales + from), _mm256_load_ps(x->scale + from));
        sums[n] = _mm256_fmadd_ps(dot_groups(nibbles, group.row[n], x, from), scale, sums[n]);
      }
    }
  }
  for (int n = 0; n < N; ++n) out[i + n] = sum_of(sums[n]);
}

void dots_q4(const Rows* rows, const void* prepared, int cols, float* out) {
  const Q4Tile* x = static_cast<const Q4Tile*>(prepared);
  for_groups(
      *rows, [&](int64_t i) { dot_q4<kSideBySide>(*rows, i, x, cols, out); },
      [&](int64_t i) { dot_q4<1>(*rows, i, x, cols, out); });
}

// In tiles [word r][k][group], k being a nibble of the word: weight 4 r + k / 2 + 16 (k % 2).
int64_t sum_floats_q4(int cols) { return round_up(cols, TILE); }

void add_sum_q4(const float* sum, int cols, float* out) {
  for (int tile = 0; tile < cols; tile += TILE, sum += TILE) {
    for (int g = 0; g < TILE_GROUPS && tile + g * GROUP < cols; ++g, out += GROUP) {
      for (int i = 0; i < GROUP; ++i) {
        const int r = i / 8, k = i % 8;
        out[4 * r + k / 2 + 16 * (k % 2)] += sum[i * TILE_GROUPS + g];
      }
    }
  }
}

template <int N>
void axpy_q4(const Rows& rows, int64_t i, const float* coefficients, int cols, float* sum) {
  const Group<N> group(rows, i);
  const __m256i low = _mm256_set1_epi32(15);
  for (int tile = 0; tile < cols; tile += TILE, sum += TILE) {
    for (int from = 0; from < TILE_GROUPS; from += kLane) {
      const Nibbles nibbles(cols, tile, from);
      __m256 a[N], offset = _mm256_setzero_ps();
      for (int n = 0; n < N; ++n) {
        nibbles.fetch(group.next[n]);
        alignas(32) float scales[TILE_GROUPS];
        load_scales(group.row[n] + nibbles.scales, nibbles.groups, scales);
        a[n] = _mm256_mul_ps(_mm256_set1_ps(coefficients[i + n]), _mm256_load_ps(scales + from));
        offset = _mm256_fmadd_ps(_mm256_set1_ps(-8), a[n], offset);
      }
      for (int r = 0; r < 4; ++r) {
        float* out = sum + 8 * r * TILE_GROUPS + from;
        __m256 y[8];
        for (int k = 0; k < 8; ++k) y[k] = _mm256_add_ps(_mm256_load_ps(out + k * 16), offset);
        for (int n = 0; n < N; ++n) {
          const __m256i word = nibbles.word(group.row[n], r);
#pragma GCC unroll 8
          for (int k = 0; k < 8; ++k) {
            const __m256i w = _mm256_and_si256(_mm256_srli_epi32(word, 4 * k), low);
            y[k] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(w), a[n], y[k]);
          }
        }
        for (int k = 0; k < 8; ++k) _mm256_store_ps(out + k * 16, y[k]);
      }
    }
  }
}

void axpys_q4(const Rows* rows, const float* coefficients, int cols, float* sum) {
  for_groups(
      *rows, [&](int64_t i) { axpy_q4<kSideBySide>(*rows, i, coefficients, cols, sum); },
      [&](int64_t i) { axpy_q4<1>(*rows, i, coefficients, cols, sum); });
}

}  // namespace

extern const Kernels avx2_kernels[QUANTS] = {
    {dequantise_f16, prepared_bytes, prepare, dots_f16, sum_floats, axpys_f16, add_sum},
    {dequantise_q8, prepared_bytes, prepare, dots_q8, sum_floats, axpys_q8, add_sum},
    {dequantise_q4, prepared_bytes_q4, prepare_q4, dots_q4, sum_floats_q4, axpys_q4, add_sum_q4},
};
