// Python's view of the decoder: checks what comes in, releases the GIL, calls.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <mutex>
#include <optional>

#include "bandwidth.h"
#include "bindings.h"
#include "decoder.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

using Vector = Array<const float, 1>;
using Table = Array<const float, 2>;
using Tokens = Array<const int32_t, 1>;

// A layer with the arrays that it points into.
struct OwningLayer : Layer {
  std::vector<nb::object> owners;
};

struct OwningDecoder : Decoder {
  using Decoder::Decoder;
  std::vector<nb::object> owners;
  std::vector<Neurons> ffns;  // of all layers
  std::mutex turn;            // one step at a time: the scratch memory is the decoder's own
};

const float* checked(const char* what, const Vector& vector, int64_t size) {
  if (static_cast<int64_t>(vector.shape(0)) != size) {
    fail(std::string(what) + " has " + std::to_string(vector.shape(0)) + " values, expected " +
         std::to_string(size));
  }
  return vector.data();
}

// q, k, v, o as matrices; their biases, or None.
void init_layer(OwningLayer* self, nb::list matrices, nb::list biases, Vector attention_norm,
                Vector ffn_norm, std::optional<Table> router, nb::list ffns, int window) {
  if (nb::len(matrices) != 4 || nb::len(biases) != 4) fail("a layer has 4 matrices and 4 biases");
  new (self) OwningLayer;
  Projection* projections[] = {&self->q, &self->k, &self->v, &self->o};
  for (size_t i = 0; i < 4; ++i) {
    projections[i]->matrix = nb::cast<const OwningMatrix&>(matrices[i]);
    projections[i]->bias = nullptr;
    if (!biases[i].is_none()) {
      const auto bias = nb::cast<Vector>(biases[i]);
      projections[i]->bias = checked("bias", bias, projections[i]->matrix.rows);
    }
  }
  const int64_t hidden = self->q.matrix.cols;
  self->attention_norm = checked("attention_norm", attention_norm, hidden);
  self->ffn_norm = checked("ffn_norm", ffn_norm, hidden);
  self->router = router ? router->data() : nullptr;
  self->window = window;
  for (nb::handle ffn : ffns) self->ffns.push_back(nb::cast<const OwningNeurons&>(ffn));
  if (self->ffns.size() != (router ? router->shape(0) : 1)) fail("the router fits no experts");
  self->owners = {matrices, biases, nb::cast(attention_norm), nb::cast(ffn_norm), ffns};
  if (router) self->owners.push_back(nb::cast(*router));
}

void init_decoder(OwningDecoder* self, const OwningMatrix& embedding, const OwningMatrix& head,
                  Vector norm, nb::list layers, Vector frequencies, float rope_scale, int heads,
                  int kv_heads, int experts_used, float norm_eps) {
  const int size = 2 * static_cast<int>(frequencies.shape(0));
  const Shape shape{embedding.cols, heads, kv_heads, size, experts_used, norm_eps};
  if (kv_heads < 1 || heads % kv_heads) fail("heads must be a multiple of kv_heads");
  checked("norm", norm, shape.hidden);
  std::vector<Layer> views;
  std::vector<Neurons> ffns;
  for (nb::handle handle : layers) {
    const auto& layer = nb::cast<const OwningLayer&>(handle);
    if (layer.q.matrix.rows != heads * size || layer.k.matrix.rows != kv_heads * size ||
        layer.v.matrix.rows != kv_heads * size || layer.o.matrix.cols != heads * size ||
        layer.o.matrix.rows != shape.hidden || layer.q.matrix.cols != shape.hidden) {
      fail("the projections of a layer do not fit its heads");
    }
    if (experts_used < 1 || experts_used > static_cast<int>(layer.ffns.size())) {
      fail("experts_used is " + std::to_string(experts_used) + ", expected 1 to " +
           std::to_string(layer.ffns.size()));
    }
    views.push_back(layer);
    ffns.insert(ffns.end(), layer.ffns.begin(), layer.ffns.end());
  }
  new (self) OwningDecoder(
      shape, embedding, head, norm.data(), std::move(views),
      std::vector<float>(frequencies.data(), frequencies.data() + frequencies.shape(0)),
      rope_scale);
  self->ffns = std::move(ffns);
  self->owners = {nb::find(embedding), nb::find(head), nb::cast(norm), layers};
}

