# Every target sets up what it needs: a .venv beside this file, with the versions of constraints.txt.
# It takes Python 3.11 or later with venv; choose the interpreter with `make PYTHON=python3.12 ...`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

# setuptools puts export/, runtime/ and so on into the package zreward; for mypy, links do.
LINKS := build/types

# Tests hold the builder of engines against these versions of TensorRT's Python bindings, without its libraries, and the
# graphs for GPUs against this ONNX Runtime, without CUDA's.
ifeq ($(shell uname -sm),Linux x86_64)
BINDINGS := $(VENV)/tensorrt-10.16.1.11 $(VENV)/tensorrt-11.4.0.106 $(VENV)/onnxruntime-gpu-1.31.1
endif

# Tests run in parallel processes: one thread each keeps them from fighting over the cores.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test lint format bindings clean

demo: $(STAMP)
	$(BIN)/zreward demo

test: lint bindings
	$(TEST_ENV) $(BIN)/pytest -n $(WORKERS) --dist loadscope

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf $(LINKS) && mkdir -p $(LINKS)/zreward
	@ln -s $(addprefix ../../../,$(wildcard zreward/*) export quant runtime training) $(LINKS)/zreward/
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bindings: $(BINDINGS)

$(VENV)/tensorrt-%: | $(STAMP)
	@rm -rf $@.partial
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --target $@.partial tensorrt_cu13_bindings==$*
	@mv $@.partial $@

$(VENV)/onnxruntime-gpu-%: | $(STAMP)
	@rm -rf $@.partial
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --target $@.partial onnxruntime-gpu==$*
	@mv $@.partial $@

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# pip is asked for rather than python: a setup that was interrupted leaves a python without it.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard runtime/kernels/*.cpp runtime/kernels/*.h)
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[cpu,export,plugins,train,dev]'
	@touch $@
