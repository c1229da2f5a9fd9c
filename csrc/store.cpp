#include "store.h"

#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <new>
#include <utility>

namespace {

constexpr int32_t kDropped = -1;
constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kSlack = 64;  // that a kernel may load behind the last row

}  // namespace

Store::Store(int64_t bytes, int64_t row_bytes, int unit, int readers)
    : row_bytes_(row_bytes), unit_bytes_(unit * row_bytes), unit_(unit), process_(getpid()) {
  const int64_t count = bytes / unit_bytes_;
  if (count < 1 || count * unit > INT32_MAX) {
    throw std::invalid_argument("a store of " + std::to_string(bytes) + " bytes holds " +
                                std::to_string(count) + " units of " + std::to_string(unit_bytes_) +
                                " bytes");
  }
  mapped_ = ((count + 1) * unit_bytes_ + kSlack + kHugePage - 1) / kHugePage * kHugePage;
  void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  madvise(memory, mapped_, MADV_HUGEPAGE);
#endif
  data_ = static_cast<uint8_t*>(memory);
  frames_.resize(count);
  waiting_.resize(count);
  for (int i = 0; i < readers; ++i) readers_.emplace_back([this] { work(); });
}

Store::~Store() {
  const bool forked = getpid() != process_;
  if (!forked) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ends_ = true;
    queued_.notify_all();
  }
  for (std::thread& reader : readers_) forked ? reader.detach() : reader.join();
  munmap(data_, mapped_);
}

int64_t Store::add(int file, int64_t offset, int64_t rows, int alignment) {
  if (offset % alignment || unit_bytes_ % alignment) {
    throw std::invalid_argument("units of " + std::to_string(unit_bytes_) + " bytes from byte " +
                                std::to_string(offset) + " on are not aligned to " +
                                std::to_string(alignment));
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  const int64_t first = static_cast<int64_t>(frame_of_.size());
  const int64_t size = (rows * row_bytes_ + alignment - 1) / alignment * alignment;
  frame_of_.resize(first + (rows + unit_ - 1) / unit_, -1);
  const int64_t end = static_cast<int64_t>(frame_of_.size());
  tensors_.push_back(std::make_unique<Tensor>(Tensor{first, end, file, offset, size}));
  return first;
}

const Store::Tensor& Store::tensor_of(int64_t unit) const {
  const auto after =
      std::upper_bound(tensors_.begin(), tensors_.end(), unit,
                       [](int64_t number, const auto& tensor) { return number < tensor->first; });
  return **(after - 1);
}

// A frame for this unit, from now on loading; -1 if all are held or loading.
int32_t Store::take_frame(int64_t unit) {
  for (size_t turn = 0; turn < 2 * frames_.size(); ++turn) {
    Frame& frame = frames_[hand_];
    const int32_t index = static_cast<int32_t>(hand_);
    hand_ = (hand_ + 1) % frames_.size();
    if (frame.holds || frame.state == State::kLoading) continue;
    if (std::exchange(frame.used, false)) continue;
    forget(index);
    frame.unit = unit;
    frame.state = State::kLoading;
    frame.used = true;
    frame_of_[unit] = index;
    return index;
  }
  return -1;
}

void Store::forget(int32_t index) {
  Frame& frame = frames_[index];
  if (frame.unit >= 0) frame_of_[frame.unit] = -1;
  frame.unit = -1;
  frame.state = State::kEmpty;
}

// Queues reads of these units, which have frames; those that are near each other are one.
void Store::start(const std::vector<int64_t>& missing) {
  const int64_t most = std::max<int64_t>(1, kReadBytes / unit_bytes_);
  const Tensor* tensor = nullptr;
  int64_t next = 0;  // unit behind the last read
  for (const int64_t unit : missing) {
    const bool near = tensor && unit < tensor->end && (unit - next) * unit_bytes_ <= kGapBytes;
    if (!near || unit >= queue_.back().unit + most) {
      if (!tensor || unit >= tensor->end) tensor = &tensor_of(unit);
      queue_.push_back({tensor, unit, {}});
      next = unit;
    }
    queue_.back().frames.resize(queue_.back().frames.size() + (unit - next), kDropped);
    queue_.back().frames.push_back(frame_of_[unit]);
    next = unit + 1;
  }
  if (!missing.empty()) queued_.notify_all();
}

void Store::ahead(const std::vector<int64_t>& units) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<int64_t> missing;
  for (const int64_t unit : units) {
    const int32_t index = frame_of_[unit];
    if (index >= 0) {
      frames_[index].used = true;
    } else if (take_frame(unit) >= 0) {
      missing.push_back(unit);
      ++counts_.misses;
      --counts_.hits;  // what the hold will find on its way
    } else {
      break;
    }
  }
  start(missing);
}

