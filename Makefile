# Two commands matter: `make demo` and `make test`. Each makes its own virtual
# environment when there is none. `make` alone lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

# Settings: `make demo PYTHON=python3.12 TORCH=2.12.0`.
PYTHON ?= python3
VENV ?= .venv
# File of exact versions; empty for the newest that pyproject.toml admits.
CONSTRAINTS ?= constraints.txt
# A torch version in place of the file's.
TORCH ?=
# Further options for pip, e.g. PIP_FLAGS='--find-links folder-with-a-cpu-wheel'.
PIP_FLAGS ?=
OUT ?= demo-out
PYTEST_FLAGS ?=
# Test files run side by side, as many as there are cores, up to this number.
JOBS ?= 4

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# PyTorch takes one thread: a test file to each core uses them better.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses $(JOBS) \
  --dist loadfile
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile
	@echo "Settings: PYTHON VENV CONSTRAINTS TORCH PIP_FLAGS OUT PYTEST_FLAGS JOBS"

.PHONY: demo
demo: $(STAMP) ## Photo to identity to engine to pictures to parity page, in demo-out
	@$(BIN)/id3pm-deploy demo --out "$(OUT)"

.PHONY: test
test: lint types ## Everything CI runs: lint, types and all tests
	$(PYTEST) $(PYTEST_FLAGS)

.PHONY: check
check: lint types ## Lint, types and the quick tests
	$(PYTEST) -m "not slow" $(PYTEST_FLAGS)

.PHONY: lint
lint: $(STAMP) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: types
types: $(STAMP) ## mypy --strict
	$(BIN)/mypy --strict
	$(BIN)/mypy --strict tests/hostile/*.py

.PHONY: format
format: $(STAMP) ## Rewrite the code as ruff would have it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: venv
venv: $(STAMP) ## Make the virtual environment, or bring it up to date

# Made anew whenever the requirements change; a failed install leaves no stamp.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' \
	  || { echo "needs Python 3.10 to 3.13: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@sed -E '$(if $(TORCH),s/^torch==[^ ]+/torch==$(TORCH)/)' \
	  $(or $(CONSTRAINTS),/dev/null) > $(VENV)/constraints.txt
	@echo "installing into $(VENV): takes minutes, and gigabytes with a CUDA torch"
	@$(BIN)/python -m pip install --quiet --quiet --editable '.[all,dev]' \
	  --constraint $(VENV)/constraints.txt $(PIP_FLAGS)
	@touch $@

.PHONY: clean
clean: ## Remove what the tools and the demo made
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-out
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## The same, and the virtual environment .venv
	rm -rf .venv
