// The kernels for AVX-512 again, compiled for processors that permute bytes (VBMI): all but the
// oldest.
#include "kernels_avx512.cpp"
