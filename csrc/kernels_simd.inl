// The SIMD kernels on f16, q8, q4 and q4_0 rows and on sign bits, and their tables. See
// kernels_rows.inl.

constexpr int kParts = TILE_GROUPS / kLanes;  // registers that hold a tile's groups
constexpr int kPieces = GROUP / kLanes;       // registers that hold a group's weights

// -- x as floats, zeros behind: f16 and q8 -------------------------------------------------------

int64_t prepared_bytes(int cols) { return round_up(cols, GROUP) * sizeof(float); }

void prepare(const float* x, int cols, void* prepared) {
  float* out = static_cast<float*>(prepared);
  __builtin_memcpy(out, x, cols * sizeof(float));
  for (int c = cols; c < round_up(cols, GROUP); ++c) out[c] = 0;
}

int64_t sum_floats(int cols) { return round_up(cols, 2 * GROUP); }

void add_sum(const float* sum, int cols, float* out) {
  for (int c = 0; c < cols; ++c) out[c] += sum[c];
}

// -- f16 -----------------------------------------------------------------------------------------

void dequantise_f16(const uint8_t* row, float* out, int cols) {
  for (int c = 0; c < cols; c += kLanes) {
    alignas(64) float piece[kLanes];
    store(piece, from_halves(row + 2 * c, smaller(cols - c, kLanes)));
    __builtin_memcpy(out + c, piece, smaller(cols - c, kLanes) * sizeof(float));
  }
}

// Whole cache lines: x has zeros where the row has its padding.
struct DotsF16 : Dots {
  static constexpr int kBits = 16;

  template <int N, int T>
  void run(int64_t i, int64_t token) const {
    Group<N, 2 * GROUP> group(rows, i, ahead);
    Floats sums[N][T];
    for (int n = 0; n < N; ++n) {
      for (int t = 0; t < T; ++t) sums[n][t] = zero();
    }
    for (int c = 0; c < cols; c += GROUP) {
      group.step();
      for (int n = 0; n < N; ++n) {
#pragma GCC unroll 8
        for (int k = 0; k < kPieces; ++k) {
          const Floats w = from_halves(group.row[n] + 2 * (c + k * kLanes));
#pragma GCC unroll 2
          for (int t = 0; t < T; ++t) {
            const Floats piece = load(x<float>(token + t) + c + k * kLanes);
            sums[n][t] = multiply_add(w, piece, sums[n][t]);
          }
        }
      }
    }
    write(i, token, sums);
  }
};

struct AxpysF16 : Axpys {
  static constexpr int kBits = 16, kApart = kLanes, kAlike = kWide;

  static void unpack(const uint8_t* row, int cols, int c, float* out, float*) {
    for (int k = 0; k < smaller(round_up(cols - c, GROUP), kPiece); k += kLanes) {
      store(out + k, from_halves(row + 2 * (c + k)));
    }
  }
  ALWAYS_INLINE static Floats scaled(float a, const float*, int) { return broadcast(a); }
  ALWAYS_INLINE static void fetch(const uint8_t* row, int, int c) {
    prefetch(row + 2 * c, 2 * kPiece);
  }

  template <int N>
  void run(int64_t i) const {
    Group<N, 2 * GROUP> group(rows, i, ahead);
    Floats a[N];
    for (int n = 0; n < N; ++n) a[n] = broadcast(coefficients[i + n]);
    for (int c = 0; c < cols; c += GROUP) {
      group.step();
#pragma GCC unroll 8
      for (int k = c; k < c + GROUP; k += kLanes) {
        Floats y = load(sum + k);
        for (int n = 0; n < N; ++n) y = multiply_add(from_halves(group.row[n] + 2 * k), a[n], y);
        store(sum + k, y);
      }
    }
  }
};

// -- q8 ------------------------------------------------------------------------------------------

// The scales of a tile's groups, zeros behind, in memory, from where they are broadcast.
void load_scales(const uint8_t* halves, int groups, float* out) {
  for (int from = 0; from < TILE_GROUPS; from += kLanes) {
    store(out + from,
          from < groups ? from_halves(halves + 2 * from, smaller(groups - from, kLanes)) : zero());
  }
}

