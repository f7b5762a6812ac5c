# `make demo` and `make test` need Python >= 3.10, a C++ compiler and make; they install the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc cmake -type f)
FORMATTED := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help install demo test lint bench gpu clean

help:
	@echo "make demo   a few minutes: roofs, kernels, a small study and its report"
	@echo "make test   every test"
	@echo "make bench  every kernel against the roofs of this machine and stock PyTorch"
	@echo "make gpu    build, test, sanitize, benchmark, validate on the GPU here (STAGE=... for one)"
	@echo "make lint   ruff, mypy, clang-format"

$(VENV)/.installed: $(BUILD_INPUTS)
	@command -v $(PYTHON) > /dev/null || \
	  { echo "needs Python >= 3.10 ('$(PYTHON)' is not there; set PYTHON=...)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	  "needs Python >= 3.10, got %d.%d; set PYTHON=..." % sys.version_info[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || \
	  { echo "needs Python's venv module (Debian and Ubuntu: the package python3-venv)" >&2; exit 1; }
	@command -v $${CXX:-c++} > /dev/null || \
	  { echo "needs a C++ compiler ('$${CXX:-c++}' is not there; set CXX=...)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/ceg demo

test: install
	$(BIN)/python -m pytest tests bench -q

bench: install
	$(BIN)/ceg bench

# With the environment that is there: a machine with a GPU has a torch of its own for it.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tools/gpu.py $(STAGE) $(GPU_OPTIONS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

clean:
	rm -rf build $(VENV) ceg_kernels/_C*.so
