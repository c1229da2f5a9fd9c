#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <string>

#include "buffer.h"
#include "half.h"

namespace {

// Σ (x - mean)², in lanes, which the compiler may keep in registers.
double sum_of_squares(const float* x, int count, double mean) {
  constexpr int kLanes = 8;
  double sums[kLanes] = {};
  for (int i = 0; i < count; ++i) sums[i % kLanes] += (x[i] - mean) * (x[i] - mean);
  worked(2 * count);  // the mean too
  return std::accumulate(sums, sums + kLanes, 0.0);
}

}  // namespace

Cache::Cache(std::shared_ptr<ForkMutex> turn, int layers, int kv_heads, int head, int context)
    : turn_(std::move(turn)),
      layers_(layers),
      kv_heads_(kv_heads),
      head_(head),
      context_(context) {}

int64_t Cache::bytes(int64_t positions, int layers, int kv_heads, int head) {
  const int64_t pages = (positions + kPage - 1) / kPage;
  return pages * kPage * 2 * layers * kv_heads * row_stride(QUANT_F16, head);
}

std::unique_ptr<Cache> Cache::copy(int length) const {
  const std::lock_guard<ForkMutex> lock(*turn_);
  check_length(length);
  auto other = std::make_unique<Cache>(turn_, layers_, kv_heads_, head_, context_);
  other->pages_ = pages_;
  other->length_ = length;
  other->trim();
  return other;
}

void Cache::truncate(int length) {
  const std::lock_guard<ForkMutex> lock(*turn_);
  check_length(length);
  length_ = length;
  trim();
}

void Cache::check_length(int length) const {
  if (length >= 0 && length <= length_) return;
  throw std::invalid_argument("length is " + std::to_string(length) + ", expected 0 to the " +
                              std::to_string(length_) + " positions of the cache");
}

void Cache::reserve(int end) {
  if (length_ % kPage) {  // the next position goes into the last page
    std::shared_ptr<uint16_t[]>& last = pages_[length_ / kPage];
    if (last.use_count() > 1) {
      std::shared_ptr<uint16_t[]> own(new uint16_t[page_halves()]);
      std::copy_n(last.get(), page_halves(), own.get());
      last = own;
    }
  }
  while (static_cast<int64_t>(pages_.size()) * kPage < end) {
    // zeros: a kernel may read the padding of a row
    pages_.push_back(std::shared_ptr<uint16_t[]>(new uint16_t[page_halves()]()));
    bytes_ = bytes(pages_.size() * kPage, layers_, kv_heads_, head_);
  }
}

void Cache::trim() {
  pages_.resize((length_ + kPage - 1) / kPage);
  bytes_ = bytes(length_, layers_, kv_heads_, head_);
}

uint16_t* Cache::at(int layer, int part, int kv_head, int position) const {
  const int64_t row = (int64_t{2} * layer + part) * kv_heads_ + kv_head;
  const int64_t row_halves = row_stride(QUANT_F16, head_) / 2;
  return pages_[position / kPage].get() + (row * kPage + position % kPage) * row_halves;
}

Decoder::Decoder(const Shape& shape, const Matrix& embedding, const Matrix& head, const Norm& norm,
                 std::vector<Layer> layers, std::vector<float> frequencies, float rope_scale)
    : shape_(shape),
      embedding_(embedding),
      head_(head),
      norm_(norm),
      layers_(std::move(layers)),
      frequencies_(std::move(frequencies)),
      rope_scale_(rope_scale),
      residual_{shape.hidden, {}, {}} {}

Decoder::~Decoder() = default;

std::unique_ptr<Cache> Decoder::new_cache(int context) const {
  return std::make_unique<Cache>(turn_, layers(), shape_.kv_heads, shape_.head, context);
}

void Decoder::step(const std::vector<Sequence>& sequences, bool every, Mode mode, int threads,
                   float* logits, int32_t* counts, const Cancel* cancel) {
  const std::lock_guard<ForkMutex> lock(*turn_);
  check(sequences);
  try {
    begin(sequences, threads);
    run(every, sequences, mode, logits, counts, cancel);
  } catch (...) {
    for (const Sequence& sequence : sequences) sequence.cache->trim();
    throw;
  }
  for (const Sequence& sequence : sequences) sequence.cache->length_ += sequence.count;
}

