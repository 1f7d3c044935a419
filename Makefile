# Each target sets up .venv by itself, again whenever setup.py changes. Another interpreter: make demo PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.installed-core
TEST := $(VENV)/.installed-test

.PHONY: help demo test test-quick lint format

help:
	@echo "make demo        train the demo from scratch on the CPU, then evaluate it: see runs/demo"
	@echo "make test        all tests"
	@echo "make test-quick  the tests that take seconds, until the first failure"
	@echo "make lint        style, changing nothing"
	@echo "make format      style, changing the files"

demo: $(CORE)
	rm -rf runs/demo
	$(BIN)/python train.py --config=configs/demo.py --workdir=runs/demo
	$(BIN)/python evaluate.py --workdir=runs/demo --out=runs/demo/metrics.json

test: $(TEST)
	$(BIN)/python -m pytest -n auto

test-quick: $(TEST)
	$(BIN)/python -m pytest -n auto -m "not slow" -x -q

lint: $(TEST)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(TEST)
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

$(CORE): setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "mcm-jax needs Python 3.11 or newer, but $(PYTHON) is: $$($(PYTHON) -V 2>&1). Use make PYTHON=..." >&2; exit 1; }
	@echo "Installing mcm-jax into $(VENV) (minutes, the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(TEST): $(CORE) setup.py
	@echo "Installing what the tests need into $(VENV): PyTorch and diffusers as oracles, pytest, ruff (minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@
