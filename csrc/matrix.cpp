#include "matrix.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include "buffer.h"
#include "predictor.h"
#include "threads.h"

namespace {

constexpr int64_t kChunk = Neurons::kChunk;

// What several tokens read in turn: half of a common L2 cache. Their sums take another part of it,
// which limits the tokens that go through a feed-forward together.
constexpr int64_t kResidentBytes = 512 << 10;
constexpr int64_t kTokenBlock = 32;

// One token in dense mode: neighbouring rows are read soon after each other, which is 10 % faster
// than whole stages. In the other modes longer lists of survivors win: 24 against 19 GB/s of 64
// neurons.
constexpr int64_t kDenseStep = 256;

// A thread pays for its start, some microseconds, from about this many weight bytes times tokens
// on.
constexpr int64_t kBytesPerThread = 64 << 10;

// More shares than threads: a thread that the system held up for a while leaves some to the others.
constexpr int kSharesPerThread = 4;

int worthwhile_threads(int threads, int64_t bytes, int64_t tokens) {
  return static_cast<int>(std::min<int64_t>(threads, 1 + bytes * tokens / kBytesPerThread));
}

// Zero up to the threshold. It keeps NaN, so that a broken input shows in the output.
float cut(float x, float threshold) { return x <= threshold ? 0 : x; }

float relu(float x) { return cut(x, 0); }

float silu(float x) { return x / (1 + std::exp(-x)); }

// erfc in double: 1 + erf cancels far below zero.
float gelu(float x) { return static_cast<float>(0.5 * x * std::erfc(x * -0.7071067811865476)); }

// gate[i] becomes Combined.
void combine(Activation activation, float threshold, float* gate, const float* up, size_t count) {
  const auto each = [&](auto formula) {
    for (size_t i = 0; i < count; ++i) gate[i] = formula(gate[i], up[i]);
  };
  switch (activation) {
    case Activation::kDrelu:
      return each([=](float g, float u) { return cut(g, threshold) * relu(u); });
    case Activation::kGeglu:
      return each([](float g, float u) { return gelu(g) * u; });
    case Activation::kReglu:
      return each([=](float g, float u) { return cut(g, threshold) * u; });
    case Activation::kRelu:
      return each([](float, float u) { return relu(u); });
    case Activation::kRelu2:
      return each([](float, float u) { return relu(u) * relu(u); });
    case Activation::kSwiglu:
      return each([](float g, float u) { return silu(g) * u; });
  }
}

// The rows of one part of a feed-forward, the kernels that read them, and the tokens' x for these.
struct PartRows {
  const Kernels& kernels;
  const uint8_t* data;
  const int64_t stride;
  const Prepared* x;  // null for downs, which no x meets
  const Stored& stored;
};

// One call of Neurons::forward.
struct Pass {
  const Neurons& ffn;
  const PartRows parts[3];
  const int64_t neuron_bytes;
  const int64_t tokens;
  const Mode mode;
  const Prediction* prediction;  // null: all neurons are candidates
  const int64_t threads;
  const int64_t held;  // neurons whose rows a share may hold; 0: all are in memory
  const Spans* spans;  // null: all neurons are computed here

  const Kernels& kernels(Neurons::Part part) const { return parts[part].kernels; }

  Rows rows(Neurons::Part part, const int32_t* indices, int64_t count) const {
    return rows_at(parts[part].data, parts[part].stride, indices, count);
  }

