// Products of 4-bit rows with several tokens in the tile registers of AMX, 32 rows and 8 tokens at
// a time. Included by kernels_avx512.cpp behind kernels_simd.inl.
//
// Each float is that of the kernel for one token, to the last bit. That one sums every 16th group
// of a row in a lane, and then the lanes in pairs; here these sums lie in memory.

constexpr int kTileRows = 16, kHalves = 2;  // rows of a register; so many registers of them
constexpr int kBlockRows = kHalves * kTileRows;
constexpr int kTileTokens = 8;   // each has two rows of a register, one for each limb
constexpr int kManyTokens = 64;  // at most, whose sums stand together: 128 KiB
constexpr int kUnpackedTiles = 4, kQuarter = TILE_GROUPS / 4;  // of rows at a time: 16 KiB

// A token's x is its Q4Tiles and its high limbs, a group's in the order of its nibbles; then, as
// far from these as the next token is from them, its low limbs. An odd number of cache lines keeps
// the rows of a register in different sets of the cache.
int64_t limbs_distance(int cols) {
  const int64_t bytes = prepared_bytes_q4(cols) + round_up(cols, TILE);
  return (bytes / CACHE_LINE | 1) * CACHE_LINE;
}

int64_t prepared_bytes_tiles(int cols) { return 2 * limbs_distance(cols); }

// Of each word first the low nibbles, then the high ones, which are 16 weights further.
void put_limbs(Ints first, Ints second, uint8_t* out) {
  const __m128i a = _mm512_cvtepi32_epi8(first), b = _mm512_cvtepi32_epi8(second);
  _mm_store_si128((__m128i*)out, _mm_unpacklo_epi32(a, b));
  _mm_store_si128((__m128i*)out + 1, _mm_unpackhi_epi32(a, b));
}

template <typename Weights>
void prepare_tiles(const float* x, int cols, void* prepared) {
  uint8_t* high = static_cast<uint8_t*>(prepared) + prepared_bytes_q4(cols);
  uint8_t* low = high + limbs_distance(cols);
  const int rest = static_cast<int>(round_up(cols, TILE)) - cols;  // no groups: zero
  __builtin_memset(high + cols, 0, rest);
  __builtin_memset(low + cols, 0, rest);
  prepare_q4<Weights>(x, cols, prepared, [&](int column, const int32_t* integers) {
    Ints upper[2], lower[2];
    for (int i = 0; i < 2; ++i) {
      const Ints whole = _mm512_loadu_si512(integers + 16 * i);
      upper[i] = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
      lower[i] = _mm512_sub_epi32(whole, _mm512_slli_epi32(upper[i], 8));
    }
    put_limbs(upper[0], upper[1], high + column);
    put_limbs(lower[0], lower[1], low + column);
  });
}

// The rows of a block, the last one again where there are fewer, and those after them.
struct BlockRows {
  const uint8_t *row[kBlockRows], *next[kBlockRows];

  BlockRows(const Rows& rows, int64_t i) {
    const auto at = [&](int64_t n) { return row_at(rows, n < rows.count ? n : rows.count - 1); };
    for (int n = 0; n < kBlockRows; ++n) {
      row[n] = at(i + n);
      next[n] = at(i + kBlockRows + n);
    }
  }

  // Fetches a line of eight of the next rows.
  ALWAYS_INLINE void fetch(int eight, int64_t at) const {
#pragma GCC unroll 8
    for (int n = 0; n < 8; ++n) __builtin_prefetch(next[8 * eight + n] + at, 0, 2);
  }

  // Four words of each row of a half, as one register for each word.
  ALWAYS_INLINE void transpose(int half, int64_t at, Ints (&out)[4]) const {
    asm volatile("" ::: "memory");  // gcc would keep the pointers in vector registers
    Ints r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const auto four = [&](int n) {
        return _mm_loadu_si128((const __m128i*)(row[half * kTileRows + n + i] + at));
      };
      r[i] = _mm512_castsi128_si512(four(0));
      r[i] = _mm512_mask_broadcast_i32x4(r[i], 0x00f0, four(4));
      r[i] = _mm512_mask_broadcast_i32x4(r[i], 0x0f00, four(8));
      r[i] = _mm512_mask_broadcast_i32x4(r[i], 0xf000, four(12));
    }
    const Ints a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpacklo_epi32(r[2], r[3]);
    const Ints c = _mm512_unpackhi_epi32(r[0], r[1]), d = _mm512_unpackhi_epi32(r[2], r[3]);
    out[0] = _mm512_unpacklo_epi64(a, b);
    out[1] = _mm512_unpackhi_epi64(a, b);
    out[2] = _mm512_unpacklo_epi64(c, d);
    out[3] = _mm512_unpackhi_epi64(c, d);
  }
};

