#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

namespace {

// A waiting thread first spins, for work follows work within microseconds in decoding; then it
// gives its core to whoever wants it, since a spinning thread beside a busy neighbour costs whole
// time slices; a worker without work for about a millisecond sleeps.
constexpr int kSpins = 2000;
constexpr int kYields = 500;

constexpr int kMaxShares = 0xffff;

thread_local bool in_section = false;

thread_local int64_t gone_through = 0;  // see `worked`
std::atomic<bool> counting{false};      // the sections
Counting::Work counted_work;            // of whoever has the turn

// A section whose shares are counted.
struct CountedSection {
  detail::Job job;
  const void* context;
  std::vector<int64_t> numbers;  // of each share

  static void run(const void* section, int share) {
    auto& self = *static_cast<CountedSection*>(const_cast<void*>(section));
    const int64_t before = gone_through;
    self.job(self.context, share);
    self.numbers[share] = gone_through - before;
    gone_through = before;
  }

  void add_to(Counting::Work& work, int threads) const {
    std::vector<int64_t> of_threads(threads);
    for (int64_t share : numbers) *std::min_element(of_threads.begin(), of_threads.end()) += share;
    work.longest += *std::max_element(of_threads.begin(), of_threads.end());
    ++work.sections;
  }
};

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
    for (; workers_ < threads - 1; ++workers_) {
      std::thread([this, index = workers_] { work(index); }).detach();
    }
    job_ = job;
    context_ = context;
    unfinished_.store(shares, std::memory_order_relaxed);
    const bool more = threads - 1 > helpers_.exchange(threads - 1);
    const uint64_t section = section_of(state_.load()) + 1;
    state_.store(section << 32 | static_cast<uint64_t>(shares) << 16);
    if (more || sleepers_.load() > 0) {
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
  static uint64_t section_of(uint64_t state) { return state >> 32; }

  void work(int index) {
    for (uint64_t seen = 0;;) {
      seen = wait_for_section_after(seen, index);
      work_on(seen);
    }
  }

  void work_on(uint64_t section) {
    in_section = true;
    for (int share; (share = claim(section)) >= 0;) {
      try {
        job_(context_, share);
      } catch (...) {
        std::lock_guard<std::mutex> lock(sleep_);
        if (!thrown_) thrown_ = std::current_exception();
      }
      unfinished_.fetch_sub(1, std::memory_order_release);
    }
    in_section = false;
  }

  // The next share of the section, or -1. `job_` is safe to read after a claim: the section cannot
  // end before the share does.
  int claim(uint64_t section) {
    uint64_t state = state_.load(std::memory_order_acquire);
    while (section_of(state) == section && (state & kMaxShares) < (state >> 16 & kMaxShares)) {
      if (state_.compare_exchange_weak(state, state + 1)) {
        return static_cast<int>(state & kMaxShares);
      }
    }
    return -1;
  }

  // Returns a section only to the first `helpers_` workers. `helpers_` may be that of a later
  // section already; then nothing is left to claim of this one.
  uint64_t wait_for_section_after(uint64_t seen, int index) {
    for (int turn = 0; turn < kSpins + kYields; ++turn) {
      const uint64_t section = section_of(state_.load(std::memory_order_acquire));
      if (section != seen) {
        if (index < helpers_.load()) return section;
        break;
      }
      turn < kSpins ? pause() : std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(sleep_);
    for (;;) {
      // a worker that is not wanted is woken when more are wanted, not by each section
      const int sleeper = index < helpers_.load();
      sleepers_.fetch_add(sleeper);
      const uint64_t section = section_of(state_.load());
      const bool ready = section != seen && index < helpers_.load();
      if (!ready) wake_.wait(lock);
      sleepers_.fetch_sub(sleeper);
      if (ready) return section;
    }
  }

  int workers_ = 0;
  detail::Job job_ = nullptr;
  const void* context_ = nullptr;
  std::exception_ptr thrown_;  // the first one of the section
  // section number (32 bits), its shares (16), the next share to claim (16)
  std::atomic<uint64_t> state_{0};
  std::atomic<int> helpers_{0};  // how many workers may claim, beside the caller
  std::atomic<int> unfinished_{0};
  std::atomic<int> sleepers_{0};  // of the helpers
  std::mutex sleep_;
  std::condition_variable wake_;
};

// The pool, and the mutexes that fork() takes. Whoever holds one of `others` may take `turn`, so
// that comes last. Never destroyed: the workers end with the process.
struct Process {
  std::mutex registry;
  std::vector<std::mutex*> others;
  std::mutex turn;  // callers of the pool take turns
  Pool* pool = nullptr;

  Process() { pthread_atfork(before_fork, after_fork, in_child); }

  static Process& get() {
    static Process& process = *new Process;
    return process;
  }

  static void before_fork() {
    get().registry.lock();
    for (std::mutex* mutex : get().others) mutex->lock();
    get().turn.lock();
  }

  static void after_fork() {
    get().turn.unlock();
    for (std::mutex* mutex : get().others) mutex->unlock();
    get().registry.unlock();
  }

  // The child has none of the workers, and a condition variable with waiters that do not exist.
  static void in_child() {
    get().pool = nullptr;
    after_fork();
  }
};

}  // namespace

ForkMutex::ForkMutex() {
  Process& process = Process::get();
  const std::lock_guard<std::mutex> lock(process.registry);
  process.others.push_back(&mutex_);
}

ForkMutex::~ForkMutex() {
  Process& process = Process::get();
  const std::lock_guard<std::mutex> lock(process.registry);
  process.others.erase(std::find(process.others.begin(), process.others.end(), &mutex_));
}

void detail::run(int threads, int shares, Job job, const void* context) {
  if (shares > kMaxShares) throw std::logic_error("a section has more than 65,535 shares");
  if (threads == 1 || shares == 1) {
    for (int share = 0; share < shares; ++share) job(context, share);
    return;
  }
  if (in_section) throw std::logic_error("a parallel section inside another would wait for itself");
  Process& process = Process::get();
  const std::lock_guard<std::mutex> turn(process.turn);
  if (!process.pool) process.pool = new Pool;
  if (!counting) return process.pool->run(threads, shares, job, context);
  CountedSection counted{job, context, std::vector<int64_t>(shares)};
  process.pool->run(threads, shares, CountedSection::run, &counted);
  counted.add_to(counted_work, threads);
}

void worked(int64_t numbers) { gone_through += numbers; }

Counting::Counting() : before_(gone_through) {
  counted_work = {};
  counting = true;
}

Counting::~Counting() { counting = false; }

Counting::Work Counting::work() const {
  Work work = counted_work;
  work.alone = gone_through - before_;
  return work;
}
