// Compares the kernels of one instruction set with the reference, on rows and inputs made here: for
// machines on which Python does not run, such as an emulated one (tests/test_neon.py).
//
//   g++ -std=c++17 -O2 -mavx2 -mfma -mf16c -DTURBOSPARSE_X86 -DKERNELS=avx2_kernels -Icsrc
//     tests/kernels_check.cpp csrc/kernels_avx2.cpp csrc/kernels_ref.cpp -o check && ./check
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <vector>

#include "kernels.h"

namespace {

constexpr double kRelativeRms = 2e-5;  // of float32 sums, as in tests/test_kernels.py
constexpr const char* kQuants[QUANTS] = {"f16", "q8", "q4"};
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::mt19937 random_bits(0);
int failures = 0;

#define CHECK(condition, ...)               \
  do {                                      \
    if (!(condition)) {                     \
      if (++failures <= 20) {               \
        std::printf("FAILED " __VA_ARGS__); \
        std::printf(": %s\n", #condition);  \
      }                                     \
    }                                       \
  } while (0)

// Memory that starts at a cache line, ends where it is asked to and is full of NaN, so that a
// sanitizer sees what is read or written behind it, and the checks what is not written.
template <typename T>
class Block {
 public:
  explicit Block(int64_t count)
      : count_(count), data_(static_cast<T*>(operator new(count * sizeof(T), kAlignment))) {
    std::memset(data_, 0xff, count * sizeof(T));
  }
  Block(const Block&) = delete;
  ~Block() { operator delete(data_, kAlignment); }
  operator T*() const { return data_; }
  T* begin() const { return data_; }
  T* end() const { return data_ + count_; }

 private:
  static constexpr std::align_val_t kAlignment{ROW_ALIGNMENT};
  const int64_t count_;
  T* const data_;
};

// As in csrc/matrix.cpp.
int64_t row_stride(int quant, int cols) {
  const int64_t scales = cols / GROUP * int64_t{2};
  const int64_t payload = quant == QUANT_F16  ? cols * int64_t{2}
                          : quant == QUANT_Q8 ? cols + scales
                                              : cols / 2 + scales;
  return (payload + ROW_ALIGNMENT - 1) / ROW_ALIGNMENT * ROW_ALIGNMENT;
}

// Zero, subnormal, or up to 4 in size.
uint16_t random_half() {
  const uint32_t bits = random_bits();
  const uint32_t exponent = bits >> 16 & 7 ? 6 + bits % 11 : 0;
  return static_cast<uint16_t>((bits >> 31) << 15 | exponent << 10 |
                               (bits >> 20 & 15 ? bits >> 5 & 0x3ff : 0));
}

// Packed rows, `stride` bytes apart: any payload, with the scales of q8 and q4 behind it.
void fill_rows(uint8_t* data, int64_t rows, int64_t stride, int quant, int cols) {
  std::memset(data, 0, rows * stride);
  for (int64_t i = 0; i < rows; ++i) {
    uint8_t* row = data + i * stride;
    const int bytes = quant == QUANT_F16 ? 0 : quant == QUANT_Q8 ? cols : cols / 2;
    for (int b = 0; b < bytes; ++b) row[b] = static_cast<uint8_t>(random_bits());
    const int halves = quant == QUANT_F16 ? cols : cols / GROUP;
    for (int h = 0; h < halves; ++h) {
      const uint16_t half = random_half();
      std::memcpy(row + bytes + 2 * h, &half, sizeof half);
    }
  }
}

struct Case {
  int quant;
  int cols;
  Rows rows;
  std::vector<float> weights;  // [count, cols], of the rows that `rows` names

  const Kernels& reference() const { return reference_kernels[quant]; }
  const Kernels& tested() const { return KERNELS[quant]; }
  const float* row(int64_t i) const { return &weights[i * cols]; }
};

#define WHERE "%s, %d cols, %d rows%s"
#define HERE(c)                                                   \
  kQuants[(c).quant], (c).cols, static_cast<int>((c).rows.count), \
      (c).rows.indices ? " by index" : ""

// The largest |x| of each group of 32, at each of its places: q4 keeps x to that precision.
std::vector<double> sizes_of(const float* x, int cols) {
  std::vector<double> sizes(cols);
  for (int from = 0; from < cols; from += GROUP) {
    double top = 0;
    const int end = from + GROUP < cols ? from + GROUP : cols;
    for (int i = from; i < end; ++i) top = std::fmax(top, std::fabs(x[i]));
    for (int i = from; i < end; ++i) sizes[i] = top;
  }
  return sizes;
}

// The squares of errors against the squares of what sums of random signs would be. Nothing is asked
// of values that float32 holds as subnormals.
struct Error {
  double squares = 0, expected = 0;
  int64_t terms = 0;

  void add(double error, double size, int64_t count) {
    squares += error * error;
    expected += size;
    terms += count;
  }
  bool small() const {  // false for NaN
    return std::sqrt(squares) <= kRelativeRms * std::sqrt(expected) + FLT_MIN * terms;
  }
  double relative() const { return std::sqrt(squares / expected); }
};

void check_dequantise(const Case& c) {
  for (int64_t i = 0; i < c.rows.count; ++i) {
    const int64_t index = c.rows.indices ? c.rows.indices[i] : i;
    const Block<float> out(c.cols);
    c.tested().dequantise_row(c.rows.data + index * c.rows.stride, out, c.cols);
    for (int j = 0; j < c.cols; ++j) {
      CHECK(out[j] == c.row(i)[j], "dequantise_row of " WHERE ", row %d, col %d, %g for %g",
            HERE(c), static_cast<int>(i), j, out[j], c.row(i)[j]);
    }
  }
}

// dots of the rows with x; in NaN where x has a value that is not finite.
void check_dots(const Case& c, const float* x, const char* what) {
  bool finite = true;
  for (int j = 0; j < c.cols; ++j) finite &= std::isfinite(x[j]);
  const Block<uint8_t> prepared(c.tested().prepared_bytes(c.cols));
  const Block<float> out(c.rows.count);
  c.tested().prepare(x, c.cols, prepared);
  c.tested().dots(&c.rows, prepared, c.cols, out);

  const std::vector<double> sizes = sizes_of(x, c.cols);
  Error error;
  for (int64_t i = 0; i < c.rows.count; ++i) {
    if (!finite) {
      CHECK(!std::isfinite(out[i]), "dots of " WHERE ", x %s, row %d, %g", HERE(c), what,
            static_cast<int>(i), out[i]);
      continue;
    }
    double truth = 0, size = 0;
    for (int j = 0; j < c.cols; ++j) {
      const double weight = c.row(i)[j];
      truth += weight * x[j];
      size += weight * weight * sizes[j] * sizes[j];
    }
    error.add(out[i] - truth, size, c.cols);
  }
  CHECK(error.small(), "dots of " WHERE ", x %s, relative RMS %g", HERE(c), what, error.relative());
}

// axpys twice and add_sum: out + 2 * Σ coefficient * row, and the same with a lone NaN or infinity.
void check_axpys(const Case& c, const std::vector<float>& coefficients, const char* what) {
  bool finite = true;
  for (float coefficient : coefficients) finite &= std::isfinite(coefficient);
  const Block<float> sum(c.tested().sum_floats(c.cols));
  for (float& value : sum) value = 0;
  for (int turn = 0; turn < 2; ++turn) {
    c.tested().axpys(&c.rows, coefficients.data(), c.cols, sum);
  }
  const Block<float> out(c.cols);
  for (int j = 0; j < c.cols; ++j) out[j] = static_cast<float>(j % 3 - 1);
  c.tested().add_sum(sum, c.cols, out);

  Error error;
  for (int j = 0; j < c.cols; ++j) {
    if (!finite) {
      CHECK(!std::isfinite(out[j]), "axpys of " WHERE ", coefficients %s, col %d, %g", HERE(c),
            what, j, out[j]);
      continue;
    }
    double truth = j % 3 - 1, size = truth * truth;
    for (int64_t i = 0; i < c.rows.count; ++i) {
      const double term = 2.0 * coefficients[i] * c.row(i)[j];
      truth += term;
      size += term * term;
    }
    error.add(out[j] - truth, size, c.rows.count);
  }
  CHECK(error.small(), "axpys of " WHERE ", coefficients %s, relative RMS %g", HERE(c), what,
        error.relative());
}

// Values of a normal distribution times `size`.
std::vector<float> normal(int64_t count, double size) {
  std::normal_distribution<double> distribution;
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(size * distribution(random_bits));
  return values;
}

// Calls check(values, name) with values of every size, and with single ones that are not finite.
template <typename Check>
void for_inputs(int64_t count, Check check) {
  for (const char* size : {"1", "0", "1e-44", "1e-38", "1e-30", "1e-10", "1e10", "1e30"}) {
    check(normal(count, std::atof(size)), size);
  }
  std::vector<float> mixed = normal(count, 1);
  for (float& value : mixed) value = std::ldexp(value, -static_cast<int>(random_bits() % 60));
  check(mixed, "of mixed sizes");
  // the largest of a group at 127.5 of 128, where its first byte as an integer could overflow
  std::vector<float> top(count);
  for (int64_t i = 0; i < count; ++i) {
    const float largest = 2 - (126 + random_bits() % 256 / 64.0f) / (1 << 14);
    top[i] = i % GROUP ? largest * (i % 5 - 2) / 4 : largest;
  }
  check(top, "at the ends of integers");
  for (float value : {kNan, -HUGE_VALF, HUGE_VALF}) {
    for (int64_t place : {int64_t{0}, count / 2, count - 1}) {
      if (count == 0) continue;
      std::vector<float> values = normal(count, 1);
      values[place] = value;
      check(values, std::isnan(value) ? "with NaN" : "with infinity");
    }
  }
}

void check(int quant, int cols, int64_t count, bool by_index) {
  // by index: every third row, the last one first, with the rows of a record side by side
  const int64_t own = row_stride(quant, cols), stride = by_index ? 3 * own : own;
  const int64_t held = by_index ? 3 * count : count;
  const Block<uint8_t> data(held * stride);
  fill_rows(data, held * stride / own, own, quant, cols);
  std::vector<int32_t> indices;
  for (int64_t i = count; i-- > 0;) indices.push_back(static_cast<int32_t>(3 * i + i % 3));

  Case c{quant, cols, {data, stride, by_index ? indices.data() : nullptr, count}, {}};
  c.weights.resize(count * cols);
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* row = data + (by_index ? indices[i] : i) * stride;
    c.reference().dequantise_row(row, &c.weights[i * cols], cols);
  }
  check_dequantise(c);
  for_inputs(cols,
             [&](const std::vector<float>& x, const char* what) { check_dots(c, x.data(), what); });
  for_inputs(count, [&](const std::vector<float>& coefficients, const char* what) {
    check_axpys(c, coefficients, what);
  });
}

}  // namespace

int main() {
  int cases = 0;
  for (int quant = 0; quant < QUANTS; ++quant) {
    const std::vector<int> widths = quant == QUANT_F16
                                        ? std::vector<int>{1, 7, 32, 63, 172, 4096}
                                        : std::vector<int>{32, 96, 512, 544, 1056, 4096};
    for (int cols : widths) {
      for (int64_t count : {0, 1, 3, 4, 5, 63}) {
        for (bool by_index : {false, true}) {
          check(quant, cols, count, by_index);
          ++cases;
        }
      }
    }
  }
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures ? 1 : 0;
}
