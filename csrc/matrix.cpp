#include "matrix.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "buffer.h"
#include "predictor.h"
#include "threads.h"

namespace {

// Hot neurons come first, so threads take turns at small chunks to share them evenly.
constexpr int64_t kChunk = 16;

// What several tokens read in turn: half of a common L2 cache.
constexpr int64_t kResidentBytes = 512 << 10;

// One token in dense mode: neighbouring rows are read soon after each other, which is 10 % faster
// than whole stages. In the other modes longer lists of survivors win: 24 against 19 GB/s of 64
// neurons.
constexpr int64_t kDenseStep = 256;

// A thread pays for its start, some microseconds, from about this many weight bytes times tokens
// on.
constexpr int64_t kBytesPerThread = 64 << 10;

int worthwhile_threads(int threads, int64_t bytes, int64_t tokens) {
  return static_cast<int>(std::min<int64_t>(threads, 1 + bytes * tokens / kBytesPerThread));
}

// A relu that keeps NaN, so that a broken input shows in the output.
float relu(float x) { return x < 0 ? 0 : x; }

float silu(float x) { return x / (1 + std::exp(-x)); }

float combine(Activation activation, float gate, float up) {
  switch (activation) {
    case Activation::kDrelu:
      return relu(gate) * relu(up);
    case Activation::kReglu:
      return relu(gate) * up;
    case Activation::kRelu:
      return relu(up);
    case Activation::kSwiglu:
      return silu(gate) * up;
  }
  return 0;
}

// One call of Neurons::forward.
struct Pass {
  const Neurons& ffn;
  const Kernels& kernels;
  const int64_t stride;
  const float* x;
  const int64_t tokens;
  const Mode mode;
  const Prediction* prediction;  // null: all neurons are candidates
  const int64_t threads;
  const bool gated = ffn.activation != Activation::kRelu;  // else up is its own gate

  enum Part { kGate, kUp, kDown };

  Rows rows(Part part, const int32_t* indices, int64_t count) const {
    return {ffn.data + part * stride, 3 * stride, indices, count};
  }

  // The neurons of a share: each of its chunks follows those of the other shares.
  std::vector<int32_t> share_of(int64_t thread) const {
    std::vector<int32_t> neurons;
    neurons.reserve(ffn.neurons / threads + kChunk);
    for (int64_t chunk = thread * kChunk; chunk < ffn.neurons; chunk += threads * kChunk) {
      for (int64_t i = chunk; i < std::min(chunk + kChunk, ffn.neurons); ++i) neurons.push_back(i);
    }
    return neurons;
  }
};

// Carries the tokens through the rows of a share, one by one: whole stages, so that many rows can
// be read side by side. A further token finds the rows in the cache. (Dequantising rows once for
// blocks of tokens was slower: 2.9 ms a token of a dense q4 FFN of 4096 x 14336, this takes 1.1.)
class Share {
 public:
  Share(const Pass& pass, const Prepared& prepared)
      : pass_(pass),
        prepared_(prepared),
        sum_floats_(pass.kernels.sum_floats(pass.ffn.hidden)),
        sums_(pass.tokens * sum_floats_, true),
        counts_(3 * pass.tokens) {}

  void run(int64_t thread) {
    const std::vector<int32_t> share = pass_.share_of(thread);
    const int64_t all = share.size();
    const int64_t alone = pass_.mode == Mode::kDense ? kDenseStep : all;
    const int64_t step =
        pass_.tokens == 1 ? alone : std::max(kChunk, kResidentBytes / (3 * pass_.stride));
    for (int64_t from = 0; from < all; from += step) {
      const int64_t end = std::min(from + step, all);
      for (int64_t t = 0; t < pass_.tokens; ++t) {
        neurons_.assign(share.begin() + from, share.begin() + end);
        if (pass_.prediction) pass_.prediction->keep_candidates(t, neurons_);
        visit(t);
      }
    }
  }

  void add_to(float* out, int32_t* counts) const {
    for (int64_t t = 0; t < pass_.tokens; ++t) {
      pass_.kernels.add_sum(sums_ + t * sum_floats_, pass_.ffn.hidden, out + t * pass_.ffn.hidden);
    }
    for (int64_t i = 0; i < 3 * pass_.tokens; ++i) counts[i] += counts_[i];
  }

