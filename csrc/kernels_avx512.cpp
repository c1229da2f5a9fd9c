// Kernels for AVX-512 with VNNI.
#include <immintrin.h>
#include <stdint.h>

#include "kernels.h"

namespace {

constexpr int kSideBySide = 4;  // rows of a dot product
constexpr int kLane = 16;       // floats of a register

const uint8_t* row_at(const Rows& rows, int64_t i) {
  return rows.data + (rows.indices ? rows.indices[i] : i) * rows.stride;
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

int smaller(int a, int b) { return a < b ? a : b; }

// The first n of 16 lanes; all of them for a larger n.
__mmask16 first(int n) { return static_cast<__mmask16>(n < kLane ? (1 << n) - 1 : 0xffff); }

__m512 load_halves(const uint8_t* halves, __mmask16 lanes) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, halves));
}

__m512 load_bytes(const uint8_t* bytes) {
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(packed));
}

// Cache lines of the next rows, fetched while the present ones are at work.
void prefetch(const uint8_t* from, int bytes) {
  for (int i = 0; i < bytes; i += 64) _mm_prefetch(from + i, _MM_HINT_T0);
}

// Several rows: the ones at hand and those to fetch, which are the ones at hand at the end.
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

// Calls one of the two for each group of rows, the last ones alone.
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
  for (int c = 0; c < round_up(cols, GROUP); c += kLane) {
    _mm512_store_ps(out + c, _mm512_maskz_loadu_ps(first(cols > c ? cols - c : 0), x + c));
  }
}

int64_t sum_floats(int cols) { return round_up(cols, GROUP); }

void add_sum(const float* sum, int cols, float* out) {
  for (int c = 0; c < cols; ++c) out[c] += sum[c];
}

// -- f16 -----------------------------------------------------------------------------------------

void dequantise_f16(const uint8_t* row, float* out, int cols) {
  for (int c = 0; c < cols; c += kLane) {
    const __mmask16 lanes = first(cols - c);
    _mm512_mask_storeu_ps(out + c, lanes, load_halves(row + 2 * c, lanes));
  }
}

// Whole cache lines: x has zeros where the row has its padding.
template <int N>
void dot_f16(const Rows& rows, int64_t i, const float* x, int cols, float* out) {
  const Group<N> group(rows, i);
  __m512 sums[N][2];
  for (int n = 0; n < N; ++n) sums[n][0] = sums[n][1] = _mm512_setzero_ps();
  for (int c = 0; c < cols; c += GROUP) {
    const __m512 x0 = _mm512_load_ps(x + c), x1 = _mm512_load_ps(x + c + kLane);
    for (int n = 0; n < N; ++n) {
      const uint8_t* halves = group.row[n] + 2 * c;
      prefetch(group.next[n] + 2 * c, 64);
      sums[n][0] = _mm512_fmadd_ps(load_halves(halves, 0xffff), x0, sums[n][0]);
      sums[n][1] = _mm512_fmadd_ps(load_halves(halves + 32, 0xffff), x1, sums[n][1]);
    }
  }
  for (int n = 0; n < N; ++n) {
    out[i + n] = _mm512_reduce_add_ps(_mm512_add_ps(sums[n][0], sums[n][1]));
  }
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
  __m512 a[N];
  for (int n = 0; n < N; ++n) a[n] = _mm512_set1_ps(coefficients[i + n]);
  for (int c = 0; c < cols; c += GROUP) {
    __m512 y0 = _mm512_load_ps(sum + c), y1 = _mm512_load_ps(sum + c + kLane);
    for (int n = 0; n < N; ++n) {
      const uint8_t* halves = group.row[n] + 2 * c;
      prefetch(group.next[n] + 2 * c, 64);
      y0 = _mm512_fmadd_ps(load_halves(halves, 0xffff), a[n], y0);
      y1 = _mm512_fmadd_ps(load_halves(halves + 32, 0xffff), a[n], y1);
    }
    _mm512_store_ps(sum + c, y0);
    _mm512_store_ps(sum + c + kLane, y1);
  }
}

void axpys_f16(const Rows* rows, const float* coefficients, int cols, float* sum) {
  for_groups(
      *rows, [&](int64_t i) { axpy_f16<kSideBySide>(*rows, i, coefficients, cols, sum); },
      [&](int64_t i) { axpy_f16<1>(*rows, i, coefficients, cols, sum); });
}

