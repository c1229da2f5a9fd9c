// The kernels for AVX-512 with VBMI again, and those of 4-bit rows with several tokens for AMX.
#include "kernels_avx512.cpp"