  // The neurons of a share: each of its chunks follows those of the other shares.
  std::vector<int32_t> share_of(int64_t thread) const {
    std::vector<int32_t> neurons;
    neurons.reserve(ffn.neurons / threads + kChunk);
    const auto take = [&](int64_t chunk) {
      for (int64_t i = chunk; i < std::min(chunk + kChunk, ffn.neurons); ++i) neurons.push_back(i);
    };
    if (!spans) {
      for (int64_t at = thread * kChunk; at < ffn.neurons; at += threads * kChunk) take(at);
      return neurons;
    }
    int64_t here = 0;
    for (int64_t at = 0; at < ffn.neurons; at += kChunk) {
      if (!spans->elsewhere[at / Spans::kNeurons] && here++ % threads == thread) take(at);
    }
    return neurons;
  }
};

// Computes a share of the neurons for all tokens, whole stages at a time, so that many rows are
// read side by side. While all tokens need the same rows they are computed together, then each
// alone.
class NeuronShare {
 public:
  explicit NeuronShare(const Pass& pass)
      : pass_(pass),
        sum_floats_(pass.kernels(Neurons::kDown).sum_floats(pass.ffn.hidden)),
        lists_(pass.tokens),
        sums_(pass.tokens * sum_floats_, true),
        counts_(3 * pass.tokens) {}

  void run(int64_t thread) {
    const std::vector<int32_t> share = pass_.share_of(thread);
    const int64_t all = share.size();
    const int64_t alone = pass_.mode == Mode::kDense ? kDenseStep : all;
    int64_t step =
        pass_.tokens == 1 ? alone : std::max(kChunk, 3 * kResidentBytes / pass_.neuron_bytes);
    if (pass_.held) {
      step = std::min(step, pass_.held);
      if (pass_.prediction) read_ahead(share);
    }
    for (int64_t from = 0; from < all; from += step) {
      run_stages(share.data() + from, std::min(step, all - from));
    }
  }

  // Its sum for token t, from column c on, and its counts.
  float* sum(int64_t t, int c) const { return sums_ + t * sum_floats_ + c; }
  const int32_t* counts(int64_t t) const { return &counts_[3 * t]; }
  // Of each span, how often a token needed a neuron of it; empty without spans, and in dense mode.
  const std::vector<int32_t>& uses() const { return uses_; }

 private:
  // Takes some neurons through gate, up and down, and drops those that a token does not need.
  void run_stages(const int32_t* neurons, int64_t count) {
    width_ = count;
    together_ = !pass_.prediction;
    for (int64_t t = 0; t < pass_.tokens; ++t) {
      if (!candidates_.empty()) {
        const auto from = candidates_[t].begin(), end = candidates_[t].end();
        lists_[t].assign(std::lower_bound(from, end, neurons[0]),
                         std::upper_bound(from, end, neurons[count - 1]));
      } else {
        lists_[t].assign(neurons, neurons + count);
        if (pass_.prediction) pass_.prediction->keep_candidates(t, lists_[t]);
      }
      counts_[3 * t] += lists_[t].size();
    }
    std::optional<Held> held(std::in_place, pass_.parts[Neurons::kGate].stored, lists_);
    project(Neurons::kGate, values_);
    const float threshold = pass_.ffn.threshold;
    compact(1, [=](float gate) { return !(gate <= threshold); });  // a NaN is kept, so it shows
    const bool gated = pass_.ffn.gated();
    if (!pass_.ffn.bundle) held.emplace(pass_.parts[Neurons::kDown].stored, lists_);
    if (gated) project(Neurons::kUp, ups_);
    const std::vector<float>& ups = gated ? ups_ : values_;
    for (int64_t t = 0; t < pass_.tokens; ++t) {
      combine(pass_.ffn.activation, threshold, &values_[t * width_], &ups[t * width_],
              lists_[t].size());
    }
    compact(2, [](float combined) { return combined != 0; });
    if (pass_.spans && pass_.mode != Mode::kDense) note_uses();
    const Kernels& kernels = pass_.kernels(Neurons::kDown);
    for_lists(Neurons::kDown, [&](const Rows& down, int64_t t, int64_t tokens) {
      worked(down.count * tokens * pass_.ffn.hidden);
      kernels.axpys(&down, &values_[t * width_], width_, tokens, pass_.ffn.hidden,
                    sums_ + t * sum_floats_);
    });
  }

  void note_uses() {
    uses_.resize((pass_.ffn.neurons + Spans::kNeurons - 1) / Spans::kNeurons);
    for (const std::vector<int32_t>& list : lists_) {
      for (const int32_t neuron : list) ++uses_[neuron / Spans::kNeurons];
    }
  }

