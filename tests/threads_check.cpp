// Sections of uneven work from several callers at once, for ThreadSanitizer to watch
// (.ci/sanitize).
#include <atomic>
#include <chrono>
#include <cstdio>
#include <mutex>
#include <set>
#include <stdexcept>
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

// A section uses no more threads than it asks for, also after a larger one.
void check_the_bound() {
  for (const int threads : {8, 2, 3, 8, 2}) {
    for (int section = 0; section < kSections; ++section) {
      std::mutex mutex;
      std::set<std::thread::id> seen;
      parallel(threads, 4 * threads, [&](int) {
        const std::lock_guard<std::mutex> lock(mutex);
        seen.insert(std::this_thread::get_id());
      });
      wrong += seen.size() > static_cast<size_t>(threads);
    }
  }
}

template <typename Work>
void check_refused(const Work& work) {
  try {
    work();
    ++wrong;
  } catch (const std::logic_error&) {
  }
}

void check_refusals() {
  check_refused([] { parallel(2, [](int) { parallel(2, [](int) {}); }); });
  check_refused([] { parallel(2, 65536, [](int) {}); });
  parallel(2, [](int) { parallel(1, [](int) {}); });
}

}  // namespace

int main() {
  check_the_bound();
  check_refusals();
  std::vector<std::thread> callers;
  for (unsigned caller = 0; caller < kCallers; ++caller)
    callers.emplace_back(call_sections, caller);
  for (std::thread& caller : callers) caller.join();
  std::printf("%d sections, %d wrong shares\n", kCallers * kSections, wrong.load());
  return wrong ? 1 : 0;
}
