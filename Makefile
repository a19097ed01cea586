# Everything a newcomer types. `make quickstart` and `make test` set themselves up.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Results depend on the number of threads; ranks set their own.
export OMP_NUM_THREADS ?= 1
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: help setup quickstart test test-slow test-gpu check format pictures lock clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/.installed ## make .venv from the pinned versions in constraints.txt

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; run make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: setup ## train and evaluate a small model on real text, about five minutes
	$(BIN)/baton quickstart

test: setup ## the tests, without the slow ones
	$(BIN)/python -m pytest -q -m "not slow"

test-slow: setup ## the tests that start clusters and servers
	$(BIN)/python -m pytest -q -m slow

test-gpu: setup ## the tests that need a CUDA device
	$(BIN)/python -m pytest -q -m gpu

check: setup ## lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup ## rewrite the code in the house's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

pictures: setup ## draw the pictures of docs/pipeline.md again
	@grep '^baton simulate .* --draw docs/pictures/' docs/pipeline.md | PATH="$(CURDIR)/$(BIN):$$PATH" sh -ex

lock: setup ## pin the versions that are installed now
	$(BIN)/python -m pip freeze --exclude-editable | sed -E 's/\+(cpu|cu[0-9]+)$$//' > constraints.txt

clean: ## remove the environment and what runs left behind
	rm -rf .venv data/quickstart runs/quickstart
