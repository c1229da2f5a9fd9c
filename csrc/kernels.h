// The kernels on one row of weights, as a plain-C table.
//
// A row is `cols` weights: payload, then zeros up to a multiple of 64 bytes.
//   f16  cols halves, little-endian
//   q8   cols int8, then cols/32 half scales             weight = scale * int8
//   q4   cols/2 bytes of nibbles, then cols/32 half scales   weight = scale * (nibble - 8)
// The nibbles of q4 lie in tiles of 16 groups of 32 weights, the last tile having fewer groups, G:
// [word r = 0..3][group g = 0..G-1][byte b = 0..3]. Byte 4r + b of a group holds its weight 4r + b
// in the low nibble and weight 4r + b + 16 in the high one, so one 32-bit lane holds one group.
//
// This header stays free of inline functions and templates: each instruction set is compiled with
// its own flags, and the linker would merge such functions across them.
#pragma once

#include <stdint.h>

enum Quant { QUANT_F16, QUANT_Q8, QUANT_Q4, QUANTS };

enum { GROUP = 32, TILE_GROUPS = 16, TILE = GROUP * TILE_GROUPS, ROW_ALIGNMENT = 64 };

// Some rows of weights: number `indices[i]`, or i itself where indices is null, for each i < count.
struct Rows {
  const uint8_t* data;
  int64_t stride;
  const int32_t* indices;
  int64_t count;
};

// The kernels of one quantisation on one instruction set. One token meets many rows: several
// are read side by side and the next ones prefetched; `prepared` and `sum` are aligned to 64 bytes.
struct Kernels {
  void (*dequantise_row)(const uint8_t* row, float* out, int cols);

  // out[i] = row i · x, where `prepared` holds x in the form that the instruction set wants. A NaN
  // or infinity in x makes NaN or infinity in every product.
  int64_t (*prepared_bytes)(int cols);
  void (*prepare)(const float* x, int cols, void* prepared);
  void (*dots)(const struct Rows* rows, const void* prepared, int cols, float* out);

  // sum += coefficients[i] * row i, in an order of its own: [sum_floats(cols)], zeros at first.
  // `add_sum` puts it in the order of the columns: out[cols] += sum.
  int64_t (*sum_floats)(int cols);
  void (*axpys)(const struct Rows* rows, const float* coefficients, int cols, float* sum);
  void (*add_sum)(const float* sum, int cols, float* out);
};

// One x of a q4 product as integers, a group of 32 at a time: x = scale * (65536 a + 256 b + c), to
// 22 bits, with a, b, c in -128..127. With powers of two as scales the products of integers are
// exact. In a tile: the three limbs, [half][word][group][byte] as the nibbles lie; what their
// products start from, -8 times the sum of a group; the scales.
struct Q4Tile {
  int8_t limbs[3][8][4 * TILE_GROUPS];
  int32_t start[3][TILE_GROUPS];
  float scale[TILE_GROUPS];
};

// Of each instruction set: `quant` counts from QUANT_F16. Reference: portable C++, on every
// machine, what the others are tested against.
extern const struct Kernels reference_kernels[QUANTS];
#ifdef TURBOSPARSE_X86
extern const struct Kernels avx2_kernels[QUANTS];
extern const struct Kernels avx512_kernels[QUANTS];
#endif
