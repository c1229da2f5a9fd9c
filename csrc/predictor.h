// Which neurons of an FFN a token is likely to need: found before their rows are read.
//
// Shapes: T tokens, H hidden size, R rank.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "matrix.h"

// The predictor at work on the tokens of one call; threads may ask it side by side.
class Prediction {
 public:
  virtual ~Prediction() = default;
  // Leaves in `neurons` the candidates of token t.
  virtual void keep_candidates(int64_t t, std::vector<int32_t>& neurons) const = 0;
};

class Predictor {
 public:
  const int64_t neurons;
  const int hidden;

  Predictor(int64_t neurons, int hidden) : neurons(neurons), hidden(hidden) {}
  virtual ~Predictor() = default;
  // What all threads share, of x[T, H], the FFN's input, and residual[T, H], which that is the norm
  // of. Both are read during this call only, in which `beside` is called once, maybe while other
  // threads are at work.
  virtual std::unique_ptr<Prediction> begin(const float* x, const float* residual, int64_t tokens,
                                            int threads,
                                            const std::function<void()>& beside) const = 0;
};

// Candidates are the neurons whose logit, fc2 · relu(fc1 · h), is at least the threshold.
class LowRank : public Predictor {
 public:
  // fc1[R, H], fc2[neurons, R]; h is the residual if `pre_norm`, else x.
  LowRank(const Matrix& fc1, const Matrix& fc2, float threshold, bool pre_norm)
      : Predictor(fc2.rows, fc1.cols),
        fc1_(fc1),
        fc2_(fc2),
        threshold_(threshold),
        pre_norm_(pre_norm) {}
  std::unique_ptr<Prediction> begin(const float* x, const float* residual, int64_t tokens,
                                    int threads,
                                    const std::function<void()>& beside) const override;

 private:
  Matrix fc1_, fc2_;
  float threshold_;
  bool pre_norm_;
};

// Candidates are the neurons whose weights agree in sign with x often enough: the score of a row is
// 1 - 2 * disagreements / H, and each of a neuron's rows that decide must have at least the
// threshold.
class Signs : public Predictor {
 public:
  // bits[neurons, parts * bits_stride(hidden)]: of each row that decides. A bit is 1 where the
  // weight is negative; bit b of byte i is column 8 i + b; zeros fill up the stride.
  Signs(const uint8_t* bits, int64_t neurons, int hidden, int parts, double threshold)
      : Predictor(neurons, hidden), bits_(bits), parts_(parts), threshold_(threshold) {}
  std::unique_ptr<Prediction> begin(const float* x, const float* residual, int64_t tokens,
                                    int threads,
                                    const std::function<void()>& beside) const override;

  static int64_t bits_stride(int hidden);  // bytes

 private:
  const uint8_t* bits_;
  int parts_;
  double threshold_;
};
