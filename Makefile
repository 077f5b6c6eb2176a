# Two commands do everything on a fresh machine with Python 3.11 or newer:
#   make quickstart    trains and evaluates on digits that need no download
#   make test          runs the tests
# PYTHON=python3.13 chooses an interpreter, VENV=folder another environment.

PYTHON ?= python3
VENV ?= .venv
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])')
CONSTRAINTS := constraints/py$(VERSION).txt
RUN := $(VENV)/bin/python

.PHONY: quickstart test lint format clean

quickstart: $(VENV)/.installed
	$(RUN) -m experiments.train --config=experiments/configs/quickstart.py

test: $(VENV)/.installed
	$(RUN) -m pytest -n 2 --dist worksteal

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
