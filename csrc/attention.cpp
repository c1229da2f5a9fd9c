// The attention of a step: see decoder.h.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "buffer.h"
#include "decoder.h"

namespace {

// Positions of a key-value head that one thread attends to at least, of two pages.
constexpr int kSpan = 128;

int span_of(int position) { return position / kSpan; }

// Tokens times key-value heads for each thread from which their positions need not be shared.
constexpr int kItemsPerThread = 4;

}  // namespace

// What the query heads of a group, which share a key-value head, take from some positions: the
// values weighted by exp(score - top), and the sum of these weights.
struct Decoder::Taken {
  std::vector<float> top, sum;  // [group]
  std::vector<float> values;    // [group, D]

  // Adds what they take from later positions.
  void add(const Taken& later) {
    const size_t group = top.size(), size = values.size() / group;
    for (size_t h = 0; h < group; ++h) {
      const float both = std::max(top[h], later.top[h]);
      const float a = std::exp(top[h] - both), b = std::exp(later.top[h] - both);
      sum[h] = a * sum[h] + b * later.sum[h];
      for (size_t i = h * size; i < (h + 1) * size; ++i) {
        values[i] = a * values[i] + b * later.values[i];
      }
      top[h] = both;
    }
  }
};

// mixed = attention of q_ to the caches, which get k_ and v_ first. Threads share tokens and
// key-value heads; if these are few, spans of positions too. The spans and their order are always
// the same, and so are the bits.
void Decoder::mix_values(int layer) {
  mixed_.resize(q_.size());
  const int group = shape_.heads / shape_.kv_heads, items = tokens_ * shape_.kv_heads;
  std::vector<int> ends;  // of each item, in the list of all spans
  for (int item = 0; item < items; ++item) {
    const int spans = span_of(positions_[item / shape_.kv_heads].place) -
                      span_of(first_seen(layer, item / shape_.kv_heads)) + 1;
    ends.push_back(spans + (item ? ends.back() : 0));
  }
  // the keys and values of a token that is alone of its sequence are met by it only
  if (!apart_) {
    parallel_for(threads_, items, [&](int64_t item) {
      append_kv(layer, item / shape_.kv_heads, static_cast<int>(item % shape_.kv_heads));
    });
  }
  const auto begin_of = [&](int item) { return item ? ends[item - 1] : 0; };
  const auto take = [&](int item, int span) {
    return take_span(layer, item / shape_.kv_heads, item % shape_.kv_heads, span - begin_of(item));
  };
  const auto finish = [&](int item, const Taken& taken) {
    float* out = &mixed_[int64_t{item} * group * shape_.head];
    for (int i = 0; i < group * shape_.head; ++i)
      out[i] = taken.values[i] / taken.sum[i / shape_.head];
    worked(group * shape_.head);
  };
  if (items >= kItemsPerThread * threads_) {
    parallel_for(threads_, items, [&](int64_t item) {
      Taken all = take(item, begin_of(item));
      for (int span = begin_of(item) + 1; span < ends[item]; ++span) all.add(take(item, span));
      finish(item, all);
    });
    return;
  }
  std::vector<Taken> taken(ends.back());
  std::vector<std::atomic<int>> ready(items);  // spans
  parallel_for(threads_, ends.back(), [&](int64_t number) {
    const int item = std::upper_bound(ends.begin(), ends.end(), number) - ends.begin();
    taken[number] = take(item, number);
    if (++ready[item] < ends[item] - begin_of(item)) return;
    Taken& all = taken[begin_of(item)];
    for (int span = begin_of(item) + 1; span < ends[item]; ++span) all.add(taken[span]);
    finish(item, all);
  });
}

int Decoder::first_seen(int layer, int token) const {
  const int window = layers_[layer].window;
  return window ? std::max(0, positions_[token].place - window + 1) : 0;
}

// Of the spans of positions that a token sees, number `span`.
Decoder::Taken Decoder::take_span(int layer, int token, int kv_head, int span) {
  const Position& position = positions_[token];
  const int size = shape_.head, group = shape_.heads / shape_.kv_heads;
  const int first = first_seen(layer, token);
  const int from = span ? (span_of(first) + span) * kSpan : first;
  const int end = std::min(position.place + 1, (span_of(first) + span + 1) * kSpan);
  const int seen = end - from;
  const int64_t at = (int64_t{token} * shape_.heads + int64_t{kv_head} * group) * size;
  const float scale = 1 / std::sqrt(static_cast<float>(size));
  if (apart_ && end == position.place + 1) append_kv(layer, token, kv_head);

  const Kernels& kernels = kernels_of(QUANT_F16);
  std::vector<float> turned(&q_[at], &q_[at] + group * size);
  rotate(turned.data(), group, token);
  const Prepared queries(kernels, turned.data(), group, size);
  worked(int64_t{2} * group * seen * size);
  std::vector<float> scores(int64_t{group} * seen);
  // keys and values lie together as long as they are of one page
  const auto each_run = [&](int part, auto&& work) {
    for (int place = from; place < end;) {
      const int next = std::min(end, Cache::page_end(place));
      work(rows_at(position.cache->at(layer, part, kv_head, place), row_stride(QUANT_F16, size),
                   nullptr, next - place),
           place - from);
      place = next;
    }
  };
  each_run(0, [&](const Rows& keys, int64_t place) {
    kernels.dots(&keys, queries[0], group, size, &scores[place], seen);
  });
  Taken taken{std::vector<float>(group), std::vector<float>(group),
              std::vector<float>(int64_t{group} * size)};
  for (int h = 0; h < group; ++h) {
    float* of_head = &scores[int64_t{h} * seen];
    for (int i = 0; i < seen; ++i) of_head[i] *= scale;
    taken.top[h] = *std::max_element(of_head, of_head + seen);
    for (int i = 0; i < seen; ++i) {
      taken.sum[h] += of_head[i] = std::exp(of_head[i] - taken.top[h]);
    }
  }
  const int64_t floats = kernels.sum_floats(size);
  const Buffer sums(group * floats, true);
  each_run(1, [&](const Rows& values, int64_t place) {
    kernels.axpys(&values, &scores[place], seen, group, size, sums);
  });
  for (int h = 0; h < group; ++h) {
    kernels.add_sum(sums + h * floats, size, &taken.values[int64_t{h} * size]);
  }
  return taken;
}
