// Python's view of the core: checks what comes in, releases the GIL, calls.
#include "bindings.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <tuple>

#include "predictor.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

using Input = Array<const float, 2>;
using Output = Array<float, 2>;
using Counts = Array<int32_t, 2>;
using Elsewhere = Array<const uint8_t, 1>;
using Uses = Array<int32_t, 1>;
using Indices = Array<const int32_t, 1>;
using How = std::tuple<std::string, int, int>;

constexpr int kMaxThreads = 1024;
constexpr int kMaxAhead = 1 << 20;

void check_cols(const char* what, int cols, Quant quant) {
  const std::string given = std::string(what) + " is " + std::to_string(cols) + ", expected ";
  if (cols < 1) fail(given + "at least 1");
  if (quant != QUANT_F16 && cols % GROUP != 0) {
    fail(given + "a multiple of " + std::to_string(GROUP) + " for " + kQuants[quant]);
  }
}

Fetching fetching(const How& how) {
  const auto& [name, cache, bytes] = how;
  const auto order = parse<FetchOrder>("order", name, kFetchOrders);
  if (cache != 1 && cache != 2) fail("cache is " + std::to_string(cache) + ", expected 1 or 2");
  if (bytes < 0 || bytes > kMaxAhead) {
    fail("bytes is " + std::to_string(bytes) + ", expected 0 to " + std::to_string(kMaxAhead));
  }
  return {order, static_cast<int16_t>(cache), bytes};
}

void init_matrix(OwningMatrix* self, Bytes data, int cols, const char* quant_name) {
  const Quant quant = parse<Quant>("quant", quant_name, kQuants);
  check_cols("cols", cols, quant);
  check_shape("data", data, data.shape(0), row_stride(quant, cols));
  const int64_t rows = data.shape(0);
  new (self) OwningMatrix{{data.data(), rows, cols, quant}, data};
}

void check_index(const Matrix& matrix, int64_t index) {
  if (index >= 0 && index < matrix.rows) return;
  fail("index is " + std::to_string(index) + ", expected 0 to " + std::to_string(matrix.rows - 1));
}

void matmul(const OwningMatrix& self, Input x, Output out, int threads,
            std::optional<Indices> rows) {
  const int32_t* indices = rows ? rows->data() : nullptr;
  const int64_t count = rows ? rows->shape(0) : self.rows;
  for (int64_t i = 0; indices && i < count; ++i) check_index(self, indices[i]);
  check_shape("x", x, x.shape(0), self.cols);
  check_shape("out", out, x.shape(0), count);
  check_threads(threads);
  nb::gil_scoped_release release;
  multiply({{&self, out.data(), indices, count}}, x.data(), x.shape(0), threads);
}

void row(const OwningMatrix& self, int64_t index, Array<float, 1> out) {
  check_index(self, index);
  if (out.shape(0) != static_cast<size_t>(self.cols)) {
    fail("out has " + std::to_string(out.shape(0)) + " values, expected " +
         std::to_string(self.cols));
  }
  nb::gil_scoped_release release;
  self.row(index, out.data());
}

// What kernels see of rows: where they or the places of their store begin, and how many there are.
struct View {
  const uint8_t* data;
  int64_t rows, row_bytes;
  Stored stored;
};

View view_of(const AnyRows& any) {
  if (const OwningRows* rows = std::get_if<OwningRows>(&any)) {
    return {rows->store->data(), rows->rows, rows->store->row_bytes(), *rows};
  }
  const Bytes& bytes = std::get<Bytes>(any);
  const auto rows = static_cast<int64_t>(bytes.shape(0));
  return {bytes.data(), rows, static_cast<int64_t>(bytes.shape(1)), {}};
}

void check_rows(const char* what, const View& view, int64_t rows, int64_t row_bytes) {
  if (view.rows == rows && view.row_bytes == row_bytes) return;
  fail(std::string(what) + " has shape (" + std::to_string(view.rows) + ", " +
       std::to_string(view.row_bytes) + "), expected (" + std::to_string(rows) + ", " +
       std::to_string(row_bytes) + ")");
}

void init_neurons(OwningNeurons* self, const AnyRows& any_gates,
                  const std::optional<AnyRows>& any_pairs, int hidden,
                  const std::vector<std::string>& quants, const char* activation_name,
                  const Predictor* predictor, float threshold) {
  const auto activation = parse<Activation>("activation", activation_name, kActivations);
  std::vector<Quant> parsed;
  for (const std::string& name : quants) {
    parsed.push_back(parse<Quant>("quant", name, kQuants));
    check_cols("hidden", hidden, parsed.back());
  }
  if (!(threshold >= 0)) {
    fail("threshold is " + std::to_string(threshold) + ", expected at least 0");
  }
  const View gates = view_of(any_gates), pairs = view_of(any_pairs.value_or(any_gates));
  const int64_t neurons = gates.rows;
  Neurons ffn{gates.data, pairs.data, neurons,   hidden,       {},
              activation, threshold,  predictor, gates.stored, pairs.stored};
  if (parsed.size() != (ffn.gated() ? 3 : 2)) {
    fail("quants must be those of " + std::string(ffn.gated() ? "gate, up" : "up") + " and down");
  }
  ffn.quants[Neurons::kGate] = parsed.front();
  ffn.quants[Neurons::kUp] = *(parsed.end() - 2);
  ffn.quants[Neurons::kDown] = parsed.back();
  const int64_t gate = row_stride(parsed.front(), hidden);
  const int64_t pair = ffn.up_stride() + row_stride(parsed.back(), hidden);
  if (any_pairs) {
    check_rows("gates", gates, neurons, gate);
    check_rows("pairs", pairs, neurons, pair);
  } else {
    check_rows("bundles", gates, neurons, std::max(gates.row_bytes, gate + pair));
    ffn.bundle = gates.row_bytes;
    ffn.pairs = gates.data + gate;
  }
  if (predictor && (predictor->neurons != neurons || predictor->hidden != hidden)) {
    fail("the predictor is of " + std::to_string(predictor->neurons) + " neurons and hidden " +
         std::to_string(predictor->hidden) + ", expected " + std::to_string(neurons) + " and " +
         std::to_string(hidden));
  }
  new (self) OwningNeurons{ffn, any_gates, any_pairs, nb::find(predictor)};
}

