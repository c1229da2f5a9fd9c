// The kernels on one row of weights, as a plain-C table.
//
// A row is `cols` weights: payload, then zeros up to a multiple of 16 bytes, of f16 of 64, which
// the kernels read. It may begin at any byte.
//   f16  cols halves, little-endian
//   q8   cols int8, then cols/32 half scales             weight = scale * int8
//   q4   cols/2 bytes of nibbles, then cols/32 half scales   weight = scale * Q4_CODES[nibble]
//   q4_0 the same                                            weight = scale * (nibble - 8)
// The nibbles lie in tiles of 16 groups of 32 weights, the last tile having fewer groups, G:
// [word r = 0..3][group g = 0..G-1][byte b = 0..3]. Byte 4r + b of a group holds its weight 4r + b
// in the low nibble and weight 4r + b + 16 in the high one, so one 32-bit lane holds one group.
//
// This header stays free of inline functions and templates: each instruction set is compiled with
// its own flags, and the linker would merge such functions across them.
#pragma once

#include <stdint.h>

enum Quant { QUANT_F16, QUANT_Q8, QUANT_Q4, QUANT_Q4_0, QUANTS };

enum { GROUP = 32, TILE_GROUPS = 16, TILE = GROUP * TILE_GROUPS, CACHE_LINE = 64, ROW_STEP = 16 };

// What a nibble stands for. Those of q4 are the values of IQ4_NL in GGUF files: closer together
// near zero, where most weights are.
static const int8_t Q4_CODES[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                    1,    13,   25,  38,  53,  69,  89,  113};
static const int8_t Q4_0_CODES[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

// How the next rows are fetched while the present ones are at work. Which way is fast depends on
// the machine; what is computed does not.
enum FetchOrder { FETCH_NONE, FETCH_STREAM, FETCH_ASIDE, FETCH_ORDERS };
struct Fetching {
  int16_t order;  // not at all, one row after the other, or a line of each in turn
  int16_t cache;  // the nearest that it goes to: 1 or 2
  int32_t bytes;  // at least so far ahead
};

// Some rows of weights: number `indices[i]`, or i itself where indices is null, for each i < count.
struct Rows {
  const uint8_t* data;
  int64_t stride;
  const int32_t* indices;
  int64_t count;
  struct Fetching together, scattered;  // of rows that follow each other, and of others
};

// The kernels of one quantisation on one instruction set. Several rows are read side by side and
// the next ones prefetched; what is unpacked of a row serves some tokens at once. `prepared` and
// `sums` are aligned to 64 bytes.
struct Kernels {
  void (*dequantise_row)(const uint8_t* row, float* out, int cols);

  // out[t * out_stride + i] = row i · x of token t, where `prepared` holds the tokens' x in the
  // form that the instruction set wants, each in prepared_bytes(cols). A NaN or infinity in x makes
  // NaN or infinity in every product.
  int64_t (*prepared_bytes)(int cols);
  void (*prepare)(const float* x, int cols, void* prepared);
  void (*dots)(const struct Rows* rows, const void* prepared, int64_t tokens, int cols, float* out,
               int64_t out_stride);

  // sums[t] += coefficients[t * stride + i] * row i, in an order of its own: [tokens,
  // sum_floats(cols)], zeros at first. `add_sum` puts one in the order of the columns: out[cols] +=
  // sum.
  int64_t (*sum_floats)(int cols);
  void (*axpys)(const struct Rows* rows, const float* coefficients, int64_t stride, int64_t tokens,
                int cols, float* sums);
  void (*add_sum)(const float* sum, int cols, float* out);
};

// All kernels of an instruction set; `of` counts from QUANT_F16.
struct KernelSet {
  struct Kernels of[QUANTS];
  // out[i] = how many of 64 * words bits row i has in common with `bits`.
  void (*agreements)(const struct Rows* rows, const uint64_t* bits, int words, int32_t* out);
};

// One x of a q4 product as integers, a group of 32 at a time: x = scale * integer, to 15 bits. With
// powers of two as scales, small integers stay exact. In a tile: the integers as the nibbles lie,
// [half][word][group][byte], in two halves: either limbs a, b in -128..127 of 256 a + b, or whole
// ones, those of bytes 0 and 2 and those of bytes 1 and 3; what the products of each half start
// from (the first one those of both, of whole ones), as the bytes of weights are too large by some
// zero; the scales.
struct Q4Tile {
  union {
    int8_t limbs[2][8][4 * TILE_GROUPS];
    int16_t whole[2][8][2 * TILE_GROUPS];
  };
  int32_t start[2][TILE_GROUPS];
  float scale[TILE_GROUPS];
};

// Reference: portable C++, on every machine, what the others are tested against.
extern const struct KernelSet reference_kernels;
#ifdef TURBOSPARSE_X86
extern const struct KernelSet avx2_kernels;
extern const struct KernelSet avx512_kernels;
extern const struct KernelSet avx512vbmi_kernels;
#endif
#ifdef TURBOSPARSE_ARM
extern const struct KernelSet neon_kernels;
#endif
