# Every target sets up its own .venv first; `make` alone lists them.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin

# One thread per test worker: two workers with a thread pool each fight over the cores.
test nightly: export OMP_NUM_THREADS = 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test nightly check lint format clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

demo: .venv/.installed  ## train a network that changes itself, beside a static one, and report
	@$(BIN)/neuroexapt demo

test: .venv/.installed  ## run all tests, doctests included
	@$(BIN)/python -m pytest -n $(WORKERS)

nightly: export NEUROEXAPT_SEQUENCES = 2000
nightly: export NEUROEXAPT_ALL_FAULTS = 1
nightly: export NEUROEXAPT_MANY_EDITS = 1000
nightly: export NEUROEXAPT_INTERRUPTS = 400
nightly: export NEUROEXAPT_ALL_CHECKPOINTS = 1
nightly: export NEUROEXAPT_KILLS = 200
nightly: export NEUROEXAPT_HOSTILE = 10000
nightly: export NEUROEXAPT_ALL_EXPORTS = 1
nightly: export NEUROEXAPT_SEEDS = 100
nightly: .venv/.installed  ## the long versions: 2,000 sequences of operations a model, every fault, 1,000 edits, 100 seeds
	@$(BIN)/python -m pytest -n $(WORKERS) tests/laws/test_any_order.py tests/laws/test_faults.py \
		tests/guard/test_many_edits.py tests/train/test_interrupts.py tests/measure/test_planted.py tests/record

check: lint test  ## everything CI runs: format, lint, types, then all tests

lint: .venv/.installed  ## check format, lint and types; changes nothing
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: .venv/.installed  ## format the code and apply the safe lint fixes
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:  ## remove .venv, caches and build output
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, so that its exact pin decides which build is fetched.
.venv/.installed: pyproject.toml constraints.txt
	@echo "Setting up .venv (once; some minutes on a slow line) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "The pinned set-up needs Python 3.11 or newer, this is %d.%d. Try: make PYTHON=python3.11" % sys.version_info[:2])'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,demo,export]'
	@touch $@
