// A pool of threads for work of microseconds to milliseconds.
#pragma once

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
