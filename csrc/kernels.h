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

enum Quant { QUANT_F16, QUANT_Q8, QUANT_Q4 };

enum { GROUP = 32, TILE_GROUPS = 16, ROW_ALIGNMENT = 64 };

// The kernels of one quantisation on one instruction set.
struct Kernels {
  void (*dequantise_row)(const uint8_t* row, float* out, int cols);
  float (*dot)(const float* a, const float* b, int n);
  void (*axpy)(float a, const float* x, float* y, int n);  // y += a * x
};

// Portable C++, on every machine: what the other instruction sets are tested against.
const struct Kernels* reference_kernels(enum Quant quant);
