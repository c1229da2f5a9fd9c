#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>

namespace {

// A waiting thread first spins, for work follows work within microseconds in decoding; then it
// gives its core to whoever wants it, since a spinning thread beside a busy neighbour costs the
// neighbour's whole time slice (libgomp's barrier: 3 to 30 times slower there); a worker without
// work for about a millisecond sleeps.
constexpr int kSpins = 2000;
constexpr int kYields = 500;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Worker {
 public:
  explicit Worker(int index) : index_(index), thread_([this] { loop(); }) { thread_.detach(); }

  void start(detail::Job job, void* context, std::atomic<int>* unfinished) {
    job_ = job;
    context_ = context;
    unfinished_ = unfinished;
    ticket_.fetch_add(1);
    if (asleep_.load()) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_one();
    }
  }

 private:
  void loop() {
    for (uint64_t done = 0;; ++done) {
      wait_for_more_than(done);
      job_(context_, index_);
      unfinished_->fetch_sub(1, std::memory_order_release);
    }
  }

  void wait_for_more_than(uint64_t done) {
    for (int turn = 0; turn < kSpins + kYields; ++turn) {
      if (ticket_.load(std::memory_order_acquire) > done) return;
      turn < kSpins ? pause() : std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_.store(true);
    wake_.wait(lock, [&] { return ticket_.load() > done; });
    asleep_.store(false);
  }

  const int index_;
  detail::Job job_ = nullptr;
  void* context_ = nullptr;
  std::atomic<int>* unfinished_ = nullptr;
  std::atomic<uint64_t> ticket_{0};  // jobs given so far
  std::atomic<bool> asleep_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::thread thread_;  // last: it starts when all else is there
};

struct Pool {
  std::mutex turn;
  std::deque<Worker> workers;  // workers[i] is thread i + 1
};

}  // namespace

void detail::run(int threads, Job job, void* context) {
  if (threads == 1) return job(context, 0);
  static Pool& pool = *new Pool;  // never destroyed: its threads end with the process
  std::lock_guard<std::mutex> turn(pool.turn);
  while (static_cast<int>(pool.workers.size()) < threads - 1) {
    pool.workers.emplace_back(static_cast<int>(pool.workers.size()) + 1);
  }
  std::atomic<int> unfinished{threads - 1};
  for (int i = 0; i < threads - 1; ++i) pool.workers[i].start(job, context, &unfinished);
  job(context, 0);
  for (int spins = 0; unfinished.load(std::memory_order_acquire) > 0; ++spins) {
    spins < kSpins ? pause() : std::this_thread::yield();
  }
}