void step(OwningDecoder& self, std::vector<Cache*> caches, std::vector<Tokens> tokens, bool every,
          const char* mode_name, int threads, Array<float, 2> logits, Array<int32_t, 3> counts) {
  check_threads(threads);
  const auto mode = parse<Mode>("mode", mode_name, kModes);
  for (const Neurons& ffn : self.ffns) check_mode(mode, ffn);
  if (caches.size() != tokens.size()) fail("as many caches as token lists are needed");
  std::vector<Sequence> sequences;
  size_t total = 0;
  for (size_t i = 0; i < caches.size(); ++i) {
    const int count = static_cast<int>(tokens[i].shape(0));
    if (count < 1) fail("a sequence has no token");
    for (int t = 0; t < count; ++t) {
      const int32_t token = tokens[i].data()[t];
      if (token < 0 || token >= self.vocabulary()) {
        fail("token " + std::to_string(token) + " is outside the vocabulary of " +
             std::to_string(self.vocabulary()));
      }
    }
    sequences.push_back({caches[i], tokens[i].data(), count});
    total += count;
  }
  const size_t rows = every ? total : caches.size();
  if (logits.shape(0) != rows || logits.shape(1) != static_cast<size_t>(self.vocabulary())) {
    fail("logits must be [" + std::to_string(rows) + ", " + std::to_string(self.vocabulary()) +
         "]");
  }
  if (counts.shape(0) != static_cast<size_t>(self.layers()) || counts.shape(1) != total ||
      counts.shape(2) != 3) {
    fail("counts must be [layers, tokens, 2]");
  }
  nb::gil_scoped_release release;
  std::lock_guard<std::mutex> lock(self.turn);
  self.step(sequences, every, mode, threads, logits.data(), counts.data());
}

}  // namespace

void bind_decoder(nb::module_& m) {
  m.def(
      "read_all",
      [](Array<const uint64_t, 1> words, int threads) {
        check_threads(threads);
        nb::gil_scoped_release release;
        return read_all(words.data(), words.shape(0), threads);
      },
      "words"_a.noconvert(), "threads"_a, "Read an array once, as fast as it goes; its sum.");
  nb::class_<Cache>(m, "Cache", "Keys and values of one sequence, in half precision.")
      .def_prop_ro("length", &Cache::length);
  nb::class_<OwningLayer>(m, "Layer", "The weights of one layer.")
      .def("__init__", &init_layer, "matrices"_a, "biases"_a, "attention_norm"_a.noconvert(),
           "ffn_norm"_a.noconvert(), "router"_a.noconvert().none(), "ffns"_a, "window"_a);
  nb::class_<OwningDecoder>(m, "Decoder", "A whole decoding step.")
      .def("__init__", &init_decoder, "embedding"_a, "head"_a, "norm"_a.noconvert(), "layers"_a,
           "frequencies"_a.noconvert(), "rope_scale"_a, "heads"_a, "kv_heads"_a, "experts_used"_a,
           "norm_eps"_a)
      .def("new_cache",
           [](const OwningDecoder& self) { return Cache(self.shape(), self.layers()); })
      .def(
          "step", &step, "caches"_a, "tokens"_a.noconvert(), "every"_a, "mode"_a, "threads"_a,
          "logits"_a.noconvert(), "counts"_a.noconvert(),
          "Append tokens to their caches; fill logits [sequences or tokens, vocabulary] and counts "
          "[layers, tokens, 3].");
}
