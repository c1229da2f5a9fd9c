// Rows of feed-forwards that stay on disk: a cache of bounded size, and threads that fill it.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

// A file that gave an error or ended early.
struct ReadError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Keeps units of `unit` neighbouring rows of one size, of several tensors. The rows of a unit have
// places, by which kernels find them: place p lies p * row_bytes behind `data()`. What was used
// least recently gives way: a clock that passes over units used since it last came by.
class Store {
 public:
  // Neighbours that are missing are read together, up to so many bytes: beyond it reads only grow
  // longer, not faster. What lies between them is read as well and dropped, if it is not more than
  // this: a disk takes about as long for one more read.
  static constexpr int64_t kReadBytes = 128 << 10;
  static constexpr int64_t kGapBytes = 16 << 10;

  // What happened since the store was made, or last asked.
  struct Counts {
    int64_t hits, misses;  // units that a hold found there or on their way, and others
    int64_t reads, bytes;  // from the files
    double waited;         // seconds that threads waited for rows, summed
  };

  // Throws std::bad_alloc, and std::invalid_argument where `bytes` does not hold a unit.
  Store(int64_t bytes, int64_t row_bytes, int unit, int readers);
  Store(const Store&) = delete;
  ~Store();

  // Adds a tensor that begins at a byte of a file, which must stay open; returns its first unit.
  // Where the file is read past the page cache, units must be a multiple of its alignment, and the
  // bytes behind a last short unit, up to such a multiple, must be there.
  int64_t add(int file, int64_t offset, int64_t rows, int alignment);

  int64_t row_bytes() const { return row_bytes_; }
  int unit() const { return unit_; }
  int64_t units() const { return static_cast<int64_t>(frames_.size()); }  // that it holds
  const uint8_t* data() const { return data_; }

  // The place of a row that is held; `first` is the first unit of its tensor.
  int32_t place(int64_t first, int32_t row) const {
    return frame_of_[first + row / unit_] * unit_ + row % unit_;
  }

  // Begins to read what is not there of these units, ascending, as far as there is room.
  void ahead(const std::vector<int64_t>& units);
  // Returns when all of these units are there; they stay until the release. At most units() may be
  // held at a time, by all threads together. Throws ReadError, and then holds none.
  void hold(const std::vector<int64_t>& units);
  void release(const std::vector<int64_t>& units);

  Counts take_counts();

 private:
  enum class State : uint8_t { kEmpty, kLoading, kReady, kFailed };
  struct Waiting {
    int64_t left = 0;  // of its units
    std::condition_variable all_there;
  };
  struct Frame {
    int64_t unit = -1;
    int32_t holds = 0;
    State state = State::kEmpty;
    bool used = false;
  };
  struct Tensor {
    int64_t first, end;  // units
    int file;
    int64_t offset, size;  // bytes; the size is what may be read
  };
  struct Read {
    const Tensor* tensor;
    int64_t unit;
    std::vector<int32_t> frames;  // of this unit and the next ones, or dropped
  };

  const Tensor& tensor_of(int64_t unit) const;
  int32_t take_frame(int64_t unit);
  void start(const std::vector<int64_t>& missing);
  void forget(int32_t frame);
  void release_locked(const std::vector<int64_t>& units);
  void work();
  int64_t size_of(const Read& read) const;
  std::string load(const Read& read) const;
  void finish(const Read& read, const std::string& error);

  const int64_t row_bytes_, unit_bytes_;
  const int unit_;
  uint8_t* data_ = nullptr;
  int64_t mapped_ = 0;
  const int process_;  // a fork has none of the readers

  std::mutex mutex_;  // of all below
  std::vector<std::unique_ptr<Tensor>> tensors_;
  std::vector<int32_t> frame_of_;  // of each unit of all tensors, or -1
  std::vector<Frame> frames_;
  size_t hand_ = 0;
  std::vector<std::vector<Waiting*>> waiting_;  // for each frame
  std::deque<Read> queue_;
  std::condition_variable queued_, freed_;
  std::string error_;  // the last one
  bool ends_ = false;
  Counts counts_{};
  std::vector<std::thread> readers_;
};

// Where rows lie: in memory, or in a store from this unit on.
struct Stored {
  Store* store = nullptr;
  int64_t first = 0;

  // The units of the rows of some ascending lists, ascending.
  std::vector<int64_t> units(const std::vector<std::vector<int32_t>>& lists) const;
  // Begins to read them, as far as they fit beside those of the other threads.
  void ahead(const std::vector<std::vector<int32_t>>& lists, int64_t threads) const;
  // places[i] = that of row rows[i], which is held
  void find(const std::vector<int32_t>& rows, std::vector<int32_t>& places) const;
};

// Holds the rows of some lists while it lives; does nothing where they are in memory.
class Held {
 public:
  Held(const Stored& stored, const std::vector<std::vector<int32_t>>& lists);
  Held(const Held&) = delete;
  ~Held();

 private:
  Store* store_;
  std::vector<int64_t> units_;
};
