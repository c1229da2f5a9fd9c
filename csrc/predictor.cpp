#include "predictor.h"

#include <algorithm>

#include "buffer.h"

namespace {

// Compacts the values to those for whose place `needed(i)` holds.
template <typename Needed>
void compact(std::vector<int32_t>& values, Needed needed) {
  size_t kept = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    if (needed(i)) values[kept++] = values[i];
  }
  values.resize(kept);
}

class LowRankPrediction : public Prediction {
 public:
  LowRankPrediction(const Matrix& fc2, float threshold, const std::vector<float>& features,
                    int64_t tokens)
      : fc2_(fc2),
        threshold_(threshold),
        features_(kernels_of(fc2.quant), features.data(), tokens, fc2.cols) {}

  void keep_candidates(int64_t t, std::vector<int32_t>& neurons) const override {
    std::vector<float> logits(neurons.size());
    const Rows rows = rows_at(fc2_.data, row_stride(fc2_.quant, fc2_.cols), neurons.data(),
                              static_cast<int64_t>(neurons.size()));
    worked(rows.count * fc2_.cols);
    kernels_of(fc2_.quant).dots(&rows, features_[t], 1, fc2_.cols, logits.data(), 0);
    // a NaN is a candidate, so that a broken input shows in the output
    compact(neurons, [&](size_t i) { return !(logits[i] < threshold_); });
  }

 private:
  const Matrix& fc2_;
  const float threshold_;
  const Prepared features_;
};

class SignPrediction : public Prediction {
 public:
  SignPrediction(const uint8_t* bits, int hidden, int parts, double threshold, const float* x,
                 int64_t tokens)
      : bits_(bits),
        hidden_(hidden),
        parts_(parts),
        threshold_(threshold),
        words_(static_cast<int>(Signs::bits_stride(hidden) / sizeof(uint64_t))),
        x_bits_(tokens * words_) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int i = 0; i < hidden; ++i) {
        x_bits_[t * words_ + i / 64] |= uint64_t{x[t * hidden + i] < 0} << i % 64;
      }
    }
  }

  void keep_candidates(int64_t t, std::vector<int32_t>& neurons) const override {
    for (int part = 0; part < parts_; ++part) keep_agreeing(part, t, neurons);
  }

 private:
  void keep_agreeing(int part, int64_t t, std::vector<int32_t>& neurons) const {
    const int64_t stride = Signs::bits_stride(hidden_);
    std::vector<int32_t> agree(neurons.size());
    const Rows rows = rows_at(bits_ + part * stride, parts_ * stride, neurons.data(),
                              static_cast<int64_t>(neurons.size()));
    worked(rows.count * hidden_);
    agreements()(&rows, &x_bits_[t * words_], words_, agree.data());
    const int padding = 64 * words_ - hidden_;  // which always agrees
    compact(neurons,
            [&](size_t i) { return 2.0 * (agree[i] - padding) / hidden_ - 1 >= threshold_; });
  }

  const uint8_t* bits_;
  const int hidden_;
  const int parts_;
  const double threshold_;
  const int words_;  // of 64 bits, in the bits of a row
  std::vector<uint64_t> x_bits_;
};

}  // namespace

std::unique_ptr<Prediction> LowRank::begin(const float* x, const float* residual, int64_t tokens,
                                           int threads, const std::function<void()>& beside) const {
  std::vector<float> features(tokens * fc1_.rows);
  multiply({{&fc1_, features.data()}}, pre_norm_ ? residual : x, tokens, threads, beside);
  worked(features.size());
  for (float& feature : features) feature = feature < 0 ? 0 : feature;
  return std::make_unique<LowRankPrediction>(fc2_, threshold_, features, tokens);
}

std::unique_ptr<Prediction> Signs::begin(const float* x, const float*, int64_t tokens, int,
                                         const std::function<void()>& beside) const {
  beside();
  return std::make_unique<SignPrediction>(bits_, hidden, parts_, threshold_, x, tokens);
}

int64_t Signs::bits_stride(int hidden) {
  return (hidden + 8 * CACHE_LINE - 1) / (8 * CACHE_LINE) * CACHE_LINE;
}