 private:
  // Carries neurons_ through gate, up and down, those falling out that are not needed.
  void visit(int64_t t) {
    const bool gated = pass_.gated;
    int32_t* counts = &counts_[3 * t];
    counts[0] += neurons_.size();
    project(gated ? Pass::kGate : Pass::kUp, t, gate_);
    keep([&](int64_t i) {
      counts[1] += gate_[i] > 0;
      return relu(gate_[i]) != 0;
    });
    if (gated) project(Pass::kUp, t, up_);
    for (size_t i = 0; i < neurons_.size(); ++i) {
      gate_[i] = combine(pass_.ffn.activation, gate_[i], gated ? up_[i] : gate_[i]);
    }
    keep([&](int64_t i) {  // by now `gate_` is Combined
      counts[2] += gate_[i] != 0;
      return gate_[i] != 0;
    });
    const Rows down = pass_.rows(Pass::kDown, neurons_.data(), neurons_.size());
    pass_.kernels.axpys(&down, gate_.data(), pass_.ffn.hidden, sums_ + t * sum_floats_);
  }

  void project(Pass::Part part, int64_t t, std::vector<float>& out) {
    out.resize(neurons_.size());
    const Rows rows = pass_.rows(part, neurons_.data(), neurons_.size());
    pass_.kernels.dots(&rows, prepared_[t], pass_.ffn.hidden, out.data());
  }

  template <typename Needed>
  void keep(Needed needed) {
    size_t kept = 0;
    for (size_t i = 0; i < neurons_.size(); ++i) {
      if (!needed(i) && pass_.mode != Mode::kDense) continue;
      neurons_[kept] = neurons_[i];
      gate_[kept++] = gate_[i];
    }
    neurons_.resize(kept);
  }

  const Pass& pass_;
  const Prepared& prepared_;
  const int64_t sum_floats_;
  std::vector<int32_t> neurons_;
  std::vector<float> gate_, up_;  // pre-activations of neurons_
  Buffer sums_;
  std::vector<int32_t> counts_;
};

// Runs a share on each thread. The order of the threads is the order of the sum: the result does
// not depend on their timing.
void run_shares(const Pass& pass, const Prepared& prepared, float* out, int32_t* counts) {
  std::vector<std::unique_ptr<Share>> shares(pass.threads);
  for (auto& share : shares) share = std::make_unique<Share>(pass, prepared);
  parallel(pass.threads, [&](int thread) { shares[thread]->run(thread); });
  std::fill_n(out, pass.tokens * pass.ffn.hidden, 0.0f);
  std::fill_n(counts, pass.tokens * 3, 0);
  for (const auto& share : shares) share->add_to(out, counts);
}

}  // namespace

int64_t row_stride(Quant quant, int cols) {
  const int64_t scales = cols / GROUP * int64_t{2};
  const int64_t payload = quant == QUANT_F16  ? cols * int64_t{2}
                          : quant == QUANT_Q8 ? cols + scales
                                              : cols / 2 + scales;
  return (payload + ROW_ALIGNMENT - 1) / ROW_ALIGNMENT * ROW_ALIGNMENT;
}

void Matrix::row(int64_t index, float* out) const {
  kernels_of(quant).dequantise_row(data + index * row_stride(quant, cols), out, cols);
}

void Matrix::matmul(const float* x, float* out, int64_t tokens, int threads) const {
  const Kernels& kernels = kernels_of(quant);
  const int64_t stride = row_stride(quant, cols);
  threads = worthwhile_threads(threads, rows * stride, tokens);
  // Calls work(first row, rows) for the steps of each share.
  const auto for_rows = [&](int64_t step, auto work) {
    parallel(threads, [&](int thread) {
      const int64_t end = rows * (thread + 1) / threads;
      for (int64_t r = rows * thread / threads; r < end; r += step) {
        work(r, std::min(step, end - r));
      }
    });
  };
  const Prepared prepared(kernels, x, tokens, cols);
  for_rows(tokens == 1 ? rows : std::max<int64_t>(1, kResidentBytes / stride),
           [&](int64_t r, int64_t count) {
             const Rows some{data + r * stride, stride, nullptr, count};
             for (int64_t t = 0; t < tokens; ++t) {
               kernels.dots(&some, prepared[t], cols, out + t * rows + r);
             }
           });
}

void Neurons::forward(const float* x, const float* residual, float* out, int32_t* counts,
                      int64_t tokens, Mode mode, int threads) const {
  std::unique_ptr<Prediction> prediction;
  if (mode == Mode::kPredicted) prediction = predictor->begin(x, residual, tokens, threads);
  const int64_t stride = row_stride(quant, hidden);
  threads = worthwhile_threads(threads, neurons * 3 * stride, tokens);
  const Pass pass{*this, kernels_of(quant), stride, x, tokens, mode, prediction.get(), threads};
  run_shares(pass, Prepared(pass.kernels, x, tokens, hidden), out, counts);
}
