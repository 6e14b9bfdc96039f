PYTHON ?= python3
BIN := .venv/bin
# A process for each core, four at most: a test computes on one thread.
PYTEST := $(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist worksteal

QUICK := not slow and not realdata and not gpu and not ray
.PHONY: demo test test-slow test-ray check docs gpu-check release-check clean

demo: .venv/core            ## five tasks, one after another, and the proof that none moved
	$(BIN)/addenda demo

test: .venv/dev             ## the quick tests, shapes checked; ADDENDA_TEST_POSTGRES=URL has them use that server, else they start one
	PYTHONPATH=. PYTEST_PLUGINS=tests.support.shapes $(PYTEST) -m "$(QUICK)"

test-slow: .venv/dev        ## the slow tests, and those on the real images where ../shared/data exists
	$(PYTEST) -m "(slow or realdata) and not ray" --durations=30

test-ray: .venv/dev         ## learning, predicting and serving on Ray clusters of several nodes on this machine
	$(BIN)/pytest -m ray tests/distributed

check: .venv/dev            ## style, types, architecture, and every example in docstrings
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -q --doctest-modules addenda --ignore=addenda/registry/migrations

docs: .venv/dev             ## every page and the reference as site/, to read without a network; a broken link fails
	$(BIN)/mkdocs build --strict

.venv/core: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/dev: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

gpu-check: .venv/dev        ## exactness tests, cost and learning on a GPU, kept in docs/results/
	$(BIN)/python scripts/gpu_check.py

release-check: .venv/dev    ## sdist and wheel: what is in them, and the wheel alone in clean environments; minutes
	$(BIN)/python scripts/release_check.py

clean:
	rm -rf .venv site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
