// What the two binding files share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>

#include "matrix.h"

template <typename T, int Dims>
using Array = nanobind::ndarray<T, nanobind::ndim<Dims>, nanobind::c_contig, nanobind::device::cpu>;
using Bytes = Array<const uint8_t, 2>;

// The core's views, each with the array whose bytes it points into.
struct OwningMatrix : Matrix {
  Bytes owner;
};
struct OwningNeurons : Neurons {
  Bytes owner;
};

[[noreturn]] inline void fail(const std::string& message) { throw std::invalid_argument(message); }

void check_threads(int threads);
void bind_decoder(nanobind::module_& m);
