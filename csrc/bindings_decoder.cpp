// Python's view of the decoder: checks what comes in, releases the GIL, calls.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <optional>
#include <thread>
#include <tuple>

#include "bandwidth.h"
#include "bindings.h"
#include "decoder.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

using Vector = Array<const float, 1>;
using Table = Array<const float, 2>;
using Tokens = Array<const int32_t, 1>;

// A layer with what it points into.
struct OwningLayer : Layer {
  std::vector<nb::object> owners;
};

struct OwningDecoder : Decoder {
  using Decoder::Decoder;
  std::vector<nb::object> owners;
  std::vector<Neurons> ffns;  // of all layers
};

const float* checked(const char* what, const Vector& vector, int64_t size) {
  check_equal(std::string("the values of ") + what, vector.shape(0), size);
  return vector.data();
}

Norm checked_norm(const char* what, const Vector& weight, const std::optional<Vector>& bias,
                  int64_t size, std::vector<nb::object>& owners) {
  owners.push_back(nb::cast(weight));
  if (bias) owners.push_back(nb::cast(*bias));
  return {checked(what, weight, size), bias ? checked(what, *bias, size) : nullptr};
}

// Of one item of a list, which must not be None. The owner keeps it, for lists may change.
template <typename T>
const T& owned(const char* what, const T* item, std::vector<nb::object>& owners) {
  if (!item) fail(std::string(what) + " is None");
  owners.push_back(nb::find(*item));
  return *item;
}

// q, k, v, o as matrices; their biases, or None.
void init_layer(OwningLayer* self, const std::vector<const OwningMatrix*>& matrices,
                const std::vector<std::optional<Vector>>& biases, Vector attention_norm,
                Vector ffn_norm, std::optional<Table> router,
                const std::vector<const OwningNeurons*>& ffns, int window,
                std::optional<Vector> attention_norm_bias, std::optional<Vector> ffn_norm_bias) {
  check_equal("the matrices of a layer", matrices.size(), 4);
  check_equal("the biases of a layer", biases.size(), 4);
  if (window < 0) fail("window is " + std::to_string(window) + ", expected at least 0");
  OwningLayer layer;
  Projection* projections[] = {&layer.q, &layer.k, &layer.v, &layer.o};
  for (size_t i = 0; i < 4; ++i) {
    projections[i]->matrix = owned("a matrix", matrices[i], layer.owners);
    projections[i]->bias = nullptr;
    if (!biases[i]) continue;
    projections[i]->bias = checked("a bias", *biases[i], projections[i]->matrix.rows);
    layer.owners.push_back(nb::cast(*biases[i]));
  }
  const int hidden = layer.q.matrix.cols;
  layer.attention_norm =
      checked_norm("attention_norm", attention_norm, attention_norm_bias, hidden, layer.owners);
  layer.ffn_norm = checked_norm("ffn_norm", ffn_norm, ffn_norm_bias, hidden, layer.owners);
  for (const OwningNeurons* ffn : ffns) {
    layer.ffns.push_back(owned("a feed-forward", ffn, layer.owners));
    check_equal("the hidden size of a feed-forward", ffn->hidden, hidden);
  }
  if (router) check_shape("router", *router, ffns.size(), hidden);
  if (!router || ffns.empty()) check_equal("the feed-forwards without a router", ffns.size(), 1);
  layer.router = router ? router->data() : nullptr;
  layer.window = window;
  if (router) layer.owners.push_back(nb::cast(*router));
  new (self) OwningLayer(std::move(layer));
}

