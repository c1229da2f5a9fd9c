// A whole decoding step: the twin of src/turbosparse/engine/model.py, which is the one to read
// first.
//
// Shapes: T tokens of a step, of all its sequences together; H hidden size, D size of a head.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "matrix.h"
#include "threads.h"

struct Shape {
  int hidden;
  int heads;
  int kv_heads;
  int head;          // D
  int experts_used;  // of a token; 1 in a dense model
  float norm_eps;
};

struct Projection {
  Matrix matrix;
  const float* bias;  // [rows], or null
};

// LayerNorm, or without a bias RMSNorm.
struct Norm {
  const float* weight;  // [H]
  const float* bias;    // [H], or null
};

struct Layer {
  Projection q, k, v, o;
  Norm attention_norm, ffn_norm;
  const float* router;        // [experts, H], or null in a dense model
  std::vector<Neurons> ffns;  // one for each expert; one in a dense model
  int window;                 // how many positions a token sees; 0: all
};

// Keys and values of one sequence in half precision. Grows by pages, so nothing is ever moved;
// copies share them, and who writes into a shared page first makes it its own. May be used from
// several threads: what changes it waits for a step of its decoder to end.
class Cache {
 public:
  Cache(std::shared_ptr<ForkMutex> turn, int layers, int kv_heads, int head, int context);

  int length() const { return length_; }
  int context() const { return context_; }  // the most positions that it may hold
  // Memory in use, shared pages included, and that of a cache with so many positions.
  int64_t bytes() const { return bytes_; }
  static int64_t bytes(int64_t positions, int layers, int kv_heads, int head);

  // Its first `length` positions.
  std::unique_ptr<Cache> copy(int length) const;
  // Forgets all positions from `length` on and gives their memory back.
  void truncate(int length);

 private:
  friend class Decoder;
  static constexpr int kPage = 64;  // positions

  int64_t page_halves() const { return bytes(1, layers_, kv_heads_, head_) / 2; }
  // Makes room to write positions up to `end`; throws std::bad_alloc if there is none: what the
  // cache holds stays as it is.
  void reserve(int end);
  void check_length(int length) const;  // throws std::invalid_argument
  // Gives back the pages behind the positions.
  void trim();
  // The D halves of a position's key (part 0) or value (part 1).
  uint16_t* at(int layer, int part, int kv_head, int position) const;
  // Where the page of a position ends. In a page, positions follow each other as rows of f16.
  static int page_end(int position) { return (position / kPage + 1) * kPage; }

  const std::shared_ptr<ForkMutex> turn_;  // of the decoder that made it
  const int layers_, kv_heads_, head_, context_;
  std::atomic<int> length_{0};
  std::atomic<int64_t> bytes_{0};
  std::vector<std::shared_ptr<uint16_t[]>> pages_;
};

// The new tokens of one sequence in a step.
struct Sequence {
  Cache* cache;
  const int32_t* tokens;
  int count;
};

// Set from any thread, it ends a step between two layers.
using Cancel = std::atomic<bool>;

struct Cancelled : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Decoder {
 public:
  Decoder(const Shape& shape, const Matrix& embedding, const Matrix& head, const Norm& norm,
          std::vector<Layer> layers, std::vector<float> frequencies, float rope_scale);
  Decoder(const Decoder&) = delete;
  ~Decoder();

  const Shape& shape() const { return shape_; }
  int layers() const { return static_cast<int>(layers_.size()); }
  int64_t vocabulary() const { return head_.rows; }

  // Appends the tokens to their caches. logits[S or T, vocabulary]: after the last token of each of
  // the S sequences, or with `every` after each token. counts[layers, T, 3]:
  // candidates, neurons with a positive gate and active ones. Steps take turns. What throws leaves
  // the caches as they were: std::invalid_argument for a cache of another decoder or given twice, a
  // token outside the vocabulary, or too many for the context; std::bad_alloc; Cancelled.
  void step(const std::vector<Sequence>& sequences, bool every, Mode mode, int threads,
            float* logits, int32_t* counts, const Cancel* cancel = nullptr);

  std::unique_ptr<Cache> new_cache(int context) const;

 private:
  struct Position {
    Cache* cache;
    int place;  // in its sequence
  };
  struct Taken;

  void check(const std::vector<Sequence>& sequences) const;
  void begin(const std::vector<Sequence>& sequences, int threads);
  void run(bool every, const std::vector<Sequence>& sequences, Mode mode, float* logits,
           int32_t* counts, const Cancel* cancel);
  void keep_last(const std::vector<Sequence>& sequences);
  void normalise(const Norm& norm);
  void attend(int layer);
  Product product(const Projection& projection, std::vector<float>& out) const;
  void rotate(float* x, int heads, int64_t token) const;
  void append_kv(int layer, int64_t token, int kv_head);
  void mix_values(int layer);
  int first_seen(int layer, int token) const;
  Taken take_span(int layer, int token, int kv_head, int span);
  void feed_forward(const Layer& layer, Mode mode, int32_t* counts);
  void mix_experts(const Layer& layer, Mode mode, int32_t* counts);
  std::vector<std::pair<int, float>> route(const Layer& layer, int token) const;
  static void softmax(float* scores, int count);

  Shape shape_;
  Matrix embedding_, head_;
  Norm norm_;
  std::vector<Layer> layers_;
  std::vector<float> frequencies_;  // of the pairs that turn, at most D/2
  float rope_scale_;

  std::shared_ptr<ForkMutex> turn_ = std::make_shared<ForkMutex>();  // who has it may step

  // the step at hand
  int tokens_ = 0, threads_ = 1;
  bool apart_ = true;                // each token is of another sequence
  std::vector<Position> positions_;  // of each token
  Residual residual_;                // of the T tokens
  std::vector<float> normed_, q_, k_, v_, mixed_, y_;
  std::vector<float> cos_, sin_;  // [T, pairs]
};
