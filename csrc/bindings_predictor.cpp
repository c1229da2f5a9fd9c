// Python's view of the predictors.
#include <algorithm>

#include "bindings.h"
#include "predictor.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

struct OwningLowRank : LowRank {
  using LowRank::LowRank;
  nb::object fc1, fc2;
};

struct OwningSigns : Signs {
  using Signs::Signs;
  Bytes owner;
};

void init_low_rank(OwningLowRank* self, const OwningMatrix& fc1, const OwningMatrix& fc2,
                   float threshold, bool pre_norm) {
  if (fc1.rows != fc2.cols) {
    fail("fc1 has " + std::to_string(fc1.rows) + " rows, expected the " + std::to_string(fc2.cols) +
         " columns of fc2");
  }
  new (self) OwningLowRank(fc1, fc2, threshold, pre_norm);
  self->fc1 = nb::find(fc1);
  self->fc2 = nb::find(fc2);
}

void init_signs(OwningSigns* self, Bytes bits, int hidden, double threshold) {
  if (hidden < 1) fail("hidden is " + std::to_string(hidden) + ", expected at least 1");
  const int parts = std::max<int>(1, bits.shape(1) / Signs::bits_stride(hidden));
  check_shape("bits", bits, bits.shape(0), parts * Signs::bits_stride(hidden));
  new (self) OwningSigns(bits.data(), bits.shape(0), hidden, parts, threshold);
  self->owner = bits;
}

}  // namespace

void bind_predictors(nb::module_& m) {
  nb::class_<Predictor>(m, "Predictor", "Picks the candidate neurons of a token.");
  nb::class_<OwningLowRank, Predictor>(m, "LowRank", "Logits fc2 · relu(fc1 · h).")
      .def("__init__", &init_low_rank, "fc1"_a, "fc2"_a, "threshold"_a, "pre_norm"_a);
  nb::class_<OwningSigns, Predictor>(m, "Signs", "Share of signs that agree with those of x.")
      .def("__init__", &init_signs, "bits"_a.noconvert(), "hidden"_a, "threshold"_a);
}