void dequantise_q8(const uint8_t* row, float* out, int cols) {
  for (int c = 0; c < cols; c += GROUP) {
    alignas(64) float scale[kLanes], piece[GROUP];
    store(scale, from_halves(row + cols + c / GROUP * 2, 1));
    for (int k = 0; k < GROUP; k += kLanes) {
      store(piece + k, multiply(broadcast(scale[0]), from_bytes(row + c + k)));
    }
    __builtin_memcpy(out + c, piece, sizeof piece);
  }
}

struct DotsQ8 : Dots {
  static constexpr int kBits = 8;

  template <int N, int T>
  void run(int64_t i, int64_t token) const {
    Group<N, GROUP + 2> group(rows, i, ahead);
    alignas(64) float scales[N][TILE_GROUPS];
    Floats sums[N][T];
    for (int n = 0; n < N; ++n) {
      for (int t = 0; t < T; ++t) sums[n][t] = zero();
    }
    for (int tile = 0; tile < cols; tile += TILE) {
      const int scales_at = cols + tile / GROUP * 2;
      for (int n = 0; n < N; ++n) {
        load_scales(group.row[n] + scales_at, (cols - tile) / GROUP, scales[n]);
      }
      for (int c = tile; c < smaller(tile + TILE, cols); c += GROUP) {
        group.step();
        for (int n = 0; n < N; ++n) {
          Floats product[T];
#pragma GCC unroll 8
          for (int k = 0; k < GROUP; k += kLanes) {
            const Floats w = from_bytes(group.row[n] + c + k);
#pragma GCC unroll 2
            for (int t = 0; t < T; ++t) {
              const Floats piece = load(x<float>(token + t) + c + k);
              product[t] = k == 0 ? multiply(w, piece) : multiply_add(w, piece, product[t]);
            }
          }
          const Floats scale = broadcast(scales[n][(c - tile) / GROUP]);
          for (int t = 0; t < T; ++t) sums[n][t] = multiply_add(product[t], scale, sums[n][t]);
        }
      }
    }
    write(i, token, sums);
  }
};

struct AxpysQ8 : Axpys {
  static constexpr int kBits = 8, kApart = kLanes, kAlike = kPieces;

  static void unpack(const uint8_t* row, int cols, int c, float* out, float* scales) {
    load_scales(row + cols + c / GROUP * 2, smaller(cols - c, kPiece) / GROUP, scales);
    for (int k = 0; k < smaller(cols - c, kPiece); k += kLanes) {
      store(out + k, from_bytes(row + c + k));
    }
  }
  ALWAYS_INLINE static Floats scaled(float a, const float* scales, int c) {
    return broadcast(scales[c / GROUP] * a);
  }
  ALWAYS_INLINE static void fetch(const uint8_t* row, int cols, int c) {
    prefetch(row + c, kPiece);
    prefetch(row + cols + c / GROUP * 2, 1);
  }

  template <int N>
  void run(int64_t i) const {
    Group<N, GROUP + 2> group(rows, i, ahead);
    alignas(64) float a[N][TILE_GROUPS];  // coefficient times scale
    for (int tile = 0; tile < cols; tile += TILE) {
      const int scales_at = cols + tile / GROUP * 2;
      for (int n = 0; n < N; ++n) {
        load_scales(group.row[n] + scales_at, (cols - tile) / GROUP, a[n]);
        for (int g = 0; g < TILE_GROUPS; ++g) a[n][g] *= coefficients[i + n];
      }
      for (int c = tile; c < smaller(tile + TILE, cols); c += GROUP) {
        group.step();
#pragma GCC unroll 8
        for (int k = c; k < c + GROUP; k += kLanes) {
          Floats y = load(sum + k);
          for (int n = 0; n < N; ++n) {
            const Floats w = from_bytes(group.row[n] + k);
            y = multiply_add(w, broadcast(a[n][(c - tile) / GROUP]), y);
          }
          store(sum + k, y);
        }
      }
    }
  }
};

// -- q4 and q4_0 ---------------------------------------------------------------------------------

// Part of a tile of a row: a lane is a group, and the last tile of a row may have fewer.
struct Nibbles {
  int groups;             // of the tile
  int lanes;              // of this part
  int64_t words, scales;  // where they lie in the row

  Nibbles(int cols, int tile, int part)
      : groups(smaller((cols - tile) / GROUP, TILE_GROUPS)),
        lanes(smaller(groups - part * kLanes, kLanes)),
        words(tile / 2 + 4 * part * kLanes),
        scales(cols / 2 + tile / GROUP * 2 + 2 * part * kLanes) {}