void Store::hold(const std::vector<int64_t>& units) {
  if (getpid() != process_) throw std::logic_error("a fork cannot use its parent's store");
  std::unique_lock<std::mutex> lock(mutex_);
  std::vector<int64_t> missing;
  for (const int64_t unit : units) {  // first: reading the others must not push these out
    const int32_t index = frame_of_[unit];
    if (index < 0) {
      missing.push_back(unit);
    } else {
      ++frames_[index].holds;
      frames_[index].used = true;
    }
  }
  counts_.hits += units.size() - missing.size();
  counts_.misses += missing.size();
  const auto began = std::chrono::steady_clock::now();
  std::vector<int64_t> mine;  // to read; meanwhile another thread may take one
  for (const int64_t unit : missing) {
    while (frame_of_[unit] < 0) {
      if (take_frame(unit) >= 0) {
        mine.push_back(unit);
      } else {
        start(std::exchange(mine, {}));
        freed_.wait(lock);
      }
    }
    ++frames_[frame_of_[unit]].holds;
  }
  start(mine);
  Waiting waiting;
  for (const int64_t unit : units) {
    const int32_t index = frame_of_[unit];
    if (frames_[index].state != State::kLoading) continue;
    waiting_[index].push_back(&waiting);
    ++waiting.left;
  }
  waiting.all_there.wait(lock, [&] { return waiting.left == 0; });
  counts_.waited += std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  const bool failed = std::any_of(units.begin(), units.end(), [&](int64_t unit) {
    return frames_[frame_of_[unit]].state == State::kFailed;
  });
  if (!failed) return;
  release_locked(units);
  throw ReadError(error_);
}

void Store::release(const std::vector<int64_t>& units) {
  const std::lock_guard<std::mutex> lock(mutex_);
  release_locked(units);
}

void Store::release_locked(const std::vector<int64_t>& units) {
  for (const int64_t unit : units) {
    const int32_t index = frame_of_[unit];
    if (--frames_[index].holds == 0 && frames_[index].state == State::kFailed) forget(index);
  }
  freed_.notify_all();
}

void Store::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    queued_.wait(lock, [this] { return ends_ || !queue_.empty(); });
    if (ends_) return;
    const Read read = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    const std::string error = load(read);
    lock.lock();
    finish(read, error);
  }
}

int64_t Store::size_of(const Read& read) const {
  const int64_t at = (read.unit - read.tensor->first) * unit_bytes_;
  return std::min(static_cast<int64_t>(read.frames.size()) * unit_bytes_, read.tensor->size - at);
}

// Reads the units of one request; what went wrong, or nothing.
std::string Store::load(const Read& read) const {
  const int64_t size = size_of(read);
  std::vector<iovec> parts;
  for (const int32_t frame : read.frames) {
    const auto done = static_cast<int64_t>(parts.size()) * unit_bytes_;
    const auto bytes = static_cast<size_t>(std::min(unit_bytes_, size - done));
    const int64_t place = frame == kDropped ? units() : frame;
    parts.push_back({data_ + place * unit_bytes_, bytes});
  }
  const int64_t at = read.tensor->offset + (read.unit - read.tensor->first) * unit_bytes_;
  const std::string where = std::to_string(size) + " bytes from byte " + std::to_string(at) + " on";
  for (;;) {
    const ssize_t got = preadv(read.tensor->file, parts.data(), static_cast<int>(parts.size()), at);
    if (got == size) return {};
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return "reading " + where + ": " + std::strerror(errno);
    return "of " + where + " only " + std::to_string(got) + " could be read";
  }
}

void Store::finish(const Read& read, const std::string& error) {
  ++counts_.reads;
  counts_.bytes += size_of(read);
  if (!error.empty()) error_ = error;
  for (const int32_t index : read.frames) {
    if (index == kDropped) continue;
    Frame& frame = frames_[index];
    frame.state = error.empty() ? State::kReady : State::kFailed;
    for (Waiting* waiting : waiting_[index]) {
      if (--waiting->left == 0) waiting->all_there.notify_one();
    }
    waiting_[index].clear();
    if (frame.state == State::kFailed && !frame.holds) forget(index);
  }
  freed_.notify_all();
}

Store::Counts Store::take_counts() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(counts_, {});
}

std::vector<int64_t> Stored::units(const std::vector<std::vector<int32_t>>& lists) const {
  std::vector<int64_t> units;
  for (const std::vector<int32_t>& list : lists) {
    for (const int32_t row : list) {
      const int64_t unit = first + row / store->unit();
      if (units.empty() || units.back() != unit) units.push_back(unit);
    }
  }
  if (lists.size() > 1) {
    std::sort(units.begin(), units.end());
    units.erase(std::unique(units.begin(), units.end()), units.end());
  }
  return units;
}

void Stored::ahead(const std::vector<std::vector<int32_t>>& lists, int64_t threads) const {
  if (!store) return;
  std::vector<int64_t> some = units(lists);
  some.resize(std::min<int64_t>(some.size(), store->units() / (2 * threads)));
  store->ahead(some);
}

void Stored::find(const std::vector<int32_t>& rows, std::vector<int32_t>& places) const {
  places.resize(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) places[i] = store->place(first, rows[i]);
}

Held::Held(const Stored& stored, const std::vector<std::vector<int32_t>>& lists)
    : store_(stored.store) {
  if (!store_) return;
  units_ = stored.units(lists);
  store_->hold(units_);
}

Held::~Held() {
  if (store_) store_->release(units_);
}