// The weights of a group, as registers want them.
using Weights8 = int8_t[kHalves][GROUP / 4][4 * kTileRows];
using Scales = float[kHalves][kTileRows];

// Some tiles of a block: their words by row, their scales, and the weights of a quarter.
struct Unpacked {
  alignas(64) uint32_t words[kUnpackedTiles][4][TILE_GROUPS][kHalves][kTileRows];
  alignas(64) Scales scales[kUnpackedTiles][TILE_GROUPS];
  alignas(64) Weights8 weights[kUnpackedTiles][kQuarter];

  // What lies behind the groups of a row is read too, up to its padding; x is zero there.
  void take_words(const BlockRows& rows, int cols, int tile, int to) {
    const Nibbles nibbles(cols, tile * TILE, 0);
    for (int half = 0; half < kHalves; ++half) {
      for (int r = 0; r < 4; ++r) {
        for (int g = 0; g < nibbles.groups; g += 4) {
          Ints four[4];
          rows.transpose(half, nibbles.words + 4 * (nibbles.groups * r + g), four);
          for (int i = 0; i < 4; ++i) _mm512_store_si512(words[to][r][g + i][half], four[i]);
        }
      }
    }
  }

  void take_scales(const BlockRows& rows, int cols, int tile, int to) {
    static constexpr struct {
      alignas(64) uint16_t of[GROUP];
    } kApart = {{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31}};
    const Nibbles nibbles(cols, tile * TILE, 0);
    for (int half = 0; half < kHalves; ++half) {
      for (int g = 0; g < TILE_GROUPS; g += 8) {
        Ints pairs[4] = {};
        if (g < nibbles.groups) rows.transpose(half, nibbles.scales + 2 * g, pairs);
        for (int i = 0; i < 4; ++i) {
          const Ints halves = _mm512_permutexvar_epi16(load_ints(kApart.of), pairs[i]);
          const __m256i two[2] = {_mm512_castsi512_si256(halves),
                                  _mm512_extracti64x4_epi64(halves, 1)};
          for (int k = 0; k < 2; ++k) {
            store(scales[to][g + 2 * i + k][half], _mm512_cvtph_ps(two[k]));
          }
        }
      }
    }
  }

  template <const int8_t* kCodes>
  void unpack(int quarter, int tile) {
    const Ints codes = _mm512_broadcast_i32x4(sixteen(kCodes));  // looked up by the low six bits
    for (int r = 0; r < 4; ++r) {
      for (int g = 0; g < kQuarter; ++g) {
        for (int half = 0; half < kHalves; ++half) {
          const Ints word = load_ints(words[tile][r][quarter * kQuarter + g][half]);
          int8_t (*to)[4 * kTileRows] = weights[tile][g][half] + 2 * r;
          _mm512_store_si512(to[0], _mm512_permutexvar_epi8(word, codes));
          _mm512_store_si512(to[1], _mm512_permutexvar_epi8(_mm512_srli_epi16(word, 4), codes));
        }
      }
    }
  }
};

// What the registers of a group hold after a product.
using Products = int32_t[kHalves][2 * kTileTokens][kTileRows];

// Two groups have registers in turn: what was multiplied is stored two steps later and added three
// steps later, so that nothing waits.
ALWAYS_INLINE void multiply_even(const uint8_t* x, int64_t distance, const Weights8& weights) {
  _tile_loadd(4, x, distance);
  _tile_loadd(6, weights[0], 64);
  _tile_zero(0);
  _tile_dpbssd(0, 4, 6);
  _tile_loadd(7, weights[1], 64);
  _tile_zero(1);
  _tile_dpbssd(1, 4, 7);
}
ALWAYS_INLINE void multiply_odd(const uint8_t* x, int64_t distance, const Weights8& weights) {
  _tile_loadd(5, x, distance);
  _tile_loadd(6, weights[0], 64);
  _tile_zero(2);
  _tile_dpbssd(2, 5, 6);
  _tile_loadd(7, weights[1], 64);
  _tile_zero(3);
  _tile_dpbssd(3, 5, 7);
}
ALWAYS_INLINE void store_even(Products& out) {
  _tile_stored(0, out[0], 64);
  _tile_stored(1, out[1], 64);
}
ALWAYS_INLINE void store_odd(Products& out) {
  _tile_stored(2, out[0], 64);
  _tile_stored(3, out[1], 64);
}