  ALWAYS_INLINE Ints word(const uint8_t* row, int r) const {
    return load_words(row + words + 4 * groups * r, lanes);
  }
  Floats scale(const uint8_t* row) const { return from_halves(row + scales, lanes); }
};

template <const int8_t* kCodes>
void dequantise_q4(const uint8_t* row, float* out, int cols) {
  for (int tile = 0; tile < cols; tile += TILE) {
    const int groups = smaller((cols - tile) / GROUP, TILE_GROUPS);
    alignas(64) float scales[TILE_GROUPS];
    load_scales(row + cols / 2 + tile / GROUP * 2, groups, scales);
    for (int g = 0; g < groups; ++g, out += GROUP) {
      for (int i = 0; i < GROUP / 2; ++i) {
        const uint8_t byte = row[tile / 2 + (i / 4 * groups + g) * 4 + i % 4];
        out[i] = scales[g] * kCodes[byte & 15];
        out[i + GROUP / 2] = scales[g] * kCodes[byte >> 4];
      }
    }
  }
}

int64_t prepared_bytes_q4(int cols) { return round_up(cols, TILE) / TILE * sizeof(Q4Tile); }

// One group of x as integers up to 127 * 256; returns their scale, a power of two, or NaN if any x
// is not finite. Plain loops: the compiler vectorises them.
float to_integers(const float* x, int32_t* integers) {
  int32_t bits[GROUP], largest = 27 << 23;  // 2^-100: of what is smaller little remains
  __builtin_memcpy(bits, x, sizeof bits);
  for (int i = 0; i < GROUP; ++i) {
    const int32_t magnitude = bits[i] & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  const bool finite = largest < 0x7f800000;
  const int exponent =
      (largest + 0x10100) >> 23;  // biased; the next one where rounding needs 128 * 256
  const int32_t scale_bits = finite ? (exponent - 14) << 23 : 0x7fc00000;
  const int32_t inverse_bits = (2 * 127 - exponent + 14) << 23;
  float scale, inverse;
  __builtin_memcpy(&scale, &scale_bits, sizeof scale);
  __builtin_memcpy(&inverse, &inverse_bits, sizeof inverse);
  // what is added brings the rounded integer to the last bits
  constexpr float kShift = 0x1.8p23f;
  constexpr int32_t kShiftBits = 0x4b400000;
  for (int i = 0; i < GROUP; ++i) {
    const float shifted = (finite ? x[i] * inverse : 0) + kShift;
    __builtin_memcpy(bits + i, &shifted, sizeof shifted);
    integers[i] = bits[i] - kShiftBits;
  }
  return scale;
}

// Puts the integers of group g into the tile's halves; returns the sum of each.
template <bool kWhole>
void put_integers(const int32_t* integers, int g, Q4Tile* out, int32_t (&sums)[2]) {
  if (kWhole) {
    for (int i = 0; i < GROUP; ++i) {
      out->whole[i % 2][i / 4][2 * g + i % 4 / 2] = static_cast<int16_t>(integers[i]);
      sums[i % 2] += integers[i];
    }
    return;
  }
  int8_t limbs[2][GROUP];  // apart from where they go: the compiler vectorises this
  for (int i = 0; i < GROUP; ++i) {
    const int32_t high = (integers[i] + 128) >> 8, low = integers[i] - 256 * high;
    limbs[0][i] = static_cast<int8_t>(high);
    limbs[1][i] = static_cast<int8_t>(low);
    sums[0] += high;
    sums[1] += low;
  }
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < GROUP; i += 4) {
      __builtin_memcpy(out->limbs[half][i / 4] + 4 * g, limbs[half] + i, 4);
    }
  }
}

template <typename Weights>
void prepare_q4(const float* x, int cols, void* prepared) {
  Q4Tile* out = static_cast<Q4Tile*>(prepared);
  for (int tile = 0; tile < cols; tile += TILE, ++out) {
    const int groups = smaller((cols - tile) / GROUP, TILE_GROUPS);
    if (groups < TILE_GROUPS) __builtin_memset(out, 0, sizeof *out);
    for (int g = 0; g < groups; ++g, x += GROUP) {
      int32_t integers[GROUP], sums[2] = {};
      out->scale[g] = to_integers(x, integers);
      put_integers<Weights::kWhole>(integers, g, out, sums);
      for (int half = 0; half < 2; ++half) out->start[half][g] = -Weights::kZero * sums[half];
      if (Weights::kWhole) out->start[0][g] += out->start[1][g];
    }
  }
}