void Decoder::check(const std::vector<Sequence>& sequences) const {
  std::set<const Cache*> caches;
  for (size_t i = 0; i < sequences.size(); ++i) {
    const auto& [cache, tokens, count] = sequences[i];
    const auto refuse = [i](const std::string& why) {
      throw std::invalid_argument("sequence " + std::to_string(i) + ": " + why);
    };
    if (cache->turn_ != turn_) refuse("its cache belongs to another model");
    if (!caches.insert(cache).second) refuse("its cache is also that of an earlier one");
    if (count < 1) refuse("it has no new token");
    for (int t = 0; t < count; ++t) {
      if (tokens[t] >= 0 && tokens[t] < vocabulary()) continue;
      refuse("token " + std::to_string(tokens[t]) + " is outside the vocabulary of " +
             std::to_string(vocabulary()));
    }
    const int64_t end = int64_t{cache->length()} + count;
    if (end > cache->context()) {
      refuse(std::to_string(end) + " tokens do not fit the context of " +
             std::to_string(cache->context()));
    }
  }
}

void Decoder::run(bool every, const std::vector<Sequence>& sequences, Mode mode, float* logits,
                  int32_t* counts, const Cancel* cancel) {
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    if (cancel && *cancel) throw Cancelled("the step was cancelled");
    attend(static_cast<int>(layer));
    feed_forward(layers_[layer], mode, counts + layer * tokens_ * 3);
  }
  if (!every) keep_last(sequences);
  normalise(norm_);
  multiply({{&head_, logits}}, normed_.data(), tokens_, threads_);
}

// Reads the embeddings, finds the places and their rotations, and makes room in the caches.
void Decoder::begin(const std::vector<Sequence>& sequences, int threads) {
  threads_ = threads;
  positions_.clear();
  residual_.resize(0);
  std::vector<float> row(shape_.hidden);
  for (const Sequence& sequence : sequences) {
    sequence.cache->reserve(sequence.cache->length() + sequence.count);
    for (int i = 0; i < sequence.count; ++i) {
      residual_.resize(positions_.size() + 1);  // zeros
      embedding_.row(sequence.tokens[i], row.data());
      residual_.add(positions_.size(), 0, shape_.hidden, row.data());
      positions_.push_back({sequence.cache, sequence.cache->length() + i});
    }
  }
  tokens_ = static_cast<int>(positions_.size());
  apart_ = positions_.size() == sequences.size();

  const size_t half = frequencies_.size();
  cos_.resize(tokens_ * half);
  sin_.resize(tokens_ * half);
  for (int t = 0; t < tokens_; ++t) {
    for (size_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(positions_[t].place) * frequencies_[i];
      cos_[t * half + i] = std::cos(angle) * rope_scale_;
      sin_[t * half + i] = std::sin(angle) * rope_scale_;
    }
  }
}

// Leaves of the residual stream only the last token of each sequence.
void Decoder::keep_last(const std::vector<Sequence>& sequences) {
  int last = -1, kept = 0;
  for (const Sequence& sequence : sequences) {
    last += sequence.count;
    const auto keep = [&](auto& of_tokens, int64_t size) {
      std::copy_n(&of_tokens[last * size], size, &of_tokens[kept * size]);
    };
    keep(residual_.x, residual_.hidden);
    keep(residual_.squares, residual_.pieces());
    ++kept;
  }
  tokens_ = kept;
}

// normed = norm(x)
void Decoder::normalise(const Norm& norm) {
  const int hidden = shape_.hidden, pieces = residual_.pieces();
  normed_.resize(int64_t{tokens_} * hidden);
  parallel_for(threads_, tokens_, [&](int64_t t) {
    const float* x = &residual_.x[t * hidden];
    const double* squares = &residual_.squares[t * pieces];
    float* out = &normed_[t * hidden];
    const double mean = norm.bias ? std::accumulate(x, x + hidden, 0.0) / hidden : 0;
    const double sum = norm.bias ? sum_of_squares(x, hidden, mean)
                                 : std::accumulate(squares, squares + pieces, 0.0);
    const float square = static_cast<float>(sum / hidden);
    const float scale = 1 / std::sqrt(square + shape_.norm_eps), shift = static_cast<float>(mean);
    for (int i = 0; i < hidden; ++i) out[i] = (x[i] - shift) * scale * norm.weight[i];
    for (int i = 0; norm.bias && i < hidden; ++i) out[i] += norm.bias[i];
    worked(hidden + pieces);
  });
}

// x += attention(norm(x))
void Decoder::attend(int index) {
  const Layer& layer = layers_[index];
  normalise(layer.attention_norm);
  multiply({product(layer.q, q_), product(layer.k, k_), product(layer.v, v_)}, normed_.data(),
           tokens_, threads_);
  mix_values(index);
  Product out = product(layer.o, y_);
  out.residual = &residual_;
  multiply({out}, mixed_.data(), tokens_, threads_);
}

Product Decoder::product(const Projection& projection, std::vector<float>& out) const {
  out.resize(tokens_ * projection.matrix.rows);
  return {&projection.matrix, out.data(), nullptr, 0, projection.bias};
}