void forward(const OwningNeurons& self, Input x, Input residual, Output out, Counts counts,
             const char* mode_name, int threads, const std::optional<Elsewhere>& elsewhere,
             const std::optional<Uses>& uses) {
  check_shape("x", x, x.shape(0), self.hidden);
  check_shape("residual", residual, x.shape(0), self.hidden);
  check_shape("out", out, x.shape(0), self.hidden);
  check_shape("counts", counts, x.shape(0), 3);
  check_threads(threads);
  const auto mode = parse<Mode>("mode", mode_name, kModes);
  check_mode(mode, self);
  std::optional<Spans> spans;
  if (elsewhere || uses) {
    if (!elsewhere || !uses) fail("elsewhere and uses belong together");
    const int64_t count = (self.neurons + Spans::kNeurons - 1) / Spans::kNeurons;
    check_shape("elsewhere", *elsewhere, count);
    check_shape("uses", *uses, count);
    spans = Spans{elsewhere->data(), uses->data()};
  }
  nb::gil_scoped_release release;
  self.forward(x.data(), residual.data(), out.data(), counts.data(), x.shape(0), mode, threads,
               nullptr, spans ? &*spans : nullptr);
}

}  // namespace

void check_threads(int threads) {
  if (threads >= 1 && threads <= kMaxThreads) return;
  fail("threads is " + std::to_string(threads) + ", expected 1 to " + std::to_string(kMaxThreads));
}

void check_mode(Mode mode, const Neurons& neurons) {
  const Activation activation = neurons.activation;
  if (mode != Mode::kDense &&
      (activation == Activation::kGeglu || activation == Activation::kSwiglu)) {
    fail("activation is '" + std::string(kActivations[static_cast<int>(activation)]) +
         "', which has no exact zeros to skip: use dense mode");
  }
  if (mode == Mode::kPredicted && !neurons.predictor) fail("predicted mode needs a predictor");
}

// .noconvert() everywhere: without it nanobind fills a copy of an unfit `out`, and the result is
// lost without an error.
NB_MODULE(_core, m) {
  m.def("isa", &isa, "The instruction set in use: the best, or what TURBOSPARSE_ISA names.");
  m.def("available_isas", &available_isas, "The instruction sets of this machine, best first.");
  m.def("set_isa", &set_isa, "name"_a);
  m.def(
      "set_fetching",
      [](const How& together, const How& scattered) {
        set_fetching(fetching(together), fetching(scattered));
      },
      "together"_a, "scattered"_a,
      "How rows are fetched ahead, if they follow each other and if not: order, cache, bytes.");
  nb::class_<OwningMatrix>(m, "Matrix", "Weights [rows, cols], quantised row by row.")
      .def("__init__", &init_matrix, "data"_a.noconvert(), "cols"_a, "quant"_a)
      .def_ro("rows", &OwningMatrix::rows)
      .def_ro("cols", &OwningMatrix::cols)
      .def_prop_ro("quant", [](const OwningMatrix& self) { return kQuants[self.quant]; })
      .def("matmul", &matmul, "x"_a.noconvert(), "out"_a.noconvert(), "threads"_a,
           "rows"_a.noconvert().none() = nb::none(),
           "out[T, rows] = x[T, cols] · Wᵀ, of all rows or of some by number")
      .def("row", &row, "index"_a, "out"_a.noconvert(), "out[cols] = W[index]");

  bind_store(m);
  bind_predictors(m);
  nb::class_<OwningNeurons>(m, "Neurons",
                            "An FFN: gate rows, and for each neuron its up row and down column; "
                            "or, without pairs, bundles of all three.")
      .def("__init__", &init_neurons, "gates"_a.noconvert(), "pairs"_a.noconvert().none(),
           "hidden"_a, "quants"_a, "activation"_a, "predictor"_a.none() = nb::none(),
           "threshold"_a = 0.0f)
      .def("forward", &forward, "x"_a.noconvert(), "residual"_a.noconvert(), "out"_a.noconvert(),
           "counts"_a.noconvert(), "mode"_a, "threads"_a,
           "elsewhere"_a.noconvert().none() = nb::none(), "uses"_a.noconvert().none() = nb::none(),
           "out[T, hidden] = FFN(x); counts[T, 3] = candidates, gates above the threshold, "
           "Combined not zero. All this without the neurons of the spans that are elsewhere; to "
           "uses[spans] are added, outside dense mode, those with Combined not zero")
      .attr("SPAN") = Spans::kNeurons;
  bind_decoder(m);
}
