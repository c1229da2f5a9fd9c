# People and CI use the same commands. What a fresh machine needs, setup says itself.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# most modules are never imported: Python compiles the others when they are
INSTALL := $(BIN)/pip install -q --no-compile -c constraints.txt
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/*.inl)
CPP_TESTS := $(wildcard tests/*.cpp)
# the linker would merge a weak function of these with those of other files, flags and all
ISA_OBJECTS := build/*/CMakeFiles/turbosparse_kernels.dir/csrc/kernels_[!r]*.o
LINES_PYTHON := 25479
LINES_CPP := 4500
# each of the four tests opens this many damaged folders
FUZZ_EXAMPLES := 25000

.PHONY: setup demo test fuzz sanitize wheel lint format bench bench-gpu clean

setup: $(INSTALLED)

# editable, and rebuilt when a C++ file changes: the build tools therefore stand inside the environment
$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt
	@$(PYTHON) .ci/check_setup.py
	$(PYTHON) -m venv .venv
	$(INSTALL) scikit-build-core nanobind cmake ninja
	$(INSTALL) --no-build-isolation -Ceditable.rebuild=true -e '.[train,serve,gpu,dev]'
	@# apart, where its tests look: inside the environment every other run would load it too
	$(INSTALL) --no-deps --target .venv/deepspeed deepspeed einops hjson msgpack py-cpuinfo
	touch $@

demo: setup
	$(BIN)/turbosparse demo

# two workers with one torch thread each: faster than one with two on these small models
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

fuzz: setup
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 tests/test_format.py -k fuzzed

sanitize: setup
	.ci/sanitize

wheel: setup
	rm -rf dist
	$(BIN)/pip wheel -q --no-deps --no-build-isolation -w dist .

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP) $(CPP_TESTS)
	$(BIN)/mypy
	$(BIN)/codespell
	@git ls-files 'src/*.py' | xargs cat | wc -l | \
	  awk '{ print "Python", $$1, "lines of $(LINES_PYTHON)"; exit $$1 > $(LINES_PYTHON) }'
	@$(BIN)/python -c 'import turbosparse._core' # builds what changed
	@nm -P $(ISA_OBJECTS) | awk ' \
	  $$2 == "t" { functions++ } \
	  $$2 ~ /^[WwVvu]$$/ { print "weak symbol in the kernels of an instruction set:", $$1; weak++ } \
	  END { if (!functions) print "no kernels of an instruction set: run make clean setup"; exit weak || !functions }'
	@[ "$$(uname)" != Linux ] || $(BIN)/python .ci/compile_kernels.py # Triton is for Linux only
	@cat $(CPP) | wc -l | awk '{ print "C++", $$1, "lines of $(LINES_CPP)"; exit $$1 > $(LINES_CPP) }'

format: setup
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP) $(CPP_TESTS)

bench: setup
	$(BIN)/python benchmarks/ops.py

# needs an NVIDIA GPU
bench-gpu: setup
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf .venv build dist demo