// Turns the first pairs (i, i + pairs) of a token's heads by its angles.
void Decoder::rotate(float* x, int heads, int64_t token) const {
  const int half = static_cast<int>(frequencies_.size());
  const float *cosine = &cos_[token * half], *sine = &sin_[token * half];
  for (int head = 0; head < heads; ++head, x += shape_.head) {
    for (int i = 0; i < half; ++i) {
      const float a = x[i], b = x[half + i];
      x[i] = a * cosine[i] - b * sine[i];
      x[half + i] = b * cosine[i] + a * sine[i];
    }
  }
  worked(heads * shape_.head);
}

// Turns a token's key and puts it and the value into the cache.
void Decoder::append_kv(int layer, int64_t token, int kv_head) {
  const Position& position = positions_[token];
  const int64_t from = (token * shape_.kv_heads + kv_head) * shape_.head;
  rotate(&k_[from], 1, token);
  uint16_t* key = position.cache->at(layer, 0, kv_head, position.place);
  uint16_t* value = position.cache->at(layer, 1, kv_head, position.place);
  for (int i = 0; i < shape_.head; ++i) {
    key[i] = float_to_half(k_[from + i]);
    value[i] = float_to_half(v_[from + i]);
  }
  worked(2 * shape_.head);
}

void Decoder::softmax(float* scores, int count) {
  const float top = *std::max_element(scores, scores + count);
  float sum = 0;
  for (int i = 0; i < count; ++i) sum += scores[i] = std::exp(scores[i] - top);
  for (int i = 0; i < count; ++i) scores[i] /= sum;
}

// x += ffn(norm(x))
void Decoder::feed_forward(const Layer& layer, Mode mode, int32_t* counts) {
  normalise(layer.ffn_norm);
  y_.resize(residual_.x.size());
  if (layer.router) return mix_experts(layer, mode, counts);
  layer.ffns[0].forward(normed_.data(), residual_.x.data(), y_.data(), counts, tokens_, mode,
                        threads_, &residual_);
}

// x += Σ weight · expert(normed), over the experts that the router likes best: softmax over all,
// the best few renormalised (Mixtral).
void Decoder::mix_experts(const Layer& layer, Mode mode, int32_t* counts) {
  const int experts = static_cast<int>(layer.ffns.size()), hidden = shape_.hidden;
  std::vector<std::vector<std::pair<int, float>>> chosen_by(experts);  // token, weight
  for (int t = 0; t < tokens_; ++t) {
    for (const auto& [expert, weight] : route(layer, t)) chosen_by[expert].push_back({t, weight});
  }
  std::fill(y_.begin(), y_.end(), 0.0f);
  std::fill_n(counts, tokens_ * 3, 0);
  for (int e = 0; e < experts; ++e) {
    const auto& chosen = chosen_by[e];
    if (chosen.empty()) continue;
    std::vector<float> in(chosen.size() * hidden), residual(in.size()), out(in.size());
    std::vector<int32_t> used(chosen.size() * 3);
    for (size_t i = 0; i < chosen.size(); ++i) {
      const int64_t at = int64_t{chosen[i].first} * hidden;
      std::copy_n(&normed_[at], hidden, &in[i * hidden]);
      std::copy_n(&residual_.x[at], hidden, &residual[i * hidden]);
    }
    layer.ffns[e].forward(in.data(), residual.data(), out.data(), used.data(), chosen.size(), mode,
                          threads_);
    for (size_t i = 0; i < chosen.size(); ++i) {
      const auto [token, weight] = chosen[i];
      float* y = &y_[int64_t{token} * hidden];
      for (int j = 0; j < hidden; ++j) y[j] += weight * out[i * hidden + j];
      for (int j = 0; j < 3; ++j) counts[3 * token + j] += used[3 * i + j];
    }
    worked(in.size() * 3);
  }
  parallel_for(threads_, tokens_, [&](int64_t t) { residual_.add(t, 0, hidden, &y_[t * hidden]); });
}

// The experts of a token, and their weights. NaN scores make every weight NaN: these are kept, so
// that a broken router shows in the output.
std::vector<std::pair<int, float>> Decoder::route(const Layer& layer, int token) const {
  const int experts = static_cast<int>(layer.ffns.size()), hidden = shape_.hidden;
  const float* x = &normed_[int64_t{token} * hidden];
  std::vector<float> weights(experts);
  for (int e = 0; e < experts; ++e) {
    weights[e] = std::inner_product(x, x + hidden, layer.router + int64_t{e} * hidden, 0.0f);
  }
  softmax(weights.data(), experts);
  std::vector<std::pair<int, float>> best(experts);
  for (int e = 0; e < experts; ++e) best[e] = {e, weights[e]};
  std::stable_sort(best.begin(), best.end(),
                   [](const auto& a, const auto& b) { return a.second > b.second; });
  best.resize(shape_.experts_used);
  float sum = 0;
  for (const auto& [expert, weight] : best) sum += weight;
  for (auto& [expert, weight] : best) weight /= sum;
  return best;
}
