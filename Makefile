# People and CI use the same commands. A fresh machine needs python3 (3.11+), pip, venv, gcc and make.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
CPP := $(wildcard csrc/*.cpp csrc/*.h)
LINES_PYTHON := 6500
LINES_CPP := 2500

.PHONY: setup demo test lint format bench clean

setup: $(INSTALLED)

# editable, and rebuilt when a C++ file changes: the build tools therefore stand inside the environment
$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt scikit-build-core nanobind cmake ninja
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -Ceditable.rebuild=true -e '.[train,dev]'
	touch $@

demo: setup
	$(BIN)/turbosparse demo

# two workers with one torch thread each: faster than one with two on these small models
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/codespell
	@git ls-files 'src/*.py' | xargs cat | wc -l | \
	  awk '{ print "Python", $$1, "lines of $(LINES_PYTHON)"; exit $$1 > $(LINES_PYTHON) }'
	@cat $(CPP) | wc -l | awk '{ print "C++", $$1, "lines of $(LINES_CPP)"; exit $$1 > $(LINES_CPP) }'

format: setup
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: setup
	$(BIN)/python benchmarks/ops.py

clean:
	rm -rf .venv build demo