// The sums of 8 tokens.
using Sums = float[TILE_GROUPS][kHalves][kTileTokens][kTileRows];
using Totals = Floats[kHalves][kTileTokens];

// `x` is the Q4Tile of the first token, `distance` the bytes to that of the next.
ALWAYS_INLINE void add_products(const Products& products, const Scales& scales, const uint8_t* x,
                                int64_t distance, Totals& totals) {
  const Floats of_rows[kHalves] = {load(scales[0]), load(scales[1])};
#pragma GCC unroll 8
  for (int t = 0; t < kTileTokens; ++t) {
    float x_scale;
    __builtin_memcpy(&x_scale, x + t * distance, sizeof x_scale);
#pragma GCC unroll 2
    for (int half = 0; half < kHalves; ++half) {
      const int32_t (*limbs)[kTileRows] = products[half] + 2 * t;
      const Ints whole =
          _mm512_add_epi32(_mm512_slli_epi32(load_ints(limbs[0]), 8), load_ints(limbs[1]));
      const Floats scale = multiply(of_rows[half], broadcast(x_scale));
      totals[half][t] = multiply_add(_mm512_cvtepi32_ps(whole), scale, totals[half][t]);
    }
  }
}

struct TileCall {
  const Rows& rows;
  const uint8_t* prepared;
  int64_t tokens;
  int cols;
  float* out;
  int64_t out_stride;
};

// All products of a block of rows with some tokens from `token` on. Where the last eight are fewer,
// some of those before are computed again.
struct BlockMeetsTokens {
  const TileCall& call;
  const BlockRows rows;
  const int64_t i, token, blocks, distance;
  Unpacked unpacked;
  alignas(64) Sums sums[kManyTokens / kTileTokens];

  BlockMeetsTokens(const TileCall& call, int64_t i, int64_t token, int64_t tokens)
      : call(call),
        rows(call.rows, i),
        i(i),
        token(token),
        blocks((tokens + kTileTokens - 1) / kTileTokens),
        distance(limbs_distance(call.cols)) {}

  int64_t first_of(int64_t block) const {
    const int64_t first = token + block * kTileTokens, last = call.tokens - kTileTokens;
    return first < last ? first : last;
  }

  template <const int8_t* kCodes>
  void run() {
    const int tiles = static_cast<int>(round_up(call.cols, TILE) / TILE);
    __builtin_memset(sums, 0, blocks * sizeof(Sums));
    for (int tile = 0; tile < tiles; tile += kUnpackedTiles) {
      const int some = smaller(tiles - tile, kUnpackedTiles);
      for (int to = 0; to < some; ++to) {
        unpacked.take_words(rows, call.cols, tile + to, to);
        unpacked.take_scales(rows, call.cols, tile + to, to);
      }
      for (int quarter = 0; quarter < 4; ++quarter) {
        const int from = tile * TILE + quarter * kQuarter * GROUP;
        int count = 0;  // of these tiles that have the quarter
        for (; count < some && from + count * TILE < call.cols; ++count) {
          unpacked.unpack<kCodes>(quarter, count);
        }
        asm volatile("" ::: "memory");  // gcc does not know that tile registers read it
        for (int64_t block = 0; block < blocks; ++block) {
          for (int g = 0; g < kQuarter; ++g) add_group(from, quarter, g, count, block);
        }
      }
    }
    for (int64_t block = 0; block < blocks; ++block) {
      for (int t = 0; t < kTileTokens; ++t) write_sum(block, t);
    }
  }

