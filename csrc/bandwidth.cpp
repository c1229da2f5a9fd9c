#include "bandwidth.h"

#include <vector>

#include "threads.h"

namespace {

constexpr int kStreams = 8;   // one stream alone is limited by the prefetcher stopping at page ends
constexpr int64_t kLine = 8;  // words

template <int kLocality>
uint64_t read_share(const uint64_t* words, int64_t count) {
  const int64_t stream = count / kStreams / kLine * kLine;
  uint64_t sums[kLine] = {};
  for (int64_t i = 0; i < stream; i += kLine) {
    for (int s = 0; s < kStreams; ++s) {
      const uint64_t* line = words + s * stream + i;
      __builtin_prefetch(line + 64 * kLine, 0, kLocality);
      for (int64_t w = 0; w < kLine; ++w) sums[w] += line[w];
    }
  }
  for (int64_t i = kStreams * stream; i < count; ++i) sums[0] += words[i];
  uint64_t sum = 0;
  for (const uint64_t part : sums) sum += part;
  return sum;
}

}  // namespace

uint64_t read_all(const uint64_t* words, int64_t count, int threads, int cache) {
  const auto read = cache == 1 ? read_share<3> : read_share<2>;
  std::vector<uint64_t> sums(threads);
  parallel(threads, [&](int thread) {
    const int64_t begin = count * thread / threads, end = count * (thread + 1) / threads;
    sums[thread] = read(words + begin, end - begin);
  });
  uint64_t sum = 0;
  for (const uint64_t part : sums) sum += part;
  return sum;
}
