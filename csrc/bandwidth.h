// How fast this machine reads memory: the ceiling of decoding.
#pragma once

#include <cstdint>

// Reads `count` words once, with several streams in each thread that are fetched ahead into the
// first or second cache; returns their sum.
uint64_t read_all(const uint64_t* words, int64_t count, int threads, int cache);
