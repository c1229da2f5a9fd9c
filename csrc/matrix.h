// The two things that hold weights: a matrix, and the neurons of an FFN. Neither owns its bytes.
//
// Shapes: T tokens, H hidden size, C cols. All float arrays are dense and row-major.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels.h"
#include "store.h"

// The instruction sets of this machine, the best one first; the one in use, which TURBOSPARSE_ISA
// overrides; another one for the calls to come. A name that the machine does not have throws
// std::invalid_argument.
std::vector<std::string> available_isas();
std::string isa();
void set_isa(const std::string& name);
const Kernels& kernels_of(Quant quant);
using Agreements = decltype(KernelSet::agreements);
Agreements agreements();

// How the rows of the calls to come are fetched ahead, by those that follow each other and others;
// rows that are.
void set_fetching(const Fetching& together, const Fetching& scattered);
Rows rows_at(const void* data, int64_t stride, const int32_t* indices, int64_t count);

// Bytes from one row to the next.
int64_t row_stride(Quant quant, int cols);

struct Matrix {
  const uint8_t* data;  // [rows, row_stride(quant, cols)]
  int64_t rows;
  int cols;
  Quant quant;

  int64_t stride() const { return row_stride(quant, cols); }
  void row(int64_t index, float* out) const;  // out[C]
};

// x[T, H] to which sections add, with the sums of the squares that its next norm needs.
struct Residual {
  static constexpr int kPiece = 8;  // columns whose squares are summed by one thread

  int hidden;
  std::vector<float> x;
  std::vector<double> squares;  // [T, ceil(H / kPiece)]

  int pieces() const { return (hidden + kPiece - 1) / kPiece; }
  void resize(int64_t tokens);
  // x[t, from...] += y[count]. The columns are whole pieces, the last one as far as it goes.
  void add(int64_t t, int64_t from, int64_t count, const float* y);
};

// out[T, count()] = x[T, C] · Wᵀ + bias, with all rows or with some by number; it is added to a
// residual stream, where there is one.
struct Product {
  const Matrix* matrix;
  float* out;
  const int32_t* indices = nullptr;
  int64_t some = 0;
  const float* bias = nullptr;
  Residual* residual = nullptr;

  int64_t count() const { return indices ? some : matrix->rows; }
  void run(int64_t from, int64_t end, const void* prepared, int64_t tokens) const;
};

// Products of the same x with matrices of as many columns, in one section, beside which one of the
// threads does what else there is to do.
void multiply(const std::vector<Product>& products, const float* x, int64_t tokens, int threads,
              const std::function<void()>& beside = nullptr);

enum class Activation { kDrelu, kGeglu, kReglu, kRelu, kRelu2, kSwiglu };

// Which rows are read. Dense: all. Exact: all gates, and of the others what does not meet only
// zeros. Predicted: as exact, of the candidates of a predictor.
enum class Mode { kDense, kExact, kPredicted };

class Predictor;

// Neurons in spans, of which another device computes some.
struct Spans {
  static constexpr int64_t kNeurons = 64;  // of a span; the last one may have fewer

  const uint8_t* elsewhere;  // [spans]: not 0 where none of the neurons is computed here
  int32_t* uses;             // [spans]: outside dense mode, plus those with Combined not zero
};

struct Neurons {
  // Hot neurons come first, so threads take turns at small chunks to share them evenly.
  static constexpr int64_t kChunk = 16;
  static_assert(Spans::kNeurons % kChunk == 0);

  enum Part { kGate, kUp, kDown };

  // Ungated, up is its own gate: the up rows are the gates, and pairs hold the down columns alone.
  const uint8_t* gates;  // [neurons, gate row]; of a store its places
  const uint8_t* pairs;  // [neurons, up row and down column]; the same
  int64_t neurons;
  int hidden;
  Quant quants[3];  // of each part
  Activation activation;
  float threshold;                    // a gate at most this large is inactive: FATReLU
  const Predictor* predictor;         // null: there is none
  Stored stored_gates, stored_pairs;  // of bundles the same
  int64_t bundle = 0;  // bytes from a bundle, gate row and pair, to the next; 0: they lie apart

  bool gated() const { return activation != Activation::kRelu && activation != Activation::kRelu2; }
  int64_t up_stride() const;  // bytes of the up row of a pair
  int64_t most_held(int threads) const;

  // out[T, H] = Combined · Wdown, with Combined[T, neurons] = activation(x · Wgateᵀ, x · Wupᵀ).
  // counts[T, 3] = candidates (outside predicted mode all neurons), of these those with a gate
  // above the threshold, and those whose Combined is not zero. residual[T, H], which x is the norm
  // of, is for the predictor. Outside dense mode the activation must have exact zeros. The same
  // number of threads gives the same bits, wherever the rows lie. out is added to `sum`, where
  // there is one. With spans, all this is of the neurons that are not elsewhere. Throws ReadError
  // where rows are on disk.
  void forward(const float* x, const float* residual, float* out, int32_t* counts, int64_t tokens,
               Mode mode, int threads, Residual* sum = nullptr, const Spans* spans = nullptr) const;
};
