# make build | demo | test | emulate | bench | lint | docs | clean, with everything in .venv; docs/gpu.md has `make gpu-check` and gpu-wheel.
# make test PYTHON=python3 VENV=none builds into that interpreter and installs nothing else.
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= gpu-check

# CUDA architectures when nvcc is there (PTX runs on newer GPUs): few, to keep this build short.
CUDAARCHS ?= 80-real;90
export CUDAARCHS
# Compilers at once; each nvcc takes about 1 GB.
CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc 2>/dev/null || echo 2)
export CMAKE_BUILD_PARALLEL_LEVEL
# Bytecode is kept whatever the caller's environment says: each of the many processes of the tests imports torch and
# transformers, in 4 s with it and in 9 s without.
export PYTHONDONTWRITEBYTECODE =

ifeq ($(VENV),none)
  PY          := $(PYTHON)
  INTERPRETER := $(shell command -v $(PYTHON))
else
  PY          := $(VENV)/bin/python
  INTERPRETER := $(abspath $(PY))
  TOOLS_STAMP := $(VENV)/.tools-stamp
  ENV_STAMP   := $(VENV)/.env-stamp
  CHECK       := $(PY) -m pip check >/dev/null
  # A worker for each core; what needs much memory stays on one. pytest-benchmark warns of workers and is not used here.
  WORKERS     := -n $(CMAKE_BUILD_PARALLEL_LEVEL) --dist loadgroup -p no:benchmark
endif

SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
# One stamp per interpreter and build setting; a build removes the others, since all build into the same place.
BUILD_KEY       := $(shell echo "$(INTERPRETER) $(CUDAARCHS) $(VLPRUNE_CUDA)" | cksum | cut -d' ' -f1)
EXTENSION_STAMP := build/stamps/$(BUILD_KEY).extension
BUILD_STAMP     := build/stamps/$(BUILD_KEY)

.PHONY: env build demo test emulate bench lint docs clean gpu-check gpu-wheel
.DEFAULT_GOAL := build

env: $(ENV_STAMP)

$(VENV)/.tools-stamp: constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv --upgrade-deps $(VENV)  # a current pip takes half the time
	$(VENV)/bin/python -m pip install -q --no-compile -c constraints.txt cmake ninja pybind11 scikit-build-core setuptools
	touch $@

$(VENV)/.env-stamp: $(VENV)/.tools-stamp
	echo "vlprune_ext: installing what constraints.txt names into $(VENV)"
	$(VENV)/bin/python -m pip install -q --no-compile -r constraints.txt  # what is imported gets compiled then
	touch $@

# The extension needs the tools alone, so it is compiled while torch and the rest are installed.
build:
	@$(MAKE) --no-print-directory -s -j 2 $(BUILD_STAMP)

$(EXTENSION_STAMP): $(TOOLS_STAMP) $(SOURCES)
	rm -rf build/stamps
	echo "vlprune_ext: compiling the extension"
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	mkdir -p $(@D)
	touch $@

$(BUILD_STAMP): $(EXTENSION_STAMP) $(ENV_STAMP)
	$(CHECK)
	$(PY) -c "from vlprune_ext._native import build_info as b; i = b(); \
	  print('vlprune_ext: CUDA', i['cuda_version'] + ' for ' + i['cuda_archs'] if i['cuda_built'] else 'not built (no nvcc)', '| CPU', i['isa'])"
	touch $@

demo: build
	$(PY) -m vlprune_ext demo

test: build
	$(PY) -m pytest $(WORKERS)

# The ops' tests, on CUDA kernels that run thread by thread on the CPU (tests/emulator/emulator.h).
OPS ?= tests/ops
emulate: build
	PATH="$(dir $(INTERPRETER)):$$PATH"; \
	  cmake -S tests/emulator -B build/emulator -G Ninja --log-level=WARNING -D Python_EXECUTABLE=$(INTERPRETER) && \
	  cmake --build build/emulator -- --quiet
	$(PY) -m pytest $(WORKERS) -p emulator.plugin tests/emulator/check_emulator.py $(OPS)

bench: build
	$(PY) -m pytest benchmarks -o "python_files=bench_*.py" -o "filterwarnings=default" --bench-out benchmarks/results

lint: $(ENV_STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	find csrc tests/emulator -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(dir $(PY))clang-format --dry-run -Werror
	$(PY) -m mypy

# The tables in the Markdown pages, and the API page from the docstrings: build/docs/vlprune_ext.html.
docs: build
	$(PY) scripts/docs_tables.py
	$(PY) scripts/docs_api.py build/docs

# On a machine with a GPU; PARTS="kernels ncu" runs some parts, BUDGET is the time for all, in seconds. COMMIT says what
# is measured where the source tree came without its repository.
COMMIT ?= $(shell git rev-parse --short=12 HEAD 2>/dev/null)
BUDGET ?= 540
gpu-check:
	COMMIT="$(COMMIT)" $(PYTHON) scripts/gpu_check.py "$(OUT)" --budget $(BUDGET) $(if $(PARTS),--parts $(PARTS))

# A wheel for gpu-check to take instead of building: for this PYTHON, which must have the tools, and an H100 or H200.
GPU_WHEEL := gpu-wheel/$(shell cat CMakeLists.txt $$(find csrc -type f | LC_ALL=C sort) | sha256sum | cut -c1-12)
gpu-wheel:
	CUDAARCHS=90-real VLPRUNE_CUDA=ON $(PYTHON) -m pip wheel -q --no-build-isolation --no-deps -w $(GPU_WHEEL) .
	ls $(GPU_WHEEL)

clean:
	rm -rf build dist *.egg-info vlprune_ext/_C*.so gpu-check gpu-wheel .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