// -- q8 ------------------------------------------------------------------------------------------

void dequantise_q8(const uint8_t* row, float* out, int cols) {
  for (int c = 0; c < cols; c += kLane) {
    const __m512 scale = _mm512_broadcastss_ps(_mm_cvtph_ps(
        _mm_set1_epi16(*reinterpret_cast<const int16_t*>(row + cols + c / GROUP * 2))));
    _mm512_storeu_ps(out + c, _mm512_mul_ps(scale, load_bytes(row + c)));
  }
}

// The scales of 16 groups of each row, in memory, from where they are broadcast.
template <int N>
struct Scales {
  alignas(64) float of[N][TILE_GROUPS];

  void load(const Group<N>& group, int cols, int tile) {
    const int offset = cols + tile / GROUP * 2;
    for (int n = 0; n < N; ++n) {
      prefetch(group.next[n] + offset, 1);
      _mm512_store_ps(of[n], load_halves(group.row[n] + offset, first((cols - tile) / GROUP)));
    }
  }
};

template <int N>
void dot_q8(const Rows& rows, int64_t i, const float* x, int cols, float* out) {
  const Group<N> group(rows, i);
  Scales<N> scales;
  __m512 sums[N];
  for (int n = 0; n < N; ++n) sums[n] = _mm512_setzero_ps();
  for (int tile = 0; tile < cols; tile += TILE) {
    scales.load(group, cols, tile);
    for (int c = tile; c < smaller(tile + TILE, cols); c += GROUP) {
      const __m512 x0 = _mm512_load_ps(x + c), x1 = _mm512_load_ps(x + c + kLane);
      for (int n = 0; n < N; ++n) {
        const uint8_t* bytes = group.row[n] + c;
        if (c % 64 == 0) prefetch(group.next[n] + c, 64);
        const __m512 product =
            _mm512_fmadd_ps(load_bytes(bytes), x0, _mm512_mul_ps(load_bytes(bytes + kLane), x1));
        const __m512 scale = _mm512_set1_ps(scales.of[n][(c - tile) / GROUP]);
        sums[n] = _mm512_fmadd_ps(product, scale, sums[n]);
      }
    }
  }
  for (int n = 0; n < N; ++n) out[i + n] = _mm512_reduce_add_ps(sums[n]);
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
    for (int n = 0; n < N; ++n) {
      const __m512 a = _mm512_set1_ps(coefficients[i + n]);
      _mm512_store_ps(scales.of[n], _mm512_mul_ps(a, _mm512_load_ps(scales.of[n])));
    }
    for (int c = tile; c < smaller(tile + TILE, cols); c += GROUP) {
      __m512 y0 = _mm512_load_ps(sum + c), y1 = _mm512_load_ps(sum + c + kLane);
      for (int n = 0; n < N; ++n) {
        const uint8_t* bytes = group.row[n] + c;
        if (c % 64 == 0) prefetch(group.next[n] + c, 64);
        const __m512 a = _mm512_set1_ps(scales.of[n][(c - tile) / GROUP]);
        y0 = _mm512_fmadd_ps(load_bytes(bytes), a, y0);
        y1 = _mm512_fmadd_ps(load_bytes(bytes + kLane), a, y1);
      }
      _mm512_store_ps(sum + c, y0);
      _mm512_store_ps(sum + c + kLane, y1);
    }
  }
}

void axpys_q8(const Rows* rows, const float* coefficients, int cols, float* sum) {
  for_groups(
      *rows, [&](int64_t i) { axpy_q8<kSideBySide>(*rows, i, coefficients, cols, sum); },
      [&](int64_t i) { axpy_q8<1>(*rows, i, coefficients, cols, sum); });
}

// -- q4 ------------------------------------------------------------------------------------------

// One tile of a row: lanes are groups, and the last tile of a row may have fewer.
struct Nibbles {
  int groups;
  __mmask16 lanes;
  int64_t words, scales;  // where they lie in the row

  Nibbles(int cols, int tile)
      : groups(smaller((cols - tile) / GROUP, TILE_GROUPS)),
        lanes(first(groups)),
        words(tile / 2),
        scales(cols / 2 + tile / GROUP * 2) {}

  __m512i word(const uint8_t* row, int r) const {
    return _mm512_maskz_loadu_epi32(lanes, row + words + 4 * groups * r);
  }
  __m512 scale(const uint8_t* row) const { return load_halves(row + scales, lanes); }
  void fetch(const uint8_t* next) const {
    prefetch(next + words, 4 * 4 * groups);
    prefetch(next + scales, 1);
  }
};

