// Scratch memory for the kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <utility>

#include "kernels.h"
#include "threads.h"

// Floats, aligned for the kernels.
class Buffer {
 public:
  explicit Buffer(int64_t count, bool zero = false)
      : data_(static_cast<float*>(operator new(count * sizeof(float), kAlignment))) {
    if (zero) std::fill_n(data_, count, 0.0f);
  }
  Buffer(Buffer&& other) : data_(std::exchange(other.data_, nullptr)) {}
  ~Buffer() { operator delete(data_, kAlignment); }
  operator float*() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  float* data_;
};

// Activations of several tokens in the layout that `dots` reads.
class Prepared {
 public:
  Prepared(const Kernels& kernels, const float* x, int64_t tokens, int cols, int threads = 1)
      : stride_(kernels.prepared_bytes(cols) / static_cast<int64_t>(sizeof(float))),
        data_(tokens * stride_) {
    parallel_for(threads, tokens, [&](int64_t t) {
      kernels.prepare(x + t * cols, cols, data_ + t * stride_);
      worked(cols);
    });
  }
  const void* operator[](int64_t token) const { return data_ + token * stride_; }

 private:
  int64_t stride_;
  Buffer data_;
};
