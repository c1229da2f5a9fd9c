// A pool of threads for work of microseconds to milliseconds.
#pragma once

#include <algorithm>
#include <cstdint>
#include <mutex>

// A mutex that fork() waits for: in the child it is free, and what it guards is whole.
class ForkMutex {
 public:
  ForkMutex();
  ~ForkMutex();
  ForkMutex(const ForkMutex&) = delete;
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  std::mutex mutex_;
};

namespace detail {
using Job = void (*)(const void* context, int share);
void run(int threads, int shares, Job job, const void* context);
}  // namespace detail

// Says that the calling thread goes through so many numbers or weights, for `Counting`.
void worked(int64_t numbers);

// What is gone through while it lives, as its own thread and the sections that it calls say. One at
// a time in a process.
class Counting {
 public:
  struct Work {
    int64_t sections = 0;  // in which threads meet
    int64_t alone = 0;     // outside of them
    int64_t longest = 0;   // in them, by the thread that has most, if the first that is free takes
                           // the next share and all are equally fast
  };
  Counting();
  ~Counting();
  Work work() const;

 private:
  int64_t before_;
};

// Calls work(0) ... work(shares - 1) on at most `threads` threads, which claim one share after the
// other, and returns when all are done; then throws what a call threw first. Callers take turns:
// one section runs at a time in a process. Throws std::logic_error for more than 65,535 shares, and
// inside the work of another section unless `threads` is 1.
template <typename Work>
void parallel(int threads, int shares, const Work& work) {
  const auto job = [](const void* context, int share) {
    (*static_cast<const Work*>(context))(share);
  };
  detail::run(threads, shares, job, &work);
}

template <typename Work>
void parallel(int threads, const Work& work) {
  parallel(threads, threads, work);
}

// Calls work(i) for each i < count, on up to `threads` threads, each its run of them.
template <typename Work>
void parallel_for(int64_t threads, int64_t count, const Work& work) {
  const int some = static_cast<int>(std::max<int64_t>(1, std::min(threads, count)));
  parallel(some, [&](int thread) {
    for (int64_t i = count * thread / some; i < count * (thread + 1) / some; ++i) work(i);
  });
}
