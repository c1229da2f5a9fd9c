#include "matrix.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "threads.h"

namespace {

// Hot neurons come first, so threads take turns at small chunks to share them evenly.
constexpr int64_t kChunk = 16;

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

// What one thread owns during Neurons::forward.
struct Share {
  Share(int64_t tokens, int64_t hidden)
      : row(hidden), gate(tokens), up(tokens), out(tokens * hidden), counts(tokens * 2) {}

  std::vector<float> row;       // [H] the row at hand, dequantised
  std::vector<float> gate, up;  // [T] pre-activations of the neuron at hand
  std::vector<float> out;       // [T, H] sum over this thread's neurons
  std::vector<int32_t> counts;  // [T, 2]
};

// One call of Neurons::forward.
struct Pass {
  const Neurons& ffn;
  const Kernels& kernels;
  const int64_t stride;
  const float* x;
  const int64_t tokens;
  const bool exact;

  // pre[T] = x · row
  void project(const uint8_t* row, float* buffer, float* pre) const {
    kernels.dequantise_row(row, buffer, ffn.hidden);
    for (int64_t t = 0; t < tokens; ++t) {
      pre[t] = kernels.dot(buffer, x + t * ffn.hidden, ffn.hidden);
    }
  }

  // Carries one neuron through gate, up and down.
  void visit(int64_t neuron, Share& share) const {
    const uint8_t* gate_row = ffn.data + neuron * 3 * stride;
    const uint8_t* up_row = gate_row + stride;
    const uint8_t* down_column = up_row + stride;
    const bool gated = ffn.activation != Activation::kRelu;  // else up is its own gate
    float* row = share.row.data();
    float* gate = share.gate.data();
    float* up = gated ? share.up.data() : gate;

    project(gated ? gate_row : up_row, row, gate);
    bool needed = !exact;
    for (int64_t t = 0; t < tokens; ++t) {
      share.counts[2 * t] += gate[t] > 0;
      needed |= relu(gate[t]) != 0;
    }
    if (!needed) return;

    if (gated) project(up_row, row, up);
    needed = !exact;
    for (int64_t t = 0; t < tokens; ++t) {
      up[t] = combine(ffn.activation, gate[t], up[t]);  // from here on `up` holds Combined
      share.counts[2 * t + 1] += up[t] != 0;
      needed |= up[t] != 0;
    }
    if (!needed) return;

    kernels.dequantise_row(down_column, row, ffn.hidden);
    for (int64_t t = 0; t < tokens; ++t) {
      if (up[t] != 0) kernels.axpy(up[t], row, share.out.data() + t * ffn.hidden, ffn.hidden);
    }
  }
};

}  // namespace

int64_t row_stride(Quant quant, int cols) {
  const int64_t scales = cols / GROUP * int64_t{2};
  const int64_t payload = quant == QUANT_F16  ? cols * int64_t{2}
                          : quant == QUANT_Q8 ? cols + scales
                                              : cols / 2 + scales;
  return (payload + ROW_ALIGNMENT - 1) / ROW_ALIGNMENT * ROW_ALIGNMENT;
}

void Matrix::row(int64_t index, float* out) const {
  reference_kernels(quant)->dequantise_row(data + index * row_stride(quant, cols), out, cols);
}

void Matrix::matmul(const float* x, float* out, int64_t tokens, int threads) const {
  const Kernels& kernels = *reference_kernels(quant);
  threads = worthwhile_threads(threads, rows * row_stride(quant, cols), tokens);
  std::vector<std::vector<float>> buffers(threads, std::vector<float>(cols));
  parallel(threads, [&](int thread) {
    float* buffer = buffers[thread].data();
    for (int64_t r = rows * thread / threads; r < rows * (thread + 1) / threads; ++r) {
      row(r, buffer);
      for (int64_t t = 0; t < tokens; ++t) {
        out[t * rows + r] = kernels.dot(buffer, x + t * cols, cols);
      }
    }
  });
}

void Neurons::forward(const float* x, float* out, int32_t* counts, int64_t tokens, bool exact,
                      int threads) const {
  const Pass pass{*this, *reference_kernels(quant), row_stride(quant, hidden), x, tokens, exact};
  threads = worthwhile_threads(threads, neurons * 3 * pass.stride, tokens);
  std::vector<Share> shares(threads, Share(tokens, hidden));
  parallel(threads, [&](int thread) {
    for (int64_t chunk = thread * kChunk; chunk < neurons; chunk += threads * kChunk) {
      const int64_t end = std::min(chunk + kChunk, neurons);
      for (int64_t neuron = chunk; neuron < end; ++neuron) pass.visit(neuron, shares[thread]);
    }
  });

  // The order of the threads is the order of the sum: the result does not depend on their timing.
  std::fill_n(out, tokens * hidden, 0.0f);
  std::fill_n(counts, tokens * 2, 0);
  for (const Share& share : shares) {
    for (int64_t i = 0; i < tokens * hidden; ++i) out[i] += share.out[i];
    for (int64_t i = 0; i < tokens * 2; ++i) counts[i] += share.counts[i];
  }
}
