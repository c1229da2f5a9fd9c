#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

namespace {

// A waiting thread first spins, for work follows work within microseconds in decoding; then it
// gives its core to whoever wants it, since a spinning thread beside a busy neighbour costs whole
// time slices; a worker without work for about a millisecond sleeps.
constexpr int kSpins = 2000;
constexpr int kYields = 500;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The shares of a section are claimed one by one, by the caller too: a worker that the system has
// not scheduled is not waited for. Which thread takes a share does not change what the share
// computes.
class Pool {
 public:
  void run(int threads, int shares, detail::Job job, const void* context) {
    std::lock_guard<std::mutex> turn(turn_);
    for (; workers_ < threads - 1; ++workers_) std::thread([this] { work(); }).detach();
    job_ = job;
    context_ = context;
    unfinished_.store(shares, std::memory_order_relaxed);
    const uint64_t section = (state_.load() >> 32) + 1;
    state_.store(section << 32 | static_cast<uint64_t>(shares) << 16);
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    work_on(section);
    for (int turn = 0; unfinished_.load(std::memory_order_acquire) > 0; ++turn) {
      turn < kSpins ? pause() : std::this_thread::yield();
    }
    if (thrown_) std::rethrow_exception(std::exchange(thrown_, nullptr));
  }

 private:
  void work() {
    for (uint64_t seen = 0;;) {
      seen = wait_for_section_after(seen);
      work_on(seen);
    }
  }

  void work_on(uint64_t section) {
    for (int share; (share = claim(section)) >= 0;) {
      try {
        job_(context_, share);
      } catch (...) {
        std::lock_guard<std::mutex> lock(sleep_);
        if (!thrown_) thrown_ = std::current_exception();
      }
      unfinished_.fetch_sub(1, std::memory_order_release);
    }
  }

  // The next share of the section, or -1. `job_` is safe to read after a claim: the section cannot
  // end before the share does.
  int claim(uint64_t section) {
    uint64_t state = state_.load(std::memory_order_acquire);
    while (state >> 32 == section && (state & 0xffff) < (state >> 16 & 0xffff)) {
      if (state_.compare_exchange_weak(state, state + 1)) return static_cast<int>(state & 0xffff);
    }
    return -1;
  }

  uint64_t wait_for_section_after(uint64_t seen) {
    for (int turn = 0; turn < kSpins + kYields; ++turn) {
      const uint64_t section = state_.load(std::memory_order_acquire) >> 32;
      if (section != seen) return section;
      turn < kSpins ? pause() : std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(sleep_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return state_.load() >> 32 != seen; });
    sleepers_.fetch_sub(1);
    return state_.load() >> 32;
  }

  std::mutex turn_;  // callers take turns
  int workers_ = 0;
  detail::Job job_ = nullptr;
  const void* context_ = nullptr;
  std::exception_ptr thrown_;  // the first one of the section
  // section number (32 bits), its shares (16), the next share to claim (16)
  std::atomic<uint64_t> state_{0};
  std::atomic<int> unfinished_{0};
  std::atomic<int> sleepers_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
};

}  // namespace

void detail::run(int threads, int shares, Job job, const void* context) {
  if (threads == 1 || shares == 1) {
    for (int share = 0; share < shares; ++share) job(context, share);
    return;
  }
  static Pool& pool = *new Pool;  // never destroyed: its threads end with the process
  pool.run(threads, shares, job, context);
}