template <typename Weights>
struct DotsQ4 : Dots {
  static constexpr int kBits = 4;
  static constexpr int kSums = Weights::kWhole ? 1 : 2;  // whole integers add up in one

  template <int N, int T>
  void run(int64_t i, int64_t token) const {
    Group<N, kLanes * 9 / 2> group(rows, i, ahead);
    Floats totals[N][T];
    for (int n = 0; n < N; ++n) {
      for (int t = 0; t < T; ++t) totals[n][t] = zero();
    }
    for (int tile = 0; tile < cols; tile += TILE) {
      for (int part = 0; part < kParts; ++part) {
        const Nibbles nibbles(cols, tile, part);
        if (nibbles.lanes <= 0) break;
        add_products(group, nibbles, token, tile / TILE, part * kLanes, totals);
      }
    }
    write(i, token, totals);
  }

  // Adds the products of one part of a tile.
  template <int N, int T, int StepBytes>
  ALWAYS_INLINE void add_products(Group<N, StepBytes>& group, const Nibbles& nibbles, int64_t token,
                                  int tile, int lane, Floats (&total)[N][T]) const {
    const Q4Tile* tiles[T];
    Ints sums[N][T][kSums];
    for (int t = 0; t < T; ++t) {
      tiles[t] = x<Q4Tile>(token + t) + tile;
      for (int n = 0; n < N; ++n)
        for (int half = 0; half < kSums; ++half) {
          sums[n][t][half] = Weights::first_products(tiles[t]->start[half] + lane);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      group.step();
      Ints w[N][2];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const Ints word = nibbles.word(group.row[n], r);
        w[n][0] = Weights::low(word);
        w[n][1] = Weights::high(word);
      }
#pragma GCC unroll 2
      for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const Ints x0 = load_ints(tiles[t]->limbs[half][r] + 4 * lane);
          const Ints x1 = load_ints(tiles[t]->limbs[half][4 + r] + 4 * lane);
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) {
            Ints& sum = sums[n][t][half % kSums];
            sum = Weights::products(Weights::products(sum, w[n][0], x0, half), w[n][1], x1, half);
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) {
      const Floats x_scale = load(tiles[t]->scale + lane);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const Floats product = Weights::total(sums[n][t], *tiles[t], lane);
        const Floats scale = multiply(nibbles.scale(group.row[n]), x_scale);
        total[n][t] = multiply_add(product, scale, total[n][t]);
      }
    }
  }
};

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

template <typename Weights>
struct AxpysQ4 : Axpys {
  static constexpr int kBits = 4, kApart = TILE_GROUPS, kAlike = kWide;

  // A piece is a word of each group of a tile.
  static void unpack(const uint8_t* row, int cols, int c, float* out, float* scales) {
    const int tile = c / TILE * TILE, r = (c - tile) / kPiece;
    for (int part = 0; part < kParts; ++part) {
      const Nibbles nibbles(cols, tile, part);
      if (nibbles.lanes <= 0) break;
      store(scales + part * kLanes, nibbles.scale(row));
      const auto words = Weights::expand(nibbles.word(row, r));
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) {
        store(out + k * TILE_GROUPS + part * kLanes, Weights::weight(words, k));
      }
    }
  }
  ALWAYS_INLINE static Floats scaled(float a, const float* scales, int c) {
    return multiply(broadcast(a), load(scales + c % TILE_GROUPS));
  }
  ALWAYS_INLINE static void fetch(const uint8_t* row, int cols, int c) {
    prefetch(row + c / 2, kPiece / 2);
    prefetch(row + cols / 2 + c / GROUP * 2, 1);
  }

  template <int N>
  void run(int64_t i) const {
    Group<N, kLanes * 9 / 2> group(rows, i, ahead);
    for (int tile = 0; tile < cols; tile += TILE) {
      for (int part = 0; part < kParts; ++part) {
        const Nibbles nibbles(cols, tile, part);
        if (nibbles.lanes <= 0) break;
        Floats a[N];
        for (int n = 0; n < N; ++n) {
          a[n] = multiply(broadcast(coefficients[i + n]), nibbles.scale(group.row[n]));
        }
        for (int r = 0; r < 4; ++r) {
          group.step();
          float* y = sum + tile + 8 * r * TILE_GROUPS + part * kLanes;
          add_word(group, nibbles, r, a, y);
        }
      }
    }
  }

  // Adds the eight nibbles of word r.
  template <int N, int StepBytes>
  ALWAYS_INLINE void add_word(const Group<N, StepBytes>& group, const Nibbles& nibbles, int r,
                              const Floats (&a)[N], float* at) const {
    Floats y[8];
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) y[k] = load(at + k * TILE_GROUPS);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const auto words = Weights::expand(nibbles.word(group.row[n], r));
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) y[k] = multiply_add(Weights::weight(words, k), a[n], y[k]);
    }
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) store(at + k * TILE_GROUPS, y[k]);
  }
};

