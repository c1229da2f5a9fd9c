// Python's view of the rows that stay on disk.
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "bindings.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

constexpr int kMaxReaders = 256;

void init_store(Store* self, int64_t bytes, int64_t row_bytes, int unit, int readers) {
  if (row_bytes < 1 || unit < 1) fail("row_bytes and unit must be at least 1");
  if (readers < 1 || readers > kMaxReaders) {
    fail("readers is " + std::to_string(readers) + ", expected 1 to " +
         std::to_string(kMaxReaders));
  }
  new (self) Store(bytes, row_bytes, unit, readers);
}

OwningRows add(Store& self, int file, int64_t offset, int64_t rows, int alignment) {
  if (offset < 0 || rows < 1 || alignment < 1) fail("offset, rows or alignment is too small");
  return {{&self, self.add(file, offset, rows, alignment)}, rows, nb::find(self)};
}

// Reads some rows, as the feed-forwards do: for measurements.
void fetch(const OwningRows& self, Array<const int32_t, 1> rows) {
  const std::vector<std::vector<int32_t>> list{{rows.data(), rows.data() + rows.shape(0)}};
  for (const int32_t row : list[0]) {
    if (row < 0 || row >= self.rows) {
      fail("row is " + std::to_string(row) + ", expected 0 to " + std::to_string(self.rows - 1));
    }
  }
  if (static_cast<int64_t>(self.units(list).size()) > self.store->units()) {
    fail("the rows do not fit the store");
  }
  nb::gil_scoped_release release;
  const Held held(self, list);
}

}  // namespace

void bind_store(nb::module_& m) {
  nb::exception<ReadError>(m, "ReadError", PyExc_OSError);
  nb::class_<OwningRows>(m, "StoredRows", "A tensor of rows that stays on disk.")
      .def("fetch", &fetch, "rows"_a.noconvert(), "Have these rows, ascending, in the store.");
  nb::class_<Store> store(m, "Store",
                          "A cache of bounded size of units of neighbouring rows on disk.");
  store.attr("READ_BYTES") = Store::kReadBytes;
  store.attr("GAP_BYTES") = Store::kGapBytes;
  store.attr("TOGETHER") = Neurons::kChunk;
  store.def("__init__", &init_store, "bytes"_a, "row_bytes"_a, "unit"_a, "readers"_a)
      .def("add", &add, "file"_a, "offset"_a, "rows"_a, "alignment"_a,
           "Rows from a byte of an open file on, which is the caller's to keep open.")
      .def_prop_ro("units", &Store::units)
      .def(
          "take_counts",
          [](Store& self) {
            const Store::Counts counts = self.take_counts();
            return std::tuple(counts.hits, counts.misses, counts.reads, counts.bytes,
                              counts.waited);
          },
          "Units that were there, and were not; reads, their bytes, and seconds waited, since the "
          "last call.");
}