void check_layer(const Layer& layer, const Shape& shape) {
  const int64_t queries = int64_t{shape.heads} * shape.head;
  const int64_t keys = int64_t{shape.kv_heads} * shape.head;
  check_equal("the rows of q", layer.q.matrix.rows, queries);
  check_equal("the rows of k", layer.k.matrix.rows, keys);
  check_equal("the rows of v", layer.v.matrix.rows, keys);
  check_equal("the rows of o", layer.o.matrix.rows, shape.hidden);
  check_equal("the columns of q", layer.q.matrix.cols, shape.hidden);
  check_equal("the columns of k", layer.k.matrix.cols, shape.hidden);
  check_equal("the columns of v", layer.v.matrix.cols, shape.hidden);
  check_equal("the columns of o", layer.o.matrix.cols, queries);
  const int experts = static_cast<int>(layer.ffns.size());
  if (shape.experts_used >= 1 && shape.experts_used <= experts) return;
  fail("experts_used is " + std::to_string(shape.experts_used) + ", expected 1 to " +
       std::to_string(experts));
}

void init_decoder(OwningDecoder* self, const OwningMatrix& embedding, const OwningMatrix& head,
                  Vector norm, const std::vector<const OwningLayer*>& layers, Vector frequencies,
                  float rope_scale, int heads, int kv_heads, int head_dim, int experts_used,
                  float norm_eps, std::optional<Vector> norm_bias) {
  const Shape shape{embedding.cols, heads, kv_heads, head_dim, experts_used, norm_eps};
  const int64_t turned = 2 * frequencies.shape(0);
  if (turned < 1) fail("frequencies is empty");
  if (turned > head_dim) {
    fail("head_dim is " + std::to_string(head_dim) + ", expected at least " +
         std::to_string(turned) + ", twice the frequencies");
  }
  if (kv_heads < 1 || heads < kv_heads || heads % kv_heads) {
    fail("heads is " + std::to_string(heads) + ", expected a multiple of kv_heads, which is " +
         std::to_string(kv_heads));
  }
  if (!(norm_eps >= 0)) fail("norm_eps is " + std::to_string(norm_eps) + ", expected at least 0");
  check_equal("the columns of head", head.cols, shape.hidden);
  check_equal("the rows of head", head.rows, embedding.rows);
  std::vector<nb::object> owners{nb::find(embedding), nb::find(head)};
  const Norm last = checked_norm("norm", norm, norm_bias, shape.hidden, owners);
  std::vector<Layer> views;
  std::vector<Neurons> ffns;
  for (const OwningLayer* layer : layers) {
    views.push_back(owned("a layer", layer, owners));
    check_layer(*layer, shape);
    ffns.insert(ffns.end(), layer->ffns.begin(), layer->ffns.end());
  }
  new (self) OwningDecoder(
      shape, embedding, head, last, std::move(views),
      std::vector<float>(frequencies.data(), frequencies.data() + frequencies.shape(0)),
      rope_scale);
  self->ffns = std::move(ffns);
  self->owners = std::move(owners);
}

std::unique_ptr<Cache> new_cache(const OwningDecoder& self, int context) {
  if (context < 1) fail("context is " + std::to_string(context) + ", expected at least 1");
  return self.new_cache(context);
}

// The arguments are read and kept here: another thread may change the lists and the arrays.
void step(OwningDecoder& self, const std::vector<nb::object>& caches,
          const std::vector<Tokens>& tokens, bool every, const char* mode_name, int threads,
          Array<float, 2> logits, Array<int32_t, 3> counts, const Cancel* cancel) {
  check_threads(threads);
  const auto mode = parse<Mode>("mode", mode_name, kModes);
  for (const Neurons& ffn : self.ffns) check_mode(mode, ffn);
  check_equal("the token lists", tokens.size(), caches.size());
  std::vector<std::vector<int32_t>> kept;
  std::vector<Sequence> sequences;
  size_t total = 0;
  for (size_t i = 0; i < caches.size(); ++i) {
    if (!nb::isinstance<Cache>(caches[i])) fail("caches[" + std::to_string(i) + "] is not a Cache");
    const int32_t* data = tokens[i].data();
    kept.emplace_back(data, data + tokens[i].shape(0));
    const int count = static_cast<int>(kept.back().size());
    sequences.push_back({nb::cast<Cache*>(caches[i]), kept.back().data(), count});
    total += count;
  }
  check_shape("logits", logits, every ? total : caches.size(), self.vocabulary());
  check_shape("counts", counts, self.layers(), total, 3);
  nb::gil_scoped_release release;
  self.step(sequences, every, mode, threads, logits.data(), counts.data(), cancel);
}

}  // namespace

