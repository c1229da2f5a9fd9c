// Compares the kernels of one instruction set with the reference, on rows and inputs made here: for
// machines on which Python does not run, such as an emulated one (tests/test_neon.py).
//
//   g++ -std=c++17 -O2 -mavx2 -mfma -mf16c -DTURBOSPARSE_X86 -DKERNELS=avx2_kernels -Icsrc
//     tests/kernels_check.cpp csrc/kernels_avx2.cpp csrc/kernels_ref.cpp -o check && ./check
#include <algorithm>
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

// Of float32 sums, as in tests/test_kernels.py; q4 keeps x to 15 bits of the largest of a group.
constexpr double kRelativeRms[QUANTS] = {2e-5, 2e-5, 1.2e-4, 1.2e-4};
constexpr const char* kQuants[QUANTS] = {"f16", "q8", "q4", "q4_0"};
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
  static constexpr std::align_val_t kAlignment{CACHE_LINE};
  const int64_t count_;
  T* const data_;
};

// As in csrc/matrix.cpp.
int64_t row_stride(int quant, int cols) {
  const int64_t scales = cols / GROUP * int64_t{2};
  const int64_t payload = quant == QUANT_F16  ? cols * int64_t{2}
                          : quant == QUANT_Q8 ? cols + scales
                                              : cols / 2 + scales;
  const int64_t step = quant == QUANT_F16 ? CACHE_LINE : ROW_STEP;
  return (payload + step - 1) / step * step;
}

// Zero, subnormal, or up to 2^(largest - 14) in size.
uint16_t random_half(uint32_t largest) {
  const uint32_t bits = random_bits();
  const uint32_t exponent = bits >> 16 & 7 ? largest - bits % 11 : 0;
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
      const uint16_t half =
          random_half(quant == QUANT_Q4 ? 12 : 16);  // its codes are 16 times as large
      std::memcpy(row + bytes + 2 * h, &half, sizeof half);
    }
  }
}

struct Case {
  int quant;
  int cols;
  Rows rows;
  std::vector<float> weights;  // [count, cols], of the rows that `rows` names

  const Kernels& reference() const { return reference_kernels.of[quant]; }
  const Kernels& tested() const { return KERNELS.of[quant]; }
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
// of values that float32 holds as subnormals: neither of sums nor of what weights are times.
struct Error {
  double squares = 0, expected = 0, subnormals = 0;

