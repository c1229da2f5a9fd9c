// How SIMD kernels walk over the rows of a matrix: what they fetch ahead, how rows and tokens meet,
// and sums of rows for several tokens.
//
// kernels_rows.inl and kernels_simd.inl hold the kernels of every SIMD instruction set, written
// once. A kernels_<isa>.cpp defines these words in its anonymous namespace and then includes the
// two there, in this order, so that each instruction set gets a copy with its own flags:
//
//   Floats, Ints                 a register of kLanes floats, or of as many 32-bit integers
//   kLanes                       4, 8 or 16
//   kRows                        rows read side by side
//   kDotTokens, kAxpyTokens      tokens that share an unpacked row, in dots and in sums of rows
//   kWide                        registers of each token's sum, in sums of rows for several tokens
//   zero, broadcast, load, store, add, multiply, multiply_add (a b + c), sum_of
//   from_halves(p), from_halves(p, lanes), from_bytes(p)         halves or int8 as floats
//   load_words(p, lanes)         the first `lanes` 32-bit words, then zeros
//   load_ints(p)                 a whole aligned register
//   low_nibbles, high_nibbles    of each byte, as bytes
//   Coded, Linear                the weights of q4 and of q4_0, each with
//     kZero                      how much more than the weights `low` and `high` give
//     low, high(words)           of dots: the weights of each byte's low or high nibble
//     kWhole                     x is whole integers, not limbs (see Q4Tile)
//     first_products(start)      what `products` starts from
//     products(sum, w, x, half)  sum + the products of those and a half of x, up to 8 times
//     total(sums, tile, lane)    the floats that the sums of both halves stand for; kWhole has one
//     expand(words)              of sums of rows: what `weight` takes nibbles from
//     weight(expanded, k)        nibble k of each word, a float
//
// Nothing in the two may be seen by the linker, which would merge it across instruction sets: no
// standard C++ header, no inline function outside the anonymous namespace.

// For functions on arrays of registers: a call would pass them through memory.
#define ALWAYS_INLINE inline __attribute__((always_inline))

const uint8_t* row_at(const Rows& rows, int64_t i) {
  return rows.data + (rows.indices ? rows.indices[i] : i) * rows.stride;
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

int smaller(int a, int b) { return a < b ? a : b; }

// Cache lines of the next rows, fetched while the present ones are at work.
ALWAYS_INLINE void prefetch(const uint8_t* from, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

// Bytes of a row of `bits` a weight, scales included.
int row_bytes(int bits, int cols) { return cols * bits / 8 + (bits < 16 ? cols / GROUP * 2 : 0); }

// From one row to the next in a matrix.
int64_t row_stride(int bits, int cols) {
  return round_up(row_bytes(bits, cols), bits < 16 ? ROW_STEP : CACHE_LINE);
}

// How many rows ahead to fetch: the next ones, or of short rows as many as make up for the memory's
// latency.
int64_t rows_ahead(int row_bytes, int bytes) {
  return kRows * (1 + bytes / (kRows * row_bytes + 1));
}

// Where the rows of a call lie and how far ahead they are fetched.
struct Ahead {
  int64_t stride;  // of rows that follow each other
  int64_t together, scattered;

  Ahead(const Rows& rows, int bits, int cols)
      : stride(row_stride(bits, cols)),
        together(rows_ahead(row_bytes(bits, cols), rows.together.bytes)),
        scattered(rows_ahead(row_bytes(bits, cols), rows.scattered.bytes)) {}
};

// N rows, and those to fetch meanwhile, some of their lines at each step. Which rows these are and
// in what order is the machine's matter; at the end they are the ones at hand, and what lies
// behind.
template <int N, int StepBytes>
class Group {
 public:
  const uint8_t* row[N];

  Group(const Rows& rows, int64_t i, const Ahead& ahead) {
    for (int n = 0; n < N; ++n) row[n] = row_at(rows, i + n);
    find_next(rows, i, ahead.together);
    const bool together = N > 1 && next_[N - 1] == next_[0] + (N - 1) * ahead.stride;
    if (!together) find_next(rows, i, ahead.scattered);
    const Fetching& how = together ? rows.together : rows.scattered;
    cache_ = how.order == FETCH_NONE ? 0 : how.cache;
    if (together && how.order == FETCH_STREAM) {
      for (int n = 1; n < N; ++n) next_[n] = next_[0] + CACHE_LINE * n;
      by_ = CACHE_LINE * N;
    }
  }

  ALWAYS_INLINE void step() {
#pragma GCC unroll 2
    for (int i = 0; i < StepBytes / CACHE_LINE; ++i) fetch();
    owed_ += StepBytes % CACHE_LINE;
    if (owed_ >= CACHE_LINE) {
      fetch();
      owed_ -= CACHE_LINE;
    }
  }

 private:
  void find_next(const Rows& rows, int64_t i, int64_t ahead) {
    for (int n = 0; n < N; ++n) {
      next_[n] = row_at(rows, i + ahead + n < rows.count ? i + ahead + n : i + n);
    }
  }

  ALWAYS_INLINE void fetch() {
    if (cache_ == 1) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) __builtin_prefetch(next_[n] + at_, 0, 3);
    } else if (cache_ == 2) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) __builtin_prefetch(next_[n] + at_, 0, 2);
    }
    at_ += by_;
  }

  const uint8_t* next_[N];
  int cache_, by_ = CACHE_LINE, at_ = 0, owed_ = 0;
};

