# `make quickstart`: from a clone to a trained LoRA on two CPU cores. `make test`: what must pass before a change goes in.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := build/quickstart
THREADS := 2
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart test test-slow chaos lint docs clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed-demo
	$(BIN)/mixres quickstart $(DEMO)
	$(BIN)/accelerate launch --num_cpu_threads_per_process $(THREADS) train.py --config configs/quickstart.yaml
	$(BIN)/mixres quickstart --config configs/quickstart.yaml

# Tests of one file share a process, since they share its fixtures; more processes would only make more of those. Files
# come in their own order: xdist's, by number of tests, would end with those of few tests that take minutes.
BY_FILE := --dist loadfile --no-loadscope-reorder

test: lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 $(BY_FILE)

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "slow and not gpu" --numprocesses 2 $(BY_FILE)

# Forty kills at random instants, half of them in the middle of a save, and forty of a cache in a store; many minutes.
chaos: $(VENV)/.installed-test
	MIXRES_KILLS=40 $(BIN)/python -m pytest -m slow tests/training/test_chaos.py tests/data/test_shards.py -k kill

# The documentation site, to look at; `make test` builds it too.
docs: $(VENV)/.installed-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2
	$(BIN)/lint-imports

# What runs wrote; the environment stays (it is the slow part), `rm -rf .venv` removes it.
clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mixres needs Python 3.11 or newer, for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[demo]'
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[demo,test,docs]'
	$(PIP_INSTALL) --no-deps trackio
	touch $@ $(VENV)/.installed-demo