  void add(double error, double size, double weights) {
    squares += error * error;
    expected += size;
    subnormals += 1 + weights;
  }
  bool small(int quant) const {  // false for NaN
    return std::sqrt(squares) <= kRelativeRms[quant] * std::sqrt(expected) + FLT_MIN * subnormals;
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

bool all_finite(const float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(values[i])) return false;
  }
  return true;
}

// dots of one token's x, which came out as `out`; not finite where x is not.
void check_dots(const Case& c, const float* x, const float* out, const char* what) {
  const bool finite = all_finite(x, c.cols);
  const std::vector<double> sizes = sizes_of(x, c.cols);
  Error error;
  for (int64_t i = 0; i < c.rows.count; ++i) {
    if (!finite) {
      CHECK(!std::isfinite(out[i]), "dots of " WHERE ", x %s, row %d, %g", HERE(c), what,
            static_cast<int>(i), out[i]);
      continue;
    }
    double truth = 0, size = 0, weights = 0;
    for (int j = 0; j < c.cols; ++j) {
      const double weight = c.row(i)[j];
      weights += std::fabs(weight);
      truth += weight * x[j];
      size += weight * weight * sizes[j] * sizes[j];
    }
    error.add(out[i] - truth, size, weights);
  }
  CHECK(error.small(c.quant), "dots of " WHERE ", x %s, relative RMS %g", HERE(c), what,
        error.relative());
}

// out + 2 * Σ coefficient * row, which came out as `out`; not finite where a coefficient is not.
void check_axpys(const Case& c, const float* coefficients, const float* out, const char* what) {
  const bool finite = all_finite(coefficients, c.rows.count);
  Error error;
  for (int j = 0; j < c.cols; ++j) {
    if (!finite) {
      CHECK(!std::isfinite(out[j]), "axpys of " WHERE ", coefficients %s, col %d, %g", HERE(c),
            what, j, out[j]);
      continue;
    }
    double truth = j % 3 - 1, size = truth * truth, weights = 0;
    for (int64_t i = 0; i < c.rows.count; ++i) {
      weights += 2 * std::fabs(c.row(i)[j]);
      const double term = 2.0 * coefficients[i] * c.row(i)[j];
      truth += term;
      size += term * term;
    }
    error.add(out[j] - truth, size, weights);
  }
  CHECK(error.small(c.quant), "axpys of " WHERE ", coefficients %s, relative RMS %g", HERE(c), what,
        error.relative());
}

constexpr int64_t kPast = 3;  // values between the outputs of two tokens

// dots of the rows with several tokens, x[tokens, cols].
void run_dots(const Case& c, const std::vector<float>& x, int64_t tokens, const char* what) {
  const int64_t bytes = c.tested().prepared_bytes(c.cols), stride = c.rows.count + kPast;
  const Block<uint8_t> prepared(tokens * bytes);
  const Block<float> out(tokens * stride);
  for (int64_t t = 0; t < tokens; ++t) {
    c.tested().prepare(&x[t * c.cols], c.cols, prepared + t * bytes);
  }
  c.tested().dots(&c.rows, prepared, tokens, c.cols, out, stride);
  for (int64_t t = 0; t < tokens; ++t) {
    check_dots(c, &x[t * c.cols], out + t * stride, what);
    for (int64_t i = c.rows.count; i < stride; ++i) {
      CHECK(std::isnan(out[t * stride + i]), "dots of " WHERE " writes past a token", HERE(c));
    }
  }
}

// axpys of several tokens, twice, and add_sum; coefficients[tokens, rows].
void run_axpys(const Case& c, const std::vector<float>& coefficients, int64_t tokens,
               const char* what) {
  const int64_t floats = c.tested().sum_floats(c.cols), count = c.rows.count;
  const Block<float> sums(tokens * floats);
  for (float& value : sums) value = 0;
  for (int turn = 0; turn < 2; ++turn) {
    c.tested().axpys(&c.rows, coefficients.data(), count, tokens, c.cols, sums);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const Block<float> out(c.cols);
    for (int j = 0; j < c.cols; ++j) out[j] = static_cast<float>(j % 3 - 1);
    c.tested().add_sum(sums + t * floats, c.cols, out);
    check_axpys(c, coefficients.data() + t * count, out, what);
  }
}

// Values of a normal distribution times `size`.
std::vector<float> normal(int64_t count, double size) {
  std::normal_distribution<double> distribution;
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(size * distribution(random_bits));
  return values;
}

// Calls run(values[tokens, count], tokens, name) with values of every size, and with single ones
// that are not finite: these in the token in the middle, the others being ordinary.
template <typename Run>
void for_inputs(int64_t count, Run run) {
  const auto run_with = [&](const std::vector<float>& special, const char* what) {
    for (int64_t tokens : {1, 2, 5}) {
      std::vector<float> values = normal(tokens * count, 1);
      std::copy(special.begin(), special.end(), values.begin() + tokens / 2 * count);
      run(values, tokens, what);
    }
  };
  for (const char* size : {"1", "0", "1e-44", "1e-38", "1e-30", "1e-10", "1e10", "1e30"}) {
    run_with(normal(count, std::atof(size)), size);
  }
  std::vector<float> mixed = normal(count, 1);
  for (float& value : mixed) value = std::ldexp(value, -static_cast<int>(random_bits() % 60));
  run_with(mixed, "of mixed sizes");
  // the largest of a group at 127.5 of 128, where its first byte as an integer could overflow
  std::vector<float> top(count);
  for (int64_t i = 0; i < count; ++i) {
    const float largest = 2 - (126 + random_bits() % 256 / 64.0f) / (1 << 14);
    top[i] = i % GROUP ? largest * (i % 5 - 2) / 4 : largest;
  }
  run_with(top, "at the ends of integers");
  for (float value : {kNan, -HUGE_VALF, HUGE_VALF}) {
    for (int64_t place : {int64_t{0}, count / 2, count - 1}) {
      if (count == 0) continue;
      std::vector<float> values = normal(count, 1);
      values[place] = value;
      run_with(values, std::isnan(value) ? "with NaN" : "with infinity");
    }
  }
}

// How many bits of the rows agree with given ones.
void check_agreements(int words, int64_t count) {
  const int64_t stride = (words * 8 + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
  const Block<uint8_t> data(count * stride);
  for (uint8_t& byte : data) byte = static_cast<uint8_t>(random_bits());
  const Block<uint64_t> bits(words);
  for (uint64_t& word : bits) word = uint64_t{random_bits()} << 32 | random_bits();
  const Block<int32_t> out(count);
  const Rows rows{data, stride, nullptr, count, {}, {}};
  KERNELS.agreements(&rows, bits, words, out);
  for (int64_t i = 0; i < count; ++i) {
    int expected = 0;
    for (int w = 0; w < words; ++w) {
      uint64_t word;
      std::memcpy(&word, data + i * stride + 8 * w, sizeof word);
      expected += __builtin_popcountll(~(word ^ bits[w]));
    }
    CHECK(out[i] == expected, "agreements of %d words, row %d of %d, %d for %d", words,
          static_cast<int>(i), static_cast<int>(count), out[i], expected);
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

  // each way to fetch ahead in turn
  const auto fetching = [&](int turn) {
    return Fetching{static_cast<int16_t>(turn % FETCH_ORDERS), static_cast<int16_t>(1 + turn % 2),
                    turn % 5 << 10};
  };
  Case c{quant,
         cols,
         {data, stride, by_index ? indices.data() : nullptr, count, fetching(cols + count),
          fetching(count)},
         {}};
  c.weights.resize(count * cols);
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* row = data + (by_index ? indices[i] : i) * stride;
    c.reference().dequantise_row(row, &c.weights[i * cols], cols);
  }
  check_dequantise(c);
  for_inputs(cols, [&](const std::vector<float>& x, int64_t tokens, const char* what) {
    run_dots(c, x, tokens, what);
  });
  for_inputs(count, [&](const std::vector<float>& coefficients, int64_t tokens, const char* what) {
    run_axpys(c, coefficients, tokens, what);
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
      // Rows are taken four at a time, 64 at most, and tiles of 512 weights one by one, each with a
      // rest: many rows meet two tiles, and rows of more tiles need not be many.
      const std::vector<int64_t> counts =
          cols > 1024 ? std::vector<int64_t>{1, 5} : std::vector<int64_t>{0, 1, 3, 4, 5, 63};
      for (int64_t count : counts) {
        for (bool by_index : {false, true}) {
          check(quant, cols, count, by_index);
          ++cases;
        }
      }
    }
  }
  for (int words : {1, 2, 7, 8, 16, 33}) {
    for (int64_t count : {0, 1, 3, 4, 5, 63}) check_agreements(words, count);
  }
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures ? 1 : 0;
}