// Calls a kernel for some rows side by side until all had their turn.
template <typename Kernel>
void for_rows(const Kernel& kernel, int64_t rows) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) kernel.template run<kRows>(i);
  for (; i + 2 <= rows; i += 2) kernel.template run<2>(i);
  for (; i < rows; ++i) kernel.template run<1>(i);
}

// What the kernels on `rows` and several tokens have in common.
struct Dots {
  const Rows& rows;
  Ahead ahead;
  const void* prepared;
  int64_t prepared_stride;
  int cols;
  float* out;
  int64_t out_stride;

  template <typename Form>
  const Form* x(int64_t token) const {
    const char* bytes = static_cast<const char*>(prepared) + token * prepared_stride;
    return reinterpret_cast<const Form*>(bytes);
  }

  template <int N, int T>
  ALWAYS_INLINE void write(int64_t i, int64_t token, const Floats (&sums)[N][T]) const {
    for (int t = 0; t < T; ++t) {
      for (int n = 0; n < N; ++n) out[(token + t) * out_stride + i + n] = sum_of(sums[n][t]);
    }
  }
};

// Some rows and all tokens.
template <typename Kernel>
struct MeetTokens {
  const Kernel& kernel;
  int64_t tokens;

  template <int N>
  void run(int64_t i) const {
    int64_t t = 0;
    for (; t + kDotTokens <= tokens; t += kDotTokens) kernel.template run<N, kDotTokens>(i, t);
    for (; t < tokens; ++t) kernel.template run<N, 1>(i, t);
  }
};

// sum += coefficients · rows, for one token.
struct Axpys {
  const Rows& rows;
  Ahead ahead;
  const float* coefficients;
  int cols;
  float* sum;
};

// The same for several tokens: a piece of some rows is unpacked to floats, in the order of the
// sums, and multiplied with all tokens. Together with their sums it fits the nearest cache. The
// arithmetic is that of one token, so a sum does not depend on how many there are.
constexpr int kPiece = TILE / 4, kUnpacked = 64;  // columns, rows
constexpr int kMany = 4;                          // tokens from which it pays

struct Piece {
  alignas(64) float weights[kUnpacked][kPiece] = {};  // without their scales
  alignas(64) float scales[kUnpacked][TILE_GROUPS] = {};
};

// sums[t] += coefficients[t, n] * row n of the piece, for T tokens and `count` rows.
template <typename Form, int T>
void add_piece(const Piece& piece, int count, const float* coefficients, int64_t stride, int width,
               float* sums, int64_t sum_stride) {
  constexpr int kApart = Form::kApart;
  for (int from = 0; from < width; from += kWide * kApart) {
    for (int c = from; c < from + kApart; c += kLanes) {
      Floats y[T][kWide];
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
        for (int k = 0; k < kWide; ++k) y[t][k] = load(sums + t * sum_stride + c + k * kApart);
      }
      for (int n = 0; n < count; ++n) {
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          Floats a;
#pragma GCC unroll 4
          for (int k = 0; k < kWide; ++k) {
            const int at = c + k * kApart;
            if (k % Form::kAlike == 0) {
              a = Form::scaled(coefficients[t * stride + n], piece.scales[n], at);
            }
            y[t][k] = multiply_add(load(piece.weights[n] + at), a, y[t][k]);
          }
        }
      }
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
        for (int k = 0; k < kWide; ++k) store(sums + t * sum_stride + c + k * kApart, y[t][k]);
      }
    }
  }
}

// `Form` unpacks the piece at column c of a row, knows its bytes, and scales a coefficient for the
// lanes at a column of the piece; kAlike registers that lie kApart floats from each other have the
// same scales.
template <typename Form>
void axpys_many(const Rows& rows, const float* coefficients, int64_t stride, int64_t tokens,
                int cols, float* sums, int64_t sum_stride) {
  Piece piece;
  for (int64_t i = 0; i < rows.count; i += kUnpacked) {
    const int count = static_cast<int>(rows.count - i < kUnpacked ? rows.count - i : kUnpacked);
    for (int c = 0; c < sum_stride; c += kPiece) {
      for (int n = 0; n < count; ++n) {
        const uint8_t* row = row_at(rows, i + n);
        Form::unpack(row, cols, c, piece.weights[n], piece.scales[n]);
        const bool last = c + kPiece >= sum_stride && i + kUnpacked + n < rows.count;
        const uint8_t* next = last ? row_at(rows, i + kUnpacked + n) : row;
        Form::fetch(next, cols, last ? 0 : c + kPiece);
      }
      const int64_t left = sum_stride - c;
      const int width = left < kPiece ? static_cast<int>(left) : kPiece;
      const float* a = coefficients + i;
      float* y = sums + c;
      int64_t t = 0;
      for (; t + kAxpyTokens <= tokens; t += kAxpyTokens) {
        add_piece<Form, kAxpyTokens>(piece, count, a + t * stride, stride, width,
                                     y + t * sum_stride, sum_stride);
      }
      for (; t < tokens; ++t) {
        add_piece<Form, 1>(piece, count, a + t * stride, stride, width, y + t * sum_stride,
                           sum_stride);
      }
    }
  }
}
