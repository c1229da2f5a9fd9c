// A whole decoding step: the twin of src/turbosparse/model.py, which is the one to read first.
//
// Shapes: T tokens of a step, of all its sequences together; H hidden size, D size of a head.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "matrix.h"

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

struct Layer {
  Projection q, k, v, o;
  const float* attention_norm;  // [H]
  const float* ffn_norm;        // [H]
  const float* router;          // [experts, H], or null in a dense model
  std::vector<Neurons> ffns;    // one for each expert; one in a dense model
  int window;                   // how many positions a token sees; 0: all
};

// Keys and values of one sequence in half precision. Grows by pages, so nothing is ever copied.
class Cache {
 public:
  Cache(const Shape& shape, int layers) : shape_(shape), layers_(layers) {}
  Cache(const Cache&) = delete;
  Cache(Cache&&) = default;

  int length() const { return length_; }
  // Makes room for positions up to `end`; throws std::bad_alloc if there is none: what the cache
  // holds stays as it is.
  void reserve(int end);
  void advance(int tokens) { length_ += tokens; }
  // The D halves of a position's key (part 0) or value (part 1).
  uint16_t* at(int layer, int part, int kv_head, int position) const;
  // Where the page of a position ends. In a page, positions follow each other as rows of f16.
  static int page_end(int position) { return (position / kPage + 1) * kPage; }

 private:
  static constexpr int kPage = 64;  // positions

  int64_t row_halves() const;

  Shape shape_;
  int layers_;
  int length_ = 0;
  std::vector<std::unique_ptr<uint16_t[]>> pages_;
};

// The new tokens of one sequence in a step.
struct Sequence {
  Cache* cache;
  const int32_t* tokens;
  int count;
};

class Decoder {
 public:
  Decoder(const Shape& shape, const Matrix& embedding, const Matrix& head, const float* norm,
          std::vector<Layer> layers, std::vector<float> frequencies, float rope_scale);
  ~Decoder();

  const Shape& shape() const { return shape_; }
  int layers() const { return static_cast<int>(layers_.size()); }
  int64_t vocabulary() const { return head_.rows; }

  // Appends the tokens to their caches. logits[S or T, vocabulary]: after the last token of each of
  // the S sequences, or with `every` after each token. counts[layers, T, 3]:
  // candidates, neurons with a positive gate and active ones. Tokens are valid ids and fit their
  // contexts.
  void step(const std::vector<Sequence>& sequences, bool every, Mode mode, int threads,
            float* logits, int32_t* counts);

 private:
  struct Position;

  void begin(const std::vector<Sequence>& sequences, int threads);
  void keep_last(const std::vector<Sequence>& sequences);
  void normalise(const float* weight);
  void attend(int layer);
  void project(const Projection& projection, const std::vector<float>& in, std::vector<float>& out);
  void rotate(std::vector<float>& x, int heads) const;
  void remember(int layer, int64_t token, int kv_head);
  void look(int layer, int token, int kv_head);
  void feed_forward(const Layer& layer, Mode mode, int32_t* counts);
  void mix_experts(const Layer& layer, Mode mode, int32_t* counts);
  void route(const Layer& layer, int token, float* weights) const;
  static void softmax(float* scores, int count);

  Shape shape_;
  Matrix embedding_, head_;
  const float* norm_;
  std::vector<Layer> layers_;
  std::vector<float> frequencies_;  // [D/2]
  float rope_scale_;

  // the step at hand
  int tokens_ = 0, threads_ = 1;
  std::vector<Position> positions_;  // of each token
  std::vector<float> x_;             // [T, H], the residual stream
  std::vector<float> normed_, q_, k_, v_, mixed_, y_;
  std::vector<float> cos_, sin_;  // [T, D/2]
};
