// A pool of threads for work of microseconds to milliseconds.
#pragma once

#include <algorithm>
#include <cstdint>

namespace detail {
using Job = void (*)(void* context, int thread);
void run(int threads, Job job, void* context);
}  // namespace detail

// Calls work(0) ... work(threads - 1), on up to that many threads at once, and returns when all are
// done; then throws what a call threw first. Callers take turns: one section runs at a time in a
// process.
template <typename Work>
void parallel(int threads, Work&& work) {
  detail::run(
      threads, [](void* context, int thread) { (*static_cast<Work*>(context))(thread); }, &work);
}

// Calls work(i) for each i < count, on up to `threads` threads, each its run of them.
template <typename Work>
void parallel_for(int64_t threads, int64_t count, Work&& work) {
  const int some = static_cast<int>(std::max<int64_t>(1, std::min(threads, count)));
  parallel(some, [&](int thread) {
    for (int64_t i = count * thread / some; i < count * (thread + 1) / some; ++i) work(i);
  });
}