void dequantise_q4(const uint8_t* row, float* out, int cols) {
  const __m128i low = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
  for (int tile = 0; tile < cols; tile += TILE) {
    const Nibbles nibbles(cols, tile);
    alignas(64) float scales[TILE_GROUPS];
    _mm512_store_ps(scales, nibbles.scale(row));
    const int32_t* words = reinterpret_cast<const int32_t*>(row + nibbles.words);
    for (int g = 0; g < nibbles.groups; ++g, ++words, out += GROUP) {
      const int n = nibbles.groups;
      const __m128i bytes = _mm_set_epi32(words[3 * n], words[2 * n], words[n], words[0]);
      const __m128i halves[] = {_mm_and_si128(bytes, low),
                                _mm_and_si128(_mm_srli_epi16(bytes, 4), low)};
      for (int h = 0; h < 2; ++h) {
        const __m512i codes = _mm512_cvtepi8_epi32(_mm_sub_epi8(halves[h], eight));
        _mm512_storeu_ps(out + h * kLane,
                         _mm512_mul_ps(_mm512_set1_ps(scales[g]), _mm512_cvtepi32_ps(codes)));
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
float to_integers(const float* x, __m512i integers[2]) {
  const __m512 x0 = _mm512_loadu_ps(x), x1 = _mm512_loadu_ps(x + kLane);
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  const int largest = _mm512_reduce_max_epi32(
      _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(x0), magnitude),
                       _mm512_and_si512(_mm512_castps_si512(x1), magnitude)));
  const int biased = largest >> 23;
  if (biased == 255) {
    integers[0] = integers[1] = _mm512_setzero_si512();
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_set1_epi32(0x7fc00000)));
  }
  const int exponent = biased < 27 ? -100 : biased - 127;  // of what is too small little remains
  const __m512 inverse = _mm512_set1_ps(power_of_two(21 - exponent));
  integers[0] = _mm512_cvtps_epi32(_mm512_mul_ps(x0, inverse));
  integers[1] = _mm512_cvtps_epi32(_mm512_mul_ps(x1, inverse));
  return power_of_two(exponent - 21);
}

// Cuts off the last byte of each, taken as signed, and stores it as word r of the group in limb[r].
__m512i cut_limb(__m512i integers, int8_t limb[4][4 * TILE_GROUPS], int group) {
  alignas(16) int32_t words[4];
  _mm_store_si128(reinterpret_cast<__m128i*>(words), _mm512_cvtepi32_epi8(integers));
  for (int r = 0; r < 4; ++r) reinterpret_cast<int32_t*>(limb[r])[group] = words[r];
  const __m512i last = _mm512_srai_epi32(_mm512_slli_epi32(integers, 24), 24);
  return _mm512_srai_epi32(_mm512_sub_epi32(integers, last), 8);
}

void prepare_q4(const float* x, int cols, void* prepared) {
  Q4Tile* tiles = static_cast<Q4Tile*>(prepared);
  for (int tile = 0; tile < cols; tile += TILE) {
    Q4Tile& out = *tiles++;
    const int groups = smaller((cols - tile) / GROUP, TILE_GROUPS);
    _mm512_store_ps(out.scale, _mm512_setzero_ps());
    if (groups < TILE_GROUPS) {
      for (int i = 0; i < 3 * 8; ++i) _mm512_store_si512(out.limbs[i / 8][i % 8], __m512i{});
    }
    for (int g = 0; g < groups; ++g, x += GROUP) {
      __m512i integers[2];
      out.scale[g] = to_integers(x, integers);
      for (int half = 0; half < 2; ++half) {
        for (int limb = 2; limb >= 0; --limb) {
          integers[half] = cut_limb(integers[half], out.limbs[limb] + 4 * half, g);
        }
      }
    }
    for (int limb = 0; limb < 3; ++limb) {
      __m512i sum = _mm512_setzero_si512();
      for (int i = 0; i < 8; ++i) {
        const __m512i bytes = _mm512_load_si512(out.limbs[limb][i]);
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(8), bytes);
      }
      _mm512_store_si512(out.start[limb], _mm512_sub_epi32(_mm512_setzero_si512(), sum));
    }
  }
}

