# Two commands do everything on a fresh machine with Python 3.11 or newer:
#   make quickstart    trains and evaluates on digits that need no download
#   make test          runs the tests
# Beside them
#   make test-fast     runs the laws of attacks, losses, norms, errors and training steps, for a first look
#   make test-isa      runs what asserts numbers as compiled for other CPUs: ISA="SSE4_2 AVX"
#   make extras        installs what tests of PyTorch, ONNX and corruptions need, or they are skipped
# PYTHON=python3.13 chooses an interpreter, VENV=folder another environment.

PYTHON ?= python3
VENV ?= .venv
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])')
CONSTRAINTS := constraints/py$(VERSION).txt
RUN := $(VENV)/bin/python

ISA ?= SSE4_2 AVX AVX2 AVX512
LAWS := tests/attacks/test_attack_laws.py tests/test_layout.py tests/test_losses.py tests/test_norms.py \
    tests/test_defences_bad_inputs.py tests/test_training.py
TESTS := -m pytest -n 2 --dist worksteal

.PHONY: quickstart test test-fast test-isa extras lint format clean

quickstart: $(VENV)/.installed
	$(RUN) -m experiments.train --config=experiments/configs/quickstart.py

# What asserts numbers is compiled as users' programs are; the rest is compiled faster.
test: $(VENV)/.installed
	$(RUN) $(TESTS) -m "not structure"
	COMPILE=fast $(RUN) $(TESTS) -m structure

test-fast: $(VENV)/.installed
	$(RUN) $(TESTS) -m "not structure" $(LAWS)

test-isa: $(VENV)/.installed
	@for isa in $(ISA); do echo "--- $$isa"; \
	    XLA_FLAGS="--xla_cpu_max_isa=$$isa" $(RUN) $(TESTS) -m "not structure" || failed=yes; \
	done; test -z "$$failed"

# PyTorch by itself and first, so that nothing else decides which of its builds it is.
extras: $(VENV)/.installed
	$(RUN) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(RUN) -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) \
	    -e '.[test,torch,export,onnx,corruptions]'

lint: $(VENV)/.linters
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.linters
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/.installed: setup.cfg pyproject.toml Makefile $(wildcard $(CONSTRAINTS))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rain_jax needs Python 3.11 or newer: make PYTHON=python3.11")'
	@test -f $(CONSTRAINTS) || { echo "no tested versions for $$($(PYTHON) --version): make PYTHON=python3.11 (or 3.12, 3.13)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[test]'
	@touch $@

$(VENV)/.linters: $(VENV)/.installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[test,lint]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