void bind_decoder(nb::module_& m) {
  m.def(
      "read_all",
      [](Array<const uint64_t, 1> words, int threads, int cache) {
        check_threads(threads);
        nb::gil_scoped_release release;
        return read_all(words.data(), words.shape(0), threads, cache);
      },
      "words"_a.noconvert(), "threads"_a, "cache"_a,
      "Read an array once, fetched ahead into the first or second cache; its sum.");
  m.def(
      "run_sections",
      [](int count, int threads) {
        check_threads(threads);
        nb::gil_scoped_release release;
        for (int i = 0; i < count; ++i) {
          std::atomic<int> here{0};
          parallel(threads, [&](int) {
            for (++here; here < threads;) std::this_thread::yield();
          });
        }
      },
      "count"_a, "threads"_a, "Parallel sections without work, in each of which all threads meet.");
  m.def(
      "count_work",
      [](const nb::callable& call) {
        const Counting counting;
        call();
        const Counting::Work work = counting.work();
        return std::tuple(work.sections, work.alone, work.longest);
      },
      "call"_a,
      "Sections in which threads meet in a call, the numbers and weights that its own thread goes "
      "through outside of them, and those of the thread that has most in them.");
  nb::exception<Cancelled>(m, "Cancelled", PyExc_RuntimeError);
  nb::class_<Cancel>(m, "Cancel", "Ends a step from another thread.")
      .def(nb::init<>())
      .def("set", [](Cancel& self) { self = true; })
      .def("is_set", [](const Cancel& self) { return self.load(); });
  m.def("cache_bytes", nb::overload_cast<int64_t, int, int, int>(&Cache::bytes), "positions"_a,
        "layers"_a, "kv_heads"_a, "head"_a, "Memory of a cache that holds so many positions.");
  nb::class_<Cache>(m, "Cache", "Keys and values of one sequence, in half precision.")
      .def_prop_ro("length", &Cache::length)
      .def_prop_ro("context", &Cache::context)
      .def_prop_ro("nbytes", nb::overload_cast<>(&Cache::bytes, nb::const_))
      .def("copy", &Cache::copy, nb::call_guard<nb::gil_scoped_release>(), "length"_a,
           "Its first `length` positions.")
      .def("truncate", &Cache::truncate, nb::call_guard<nb::gil_scoped_release>(), "length"_a,
           "Forget all positions from `length` on and give their memory back.")
      .def("free", [](Cache& self) { self.truncate(0); }, nb::call_guard<nb::gil_scoped_release>());
  nb::class_<OwningLayer>(m, "Layer", "The weights of one layer.")
      .def("__init__", &init_layer, "matrices"_a.noconvert(), "biases"_a.noconvert(),
           "attention_norm"_a.noconvert(), "ffn_norm"_a.noconvert(), "router"_a.noconvert().none(),
           "ffns"_a.noconvert(), "window"_a,
           "attention_norm_bias"_a.noconvert().none() = nb::none(),
           "ffn_norm_bias"_a.noconvert().none() = nb::none());
  nb::class_<OwningDecoder>(m, "Decoder", "A whole decoding step.")
      .def("__init__", &init_decoder, "embedding"_a, "head"_a, "norm"_a.noconvert(), "layers"_a,
           "frequencies"_a.noconvert(), "rope_scale"_a, "heads"_a, "kv_heads"_a, "head_dim"_a,
           "experts_used"_a, "norm_eps"_a, "norm_bias"_a.noconvert().none() = nb::none())
      .def("new_cache", &new_cache, "context"_a)
      .def(
          "step", &step, "caches"_a, "tokens"_a.noconvert(), "every"_a, "mode"_a, "threads"_a,
          "logits"_a.noconvert(), "counts"_a.noconvert(), "cancel"_a.none() = nb::none(),
          "Append tokens to their caches; fill logits [sequences or tokens, vocabulary] and counts "
          "[layers, tokens, 3].");
}