template <int N>
void dot_q4(const Rows& rows, int64_t i, const Q4Tile* x, int cols, float* out) {
  const Group<N> group(rows, i);
  const __m512i low = _mm512_set1_epi8(15);
  __m512 sums[N];
  for (int n = 0; n < N; ++n) sums[n] = _mm512_setzero_ps();
  for (int tile = 0; tile < cols; tile += TILE, ++x) {
    const Nibbles nibbles(cols, tile);
    __m512i limbs[N][3];
    for (int n = 0; n < N; ++n) {
      for (int k = 0; k < 3; ++k) limbs[n][k] = _mm512_load_si512(x->start[k]);
      nibbles.fetch(group.next[n]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const __m512i word = nibbles.word(group.row[n], r);
        const __m512i w0 = _mm512_and_si512(word, low);
        const __m512i w1 = _mm512_and_si512(_mm512_srli_epi16(word, 4), low);
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k) {
          const __m512i x0 = _mm512_load_si512(x->limbs[k][r]);
          const __m512i x1 = _mm512_load_si512(x->limbs[k][4 + r]);
          limbs[n][k] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(limbs[n][k], w0, x0), w1, x1);
        }
      }
    }
    const __m512 x_scale = _mm512_load_ps(x->scale);
    for (int n = 0; n < N; ++n) {
      // both parts are exact
      const __m512i small = _mm512_add_epi32(_mm512_slli_epi32(limbs[n][1], 8), limbs[n][2]);
      const __m512 product = _mm512_fmadd_ps(_mm512_cvtepi32_ps(limbs[n][0]), _mm512_set1_ps(65536),
                                             _mm512_cvtepi32_ps(small));
      const __m512 scale = _mm512_mul_ps(nibbles.scale(group.row[n]), x_scale);
      sums[n] = _mm512_fmadd_ps(product, scale, sums[n]);
    }
  }
  for (int n = 0; n < N; ++n) out[i + n] = _mm512_reduce_add_ps(sums[n]);
}

void dots_q4(const Rows* rows, const void* prepared, int cols, float* out) {
  const Q4Tile* x = static_cast<const Q4Tile*>(prepared);
  for_groups(
      *rows, [&](int64_t i) { dot_q4<kSideBySide>(*rows, i, x, cols, out); },
      [&](int64_t i) { dot_q4<1>(*rows, i, x, cols, out); });
}

// The sum of q4 rows lies in tiles [word r][k][group], k being a nibble of the word: weight
// 4 r + k / 2 + 16 (k % 2) of its group.
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
  // a permutation looks at the low four bits of its index only
  const __m512 value = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  for (int tile = 0; tile < cols; tile += TILE) {
    const Nibbles nibbles(cols, tile);
    __m512 a[N];
    for (int n = 0; n < N; ++n) {
      a[n] = _mm512_mul_ps(_mm512_set1_ps(coefficients[i + n]), nibbles.scale(group.row[n]));
      nibbles.fetch(group.next[n]);
    }
    for (int r = 0; r < 4; ++r, sum += 8 * TILE_GROUPS) {
      __m512 y[8];
      for (int k = 0; k < 8; ++k) y[k] = _mm512_load_ps(sum + k * TILE_GROUPS);
      for (int n = 0; n < N; ++n) {
        const __m512i word = nibbles.word(group.row[n], r);
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k) {
          const __m512 w = _mm512_permutexvar_ps(_mm512_srli_epi32(word, 4 * k), value);
          y[k] = _mm512_fmadd_ps(w, a[n], y[k]);
        }
      }
      for (int k = 0; k < 8; ++k) _mm512_store_ps(sum + k * TILE_GROUPS, y[k]);
    }
  }
}

void axpys_q4(const Rows* rows, const float* coefficients, int cols, float* sum) {
  for_groups(
      *rows, [&](int64_t i) { axpy_q4<kSideBySide>(*rows, i, coefficients, cols, sum); },
      [&](int64_t i) { axpy_q4<1>(*rows, i, coefficients, cols, sum); });
}

}  // namespace

extern const Kernels avx512_kernels[QUANTS] = {
    {dequantise_f16, prepared_bytes, prepare, dots_f16, sum_floats, axpys_f16, add_sum},
    {dequantise_q8, prepared_bytes, prepare, dots_q8, sum_floats, axpys_q8, add_sum},
    {dequantise_q4, prepared_bytes_q4, prepare_q4, dots_q4, sum_floats_q4, axpys_q4, add_sum_q4},
};