  // Finds the candidates of the whole share and begins to read what of them is on disk.
  void read_ahead(const std::vector<int32_t>& share) {
    candidates_.assign(pass_.tokens, share);
    for (int64_t t = 0; t < pass_.tokens; ++t) {
      pass_.prediction->keep_candidates(t, candidates_[t]);
    }
    for (const Neurons::Part part : {Neurons::kGate, Neurons::kDown}) {
      pass_.parts[part].stored.ahead(candidates_, pass_.threads);
      if (pass_.ffn.bundle) return;
    }
  }

  // out[t, i] = row of the part of neuron lists_[t][i] · x of token t
  void project(Neurons::Part part, std::vector<float>& out) {
    const Kernels& kernels = pass_.kernels(part);
    const Prepared& x = *pass_.parts[part].x;
    out.resize(pass_.tokens * width_);
    for_lists(part, [&](const Rows& rows, int64_t t, int64_t tokens) {
      worked(rows.count * tokens * pass_.ffn.hidden);
      kernels.dots(&rows, x[t], tokens, pass_.ffn.hidden, &out[t * width_], width_);
    });
  }

  // Calls work(rows, first token, tokens).
  template <typename Work>
  void for_lists(Neurons::Part part, Work work) {
    const int64_t tokens = together_ ? pass_.tokens : 1;
    for (int64_t t = 0; t < pass_.tokens; t += tokens) {
      const int32_t* indices = lists_[t].data();
      if (const Stored& stored = pass_.parts[part].stored; stored.store) {
        stored.find(lists_[t], places_);
        indices = places_.data();
      }
      work(pass_.rows(part, indices, lists_[t].size()), t, tokens);
    }
  }

  // Compacts each token's list to the neurons that it needs; in dense mode it only counts them.
  // Branch-free, because the processor could not predict the outcome.
  template <typename Needed>
  void compact(int which, Needed needed) {
    for (int64_t t = 0; t < pass_.tokens; ++t) {
      std::vector<int32_t>& list = lists_[t];
      float* values = &values_[t * width_];
      int32_t kept = 0;
      if (pass_.mode == Mode::kDense) {
        for (size_t i = 0; i < list.size(); ++i) kept += needed(values[i]);
      } else {
        for (size_t i = 0; i < list.size(); ++i) {
          const float value = values[i];
          list[kept] = list[i];
          values[kept] = value;
          kept += needed(value);
        }
        list.resize(kept);
      }
      counts_[3 * t + which] += kept;
    }
    together_ = together_ && pass_.mode == Mode::kDense;
  }

  const Pass& pass_;
  const int64_t sum_floats_;
  std::vector<std::vector<int32_t>> lists_;       // neurons that each token needs
  std::vector<std::vector<int32_t>> candidates_;  // of the whole share, if rows are on disk
  std::vector<int32_t> places_;
  bool together_;  // the lists are the same
  int64_t width_;
  std::vector<float> values_, ups_;  // [tokens, width]: gate, later Combined; up
  Buffer sums_;
  std::vector<int32_t> counts_, uses_;
};

// A thread helps to add up the shares from about this many numbers on.
constexpr int64_t kAddsPerThread = 4 << 10;

using Shares = std::vector<std::unique_ptr<NeuronShare>>;

// out[cols] = the sum of the shares' sums for a token, at columns that begin with a tile.
void add_up(const Shares& shares, const Kernels& kernels, int64_t t, int c, int cols, float* out) {
  const int64_t floats = kernels.sum_floats(cols);
  float* total = shares[0]->sum(t, c);
  for (size_t s = 1; s < shares.size(); ++s) {
    const float* sum = shares[s]->sum(t, c);
    for (int64_t i = 0; i < floats; ++i) total[i] += sum[i];
  }
  worked(floats * shares.size());
  std::fill_n(out, cols, 0.0f);
  kernels.add_sum(total, cols, out);
}

// Runs a share on each thread. The order of the threads is the order of the sum: the result does
// not depend on their timing. Calls done(token, column, columns) for what is there of `out`.
template <typename Done>
void run_shares(const Pass& pass, float* out, int32_t* counts, const Done& done) {
  Shares shares(pass.threads);
  parallel(pass.threads, [&](int thread) {
    shares[thread] = std::make_unique<NeuronShare>(pass);
    shares[thread]->run(thread);
  });
  const int hidden = pass.ffn.hidden, tiles = (hidden + TILE - 1) / TILE;
  const int64_t adds = pass.threads * hidden * pass.tokens;
  const int64_t some = std::min<int64_t>(pass.threads, 1 + adds / kAddsPerThread);
  parallel_for(some, pass.tokens * tiles, [&](int64_t i) {
    const int64_t t = i / tiles;
    const int c = static_cast<int>(i % tiles) * TILE;
    const int cols = std::min<int>(TILE, hidden - c);
    add_up(shares, pass.kernels(Neurons::kDown), t, c, cols, out + t * hidden + c);
    done(t, c, cols);
  });
  std::fill_n(counts, pass.tokens * 3, 0);
  for (int64_t i = 0; i < 3 * pass.tokens; ++i) {
    for (const auto& share : shares) counts[i] += share->counts(0)[i];
  }
  for (const auto& share : shares) {
    for (size_t i = 0; i < share->uses().size(); ++i) pass.spans->uses[i] += share->uses()[i];
  }
}

}  // namespace

