// Rows that come from disk while several threads hold some of them; then a file that was cut.
//   store_check FILE
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>

#include "store.h"

namespace {

constexpr int kRow = 512, kRows = 64, kThreads = 3;

int wrong_bytes(Store& store, int64_t first, int thread) {
  const Stored stored{&store, first};
  int wrong = 0;
  for (int turn = 0; turn < 300; ++turn) {
    const std::vector<std::vector<int32_t>> rows{
        {(turn * 3 + thread) % 16, 16 + (turn * 5 + thread) % 16, 32 + turn * 7 % 32}};
    if (turn % 3 == 0) stored.ahead(rows, kThreads);
    const Held held(stored, rows);
    std::vector<int32_t> places;
    stored.find(rows[0], places);
    for (size_t i = 0; i < places.size(); ++i) {
      wrong += store.data()[places[i] * kRow + kRow - 1] != rows[0][i];
    }
  }
  return wrong;
}

}  // namespace

int main(int, char** arguments) {
  const int file = open(arguments[1], O_RDWR | O_CREAT | O_TRUNC, 0600);
  std::vector<uint8_t> bytes(kRow * kRows);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(i / kRow);
  if (write(file, bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size())) return 1;
  Store store(4 * kThreads * kRow, kRow, 1, 4);
  const int64_t first = store.add(file, 0, kRows, kRow);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] { wrong += wrong_bytes(store, first, t); });
  }
  for (std::thread& thread : threads) thread.join();
  if (wrong) return std::printf("%d rows had other bytes\n", wrong.load()), 1;
  if (ftruncate(file, 0)) return 1;
  try {
    for (int32_t row = 0; row < kRows; ++row) const Held held({&store, first}, {{row}});
  } catch (const ReadError&) {
    return 0;
  }
  return std::puts("a file that was cut gave no error"), 1;
}
