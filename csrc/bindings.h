// What the two binding files share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <variant>

#include "matrix.h"

template <typename T, int Dims>
using Array = nanobind::ndarray<T, nanobind::ndim<Dims>, nanobind::c_contig, nanobind::device::cpu>;
using Bytes = Array<const uint8_t, 2>;

// The core's views, each with the array whose bytes it points into.
struct OwningMatrix : Matrix {
  Bytes owner;
};
// A tensor of rows that a store reads, with the store.
struct OwningRows : Stored {
  int64_t rows;
  nanobind::object owner;
};
using AnyRows = std::variant<Bytes, OwningRows>;
struct OwningNeurons : Neurons {
  AnyRows gates_owner;
  std::optional<AnyRows> pairs_owner;
  nanobind::object predictor_owner;
};

[[noreturn]] inline void fail(const std::string& message) { throw std::invalid_argument(message); }

constexpr const char* kQuants[] = {"f16", "q8", "q4", "q4_0"};       // in the order of Quant
constexpr const char* kModes[] = {"dense", "exact", "predicted"};    // of Mode
constexpr const char* kFetchOrders[] = {"none", "stream", "aside"};  // of FetchOrder
// of Activation
constexpr const char* kActivations[] = {"drelu", "geglu", "reglu", "relu", "relu2", "swiglu"};

template <typename Enum, size_t N>
Enum parse(const char* what, const std::string& name, const char* const (&names)[N]) {
  std::string known;
  for (size_t i = 0; i < N; ++i) {
    if (name == names[i]) return static_cast<Enum>(i);
    known += (i ? ", " : "") + std::string(names[i]);
  }
  fail(std::string(what) + " is '" + name + "', expected one of " + known);
}

inline void check_equal(const std::string& what, int64_t value, int64_t expected) {
  if (value == expected) return;
  fail(what + ": " + std::to_string(value) + ", expected " + std::to_string(expected));
}

template <typename AnyArray, typename... Sizes>
void check_shape(const char* what, const AnyArray& array, Sizes... expected) {
  size_t axis = 0;
  std::string given, wanted;
  bool same = true;
  const auto compare = [&](size_t size) {
    const char* separator = axis ? ", " : "";
    given += separator + std::to_string(array.shape(axis));
    wanted += separator + std::to_string(size);
    same &= array.shape(axis++) == size;
  };
  (compare(expected), ...);
  if (!same) fail(std::string(what) + " has shape (" + given + "), expected (" + wanted + ")");
}

void check_threads(int threads);
void check_mode(Mode mode, const Neurons& neurons);
void bind_store(nanobind::module_& m);
void bind_predictors(nanobind::module_& m);
void bind_decoder(nanobind::module_& m);