int64_t row_stride(Quant quant, int cols) {
  const int64_t scales = cols / GROUP * int64_t{2};
  const int64_t payload = quant == QUANT_F16  ? cols * int64_t{2}
                          : quant == QUANT_Q8 ? cols + scales
                                              : cols / 2 + scales;
  const int64_t step = quant == QUANT_F16 ? CACHE_LINE : ROW_STEP;
  return (payload + step - 1) / step * step;
}

void Residual::resize(int64_t tokens) {
  x.resize(tokens * hidden);
  squares.resize(tokens * pieces());
}

void Residual::add(int64_t t, int64_t from, int64_t count, const float* y) {
  float* out = &x[t * hidden + from];
  double* square = &squares[t * pieces() + from / kPiece];
  for (int64_t at = 0; at < count; at += kPiece, ++square) {
    const int64_t end = std::min(count, at + kPiece);
    *square = 0;
    for (int64_t i = at; i < end; ++i) {
      out[i] += y[i];
      *square += double{out[i]} * out[i];
    }
  }
  worked(count);
}

void Matrix::row(int64_t index, float* out) const {
  kernels_of(quant).dequantise_row(data + index * row_stride(quant, cols), out, cols);
  worked(cols);
}

void multiply(const std::vector<Product>& products, const float* x, int64_t tokens, int threads,
              const std::function<void()>& beside) {
  const int cols = products[0].matrix->cols;
  int64_t bytes = 0, rows = 0;
  for (const Product& product : products) {
    rows += product.count();
    bytes += product.count() * product.matrix->stride();
  }
  threads = worthwhile_threads(threads, bytes, tokens);
  std::map<decltype(Kernels::prepare), Prepared> prepared;  // in the form of each quantisation
  for (const Product& product : products) {
    const Kernels& kernels = kernels_of(product.matrix->quant);
    if (!prepared.count(kernels.prepare)) {
      prepared.emplace(kernels.prepare, Prepared(kernels, x, tokens, cols, threads));
    }
  }
  const int shares = threads == 1 ? 1 : threads * kSharesPerThread;
  const auto begin_of = [&](int share) {
    const int64_t row = rows * share / shares;
    return products[0].residual && share < shares ? row - row % Residual::kPiece : row;
  };
  parallel(threads, shares + !!beside, [&](int share) {
    if (beside && share-- == 0) return beside();
    int64_t from = begin_of(share), end = begin_of(share + 1);
    for (const Product& product : products) {
      if (from < std::min(end, product.count())) {
        const Kernels& kernels = kernels_of(product.matrix->quant);
        product.run(from, std::min(end, product.count()), prepared.at(kernels.prepare)[0], tokens);
      }
      from = std::max<int64_t>(0, from - product.count());
      end -= product.count();
    }
  });
}