  // Adds the products of group g of a quarter, which begins at column `from`, of some tiles.
  void add_group(int from, int quarter, int g, int count, int64_t block) {
    alignas(64) Products even, odd;
    Sums& sum = sums[block];
    const int group = quarter * kQuarter + g;
    const uint8_t* tiles = call.prepared + first_of(block) * 2 * distance;
    const uint8_t* x = tiles + prepared_bytes_q4(call.cols) + from + g * GROUP;
    Totals totals;
    for (int half = 0; half < kHalves; ++half) {
      for (int t = 0; t < kTileTokens; ++t) totals[half][t] = load(sum[group][half][t]);
    }
    const auto fetch = [&](int tile) {
      if (block) return;
      const int column = from + tile * TILE;  // scales of two tiles are a line
      rows.fetch(g, column / TILE * (TILE / 2) + quarter * CACHE_LINE);
      if (quarter == 0 && column % (2 * TILE) == 0) rows.fetch(g, call.cols / 2 + column / 16);
    };
    const auto add = [&](const Products& products, int tile) {
      const uint8_t* of_x = tiles + (from / TILE + tile) * sizeof(Q4Tile) + offsetof(Q4Tile, scale);
      add_products(products, unpacked.scales[tile][group], of_x + group * sizeof(float),
                   2 * distance, totals);
    };
    for (int step = 0; step < count + 3; step += 2) {
      if (step >= 2 && step < count + 2) store_even(even);
      if (step < count) {
        multiply_even(x + step * TILE, distance, unpacked.weights[step][g]);
        fetch(step);
      }
      if (step >= 3) add(odd, step - 3);
      if (step >= 1 && step < count + 1) store_odd(odd);
      if (step + 1 < count) {
        multiply_odd(x + (step + 1) * TILE, distance, unpacked.weights[step + 1][g]);
        fetch(step + 1);
      }
      if (step >= 2 && step < count + 2) add(even, step - 2);
    }
    for (int half = 0; half < kHalves; ++half) {
      for (int t = 0; t < kTileTokens; ++t) store(sum[group][half][t], totals[half][t]);
    }
  }

  // The sum over all groups, in the order in which `sum_of` adds lanes.
  void write_sum(int64_t block, int t) const {
    for (int half = 0; half < kHalves; ++half) {
      const int64_t row = i + half * kTileRows, left = call.rows.count - row;
      if (left <= 0) return;
      Floats sum[TILE_GROUPS];
      for (int g = 0; g < TILE_GROUPS; ++g) sum[g] = load(sums[block][g][half][t]);
      for (int apart = TILE_GROUPS / 2; apart > 0; apart /= 2) {
        for (int g = 0; g < apart; ++g) sum[g] = add(sum[g], sum[g + apart]);
      }
      const __mmask16 rows_left = first(left < kTileRows ? static_cast<int>(left) : kTileRows);
      _mm512_mask_storeu_ps(call.out + (first_of(block) + t) * call.out_stride + row, rows_left,
                            sum[0]);
    }
  }
};

// The one register that ldtilecfg reads.
struct TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, GROUP, GROUP, 64, 64};  // sums, x, weights
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, GROUP / 4, GROUP / 4};
};

template <typename Weights, const int8_t* kCodes>
void dots_tiles(const Rows* rows, const void* prepared, int64_t tokens, int cols, float* out,
                int64_t out_stride) {
  if (tokens < kTileTokens) {
    dots<DotsQ4<Weights>, prepared_bytes_tiles>(rows, prepared, tokens, cols, out, out_stride);
    return;
  }
  const TileConfig config;
  asm volatile("ldtilecfg %0" ::"m"(config));
  const TileCall call{*rows, static_cast<const uint8_t*>(prepared), tokens, cols, out, out_stride};
  for (int64_t t = 0; t < tokens; t += kManyTokens) {
    const int64_t some = tokens - t < kManyTokens ? tokens - t : kManyTokens;
    for (int64_t i = 0; i < rows->count; i += kBlockRows) {
      BlockMeetsTokens(call, i, t, some).run<kCodes>();
    }
  }
  _tile_release();
}

template <typename Weights, const int8_t* kCodes>
constexpr Kernels kernels_tiles() {
  Kernels kernels = kernels_q4<Weights, kCodes>();
  kernels.prepared_bytes = prepared_bytes_tiles;
  kernels.prepare = prepare_tiles<Weights>;
  kernels.dots = dots_tiles<Weights, kCodes>;
  return kernels;
}
