// Sections of uneven work from several callers at once, for ThreadSanitizer to watch
// (.ci/sanitize).
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "threads.h"

namespace {

constexpr int kCallers = 4;
constexpr int kSections = 500;
constexpr int kMaxShares = 8;

std::atomic<int> wrong{0};

// Memory that no two shares have in common is written in the shares and read after the section,
// without any lock of its own.
void call_sections(unsigned caller) {
  std::vector<int64_t> sums(kMaxShares);
  for (int section = 0; section < kSections; ++section) {
    const int shares = 1 + (section + caller) % kMaxShares;
    const auto rounds = [&](int share) { return (section * 7 + share * 13) % 29 * 100; };
    parallel(shares, [&](int share) {
      for (int i = 0; i <= rounds(share); ++i) sums[share] += share + 1;
    });
    for (int share = 0; share < shares; ++share) {
      wrong += sums[share] != int64_t{share + 1} * (rounds(share) + 1);
      sums[share] = 0;
    }
    try {
      parallel(shares, [&](int share) {
        if (share % 3 == 1) throw share;
      });
      wrong += shares > 1;
    } catch (int share) {
      wrong += share % 3 != 1;
    }
    // long enough for the workers to fall asleep
    if (section % 100 == 99) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

}  // namespace

int main() {
  std::vector<std::thread> callers;
  for (unsigned caller = 0; caller < kCallers; ++caller)
    callers.emplace_back(call_sections, caller);
  for (std::thread& caller : callers) caller.join();
  std::printf("%d sections, %d wrong shares\n", kCallers * kSections, wrong.load());
  return wrong ? 1 : 0;
}