// Rows from `from` to `end`; those of several tokens stay in the second cache meanwhile.
void Product::run(int64_t from, int64_t end, const void* prepared, int64_t tokens) const {
  const int64_t stride = matrix->stride();
  const int64_t step = tokens == 1 ? end - from : std::max<int64_t>(1, kResidentBytes / stride);
  for (int64_t r = from; r < end; r += step) {
    const uint8_t* first = indices ? matrix->data : matrix->data + r * stride;
    const Rows rows =
        rows_at(first, stride, indices ? indices + r : nullptr, std::min(step, end - r));
    kernels_of(matrix->quant).dots(&rows, prepared, tokens, matrix->cols, out + r, count());
  }
  for (int64_t t = 0; t < tokens; ++t) {
    float* of_token = out + t * count() + from;
    for (int64_t r = from; bias && r < end; ++r) of_token[r - from] += bias[r];
    if (residual) residual->add(t, from, end - from, of_token);
  }
  worked((end - from) * matrix->cols * tokens);
}

// How many neurons of a share can have all their rows in the stores while the others hold theirs.
int64_t Neurons::most_held(int threads) const {
  int64_t neurons = 0;
  for (const Stored* stored : {&stored_gates, &stored_pairs}) {
    if (!stored->store) continue;
    const int64_t chunk_units = std::max<int64_t>(1, kChunk / stored->store->unit());
    const int64_t chunks = stored->store->units() / threads / chunk_units;
    if (chunks < 1) {
      throw std::invalid_argument("a store of " + std::to_string(stored->store->units()) +
                                  " units is too small for " + std::to_string(threads) +
                                  " threads");
    }
    neurons = std::min(neurons ? neurons : INT64_MAX, chunks * kChunk);
  }
  return neurons;
}

int64_t Neurons::up_stride() const { return gated() ? row_stride(quants[kUp], hidden) : 0; }

void Neurons::forward(const float* x, const float* residual, float* out, int32_t* counts,
                      int64_t tokens, Mode mode, int threads, Residual* sum,
                      const Spans* spans) const {
  const int64_t gate = row_stride(quants[kGate], hidden);
  const int64_t up = up_stride();
  const int64_t pair = up + row_stride(quants[kDown], hidden);
  const Kernels &of_gate = kernels_of(quants[kGate]), &of_up = kernels_of(quants[kUp]);
  const int64_t held = most_held(threads);
  // from disk, more memory for the sums is cheaper than reading the rows again
  const int64_t most = held ? tokens : kTokenBlock;
  for (int64_t t = 0; t < tokens; t += most) {
    const int64_t block = std::min(most, tokens - t), at = t * hidden;
    // as for one token: the order of the sums must not depend on how many there are
    const int some = worthwhile_threads(threads, neurons * (gate + pair), 1);
    std::optional<Prepared> for_gates, for_ups;
    const auto prepare = [&](int of) {
      for_gates.emplace(of_gate, x + at, block, hidden, of);
      if (of_up.prepare != of_gate.prepare) for_ups.emplace(of_up, x + at, block, hidden, of);
    };
    std::unique_ptr<Prediction> prediction;
    if (mode == Mode::kPredicted) {
      prediction = predictor->begin(x + at, residual + at, block, threads, [&] { prepare(1); });
    } else {
      prepare(some);
    }
    const auto apart = [&](int64_t bytes) { return bundle ? bundle : bytes; };
    const Pass pass{*this,
                    {{of_gate, gates, apart(gate), &*for_gates, stored_gates},
                     {of_up, pairs, apart(pair), for_ups ? &*for_ups : &*for_gates, stored_pairs},
                     {kernels_of(quants[kDown]), pairs + up, apart(pair), nullptr, stored_pairs}},
                    gate + pair,
                    block,
                    mode,
                    prediction.get(),
                    some,
                    held,
                    spans};
    run_shares(pass, out + at, counts + 3 * t, [&](int64_t token, int c, int cols) {
      if (sum) sum->add(t + token, c, cols, out + at + token * hidden + c);
    });
  }
}