// -- sign bits -----------------------------------------------------------------------------------

void agreements(const Rows* rows, const uint64_t* bits, int words, int32_t* out) {
  constexpr int kBytes = 8 << 10;
  const int64_t ahead = rows_ahead(8 * words, kBytes);
  for (int64_t i = 0; i < rows->count; ++i) {
    const uint64_t* row = reinterpret_cast<const uint64_t*>(row_at(*rows, i));
    prefetch(row_at(*rows, i + ahead < rows->count ? i + ahead : i), 8 * words);
    int32_t sum = 0;
    for (int w = 0; w < words; ++w) sum += __builtin_popcountll(~(row[w] ^ bits[w]));
    out[i] = sum;
  }
}

// -- the tables ----------------------------------------------------------------------------------

// All tokens of a step meet some rows, then the next ones: while they compute, those come from
// memory. The tokens of a prompt go through all rows, a few at a time that the nearest cache holds.
template <typename Kernel, int64_t (*bytes)(int)>
void dots(const Rows* rows, const void* prepared, int64_t tokens, int cols, float* out,
          int64_t out_stride) {
  constexpr int64_t kStep = 16;
  const Ahead ahead(*rows, Kernel::kBits, cols);
  const int64_t together = tokens <= kStep ? tokens : kDotTokens;
  for (int64_t t = 0; t < tokens; t += together) {
    const int64_t some = tokens - t < together ? tokens - t : together;
    const char* x = static_cast<const char*>(prepared) + t * bytes(cols);
    const Kernel kernel{{*rows, ahead, x, bytes(cols), cols, out + t * out_stride, out_stride}};
    for_rows(MeetTokens<Kernel>{kernel, some}, rows->count);
  }
}

template <typename Kernel, int64_t (*floats)(int)>
void axpys(const Rows* rows, const float* coefficients, int64_t stride, int64_t tokens, int cols,
           float* sums) {
  if (tokens >= kMany) {
    axpys_many<Kernel>(*rows, coefficients, stride, tokens, cols, sums, floats(cols));
    return;
  }
  const Ahead ahead(*rows, Kernel::kBits, cols);
  for (int64_t t = 0; t < tokens; ++t) {
    for_rows(Kernel{{*rows, ahead, coefficients + t * stride, cols, sums + t * floats(cols)}},
             rows->count);
  }
}

template <typename Weights, const int8_t* kCodes>
constexpr Kernels kernels_q4() {
  return {dequantise_q4<kCodes>,
          prepared_bytes_q4,
          prepare_q4<Weights>,
          dots<DotsQ4<Weights>, prepared_bytes_q4>,
          sum_floats_q4,
          axpys<AxpysQ4<Weights>, sum_floats_q4>,
          add_sum_q4};
}

constexpr Kernels kKernels[QUANTS] = {
    {dequantise_f16, prepared_bytes, prepare, dots<DotsF16, prepared_bytes>, sum_floats,
     axpys<AxpysF16, sum_floats>, add_sum},
    {dequantise_q8, prepared_bytes, prepare, dots<DotsQ8, prepared_bytes>, sum_floats,
     axpys<AxpysQ8, sum_floats>, add_sum},
    kernels_q4<Coded, Q4_CODES>(),
    kernels_q4<Linear, Q4_0_CODES>(),
};
