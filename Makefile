# make demo   install, run the default study on the miniature world, show the winner
# make test   install, check style, types and layers, run every test
# make crash  a hundred random schedules of kill -9, full disks and wrong clocks; writes tests/benchmarks/results/crash.md.
#             Interrupted, it goes on where it was; remove .crash.jsonl to begin anew
# make soak   three hundred trials by one controller: memory, files, processes; writes tests/benchmarks/results/soak.md
#
# All need Python 3.11 or newer, and nothing else. Repeating one installs again only what pyproject.toml or
# constraints.txt changed.

SHELL := /bin/bash
PYTHON ?= python3
STUDY ?= studies/hpo.yaml
# Two workers for two cores: each is one process with one thread.
WORKERS ?= 2

BIN := .venv/bin
QUIET_THREADS := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

.PHONY: demo test check crash soak clean

demo: .venv/installed
	$(BIN)/python -m orchestrator run $(STUDY)
	@echo
	@echo "All trials, with curves and pictures: $(BIN)/python -m orchestrator ui $(STUDY)"

test: .venv/installed-dev check
	rm -f .coverage .coverage.*
	$(QUIET_THREADS) $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --cov --cov-report=term:skip-covered $(PYTEST_FLAGS)

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyright --pythonpath $(BIN)/python

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ .venv/installed

crash: .venv/installed-dev
	$(QUIET_THREADS) $(BIN)/python -m tests.integration.crash --seeds 0 100 --reports .crash.jsonl --table tests/benchmarks/results/crash.md

soak: .venv/installed-dev
	$(QUIET_THREADS) $(BIN)/python -m tests.benchmarks.soak --trials 300

clean:
	rm -rf .venv .crash.jsonl .coverage .coverage.* .pytest_cache .ruff_cache .hypothesis *.egg-info
