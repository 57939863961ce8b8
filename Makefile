# One command sets up and runs: `make demo`, `make test`. Needs git, make and Python 3.11 or newer.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
BASE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
PINS := pyproject.toml setup.py constraints.txt $(wildcard rematerialize/solve/native/*.[ch])

.PHONY: demo test lint types bench readme clean

demo: $(BASE)
	$(BIN)/python -m benchmarks.demo

test: $(DEV)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)
	$(BIN)/mypy

bench: $(DEV)
	$(BIN)/python -m benchmarks.compare

readme: $(DEV)
	$(BIN)/python -m benchmarks.compare --render
	$(BIN)/python -m benchmarks.solver.report
	$(BIN)/python -m benchmarks.predictions --render
	$(BIN)/python -m benchmarks.readme

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find rematerialize benchmarks tests -name __pycache__ -prune -exec rm -rf {} +

# The stamps make a second run quick; they are remade when the pins change.
$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is missing or older than 3.11: run make PYTHON=python3.11, or another that you have" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$(PYTHON) -m venv failed: on Debian, 'apt install python3-venv' and try again" >&2; exit 1; }

$(BASE): $(VENV)/pyvenv.cfg $(PINS)
	$(INSTALL) --editable .
	@touch $@

$(DEV): $(VENV)/pyvenv.cfg $(PINS)
	$(INSTALL) --editable '.[dev,exact,models,plot]'
	@touch $@ $(BASE)
