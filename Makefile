PYTHON ?= python3
VENV ?= .venv
# Two test processes of one thread each; on a larger machine: make test PYTEST_FLAGS='-n 8'.
# The tests of a file share their fixtures and captured networks, so they run in one process.
PYTEST_FLAGS ?= -n 2 --dist loadfile --no-loadscope-reorder
OMP_NUM_THREADS ?= 1

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OLDEST := $(VENV)-oldest
PYTEST := OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(BIN)/python -m pytest $(PYTEST_FLAGS)

.DEFAULT_GOAL := help
.PHONY: help demo test slow cuda coverage oldest docs lint ruff format-check types imports format clean

help:
	@echo 'make demo     install into $(VENV) and run the quick start; on images of yours: DATA=cifar10.zip'
	@echo 'make test     lint and the fast tests'
	@echo 'make slow     the slow tests'
	@echo 'make cuda     the tests that need a CUDA device'
	@echo 'make coverage the fast tests, with the lines and branches that none of them reaches'
	@echo 'make oldest   the fast tests with the oldest versions that pyproject.toml promises'
	@echo 'make docs     build the documentation into docs/_build/html'
	@echo 'make lint     lint, format check, types, import layers'
	@echo 'make format   reformat the code and apply the safe lint fixes'
	@echo 'make clean    remove everything generated but $(VENV)'

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[test,dev,plot]'
	touch $@

demo: $(INSTALLED)
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(BIN)/python examples/plot_quickstart.py $(if $(DATA),--data '$(DATA)')

test: lint
	$(PYTEST)

slow: $(INSTALLED)
	$(PYTEST) -m slow

cuda: $(INSTALLED)
	$(BIN)/python -m pytest -m cuda

coverage: $(INSTALLED)
	$(PYTEST) --cov --cov-report=term-missing

oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(OLDEST)/bin/python -m pytest $(PYTEST_FLAGS)

$(OLDEST)/.installed: pyproject.toml
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(PYTHON) .ci/oldest.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install -c $(OLDEST)/constraints.txt -e '.[test]'
	touch $@

docs: $(VENV)/.installed-docs
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(BIN)/python -m sphinx -W --keep-going $(SPHINX_FLAGS) docs docs/_build/html

$(VENV)/.installed-docs: $(INSTALLED)
	$(BIN)/python -m pip install -e '.[docs]'
	touch $@

lint: ruff format-check types imports

ruff: $(INSTALLED)
	$(BIN)/ruff check .

format-check: $(INSTALLED)
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

imports: $(INSTALLED)
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info docs/_build docs/auto_examples docs/generated
	rm -rf .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path './$(VENV)' -prune -o -name __pycache__ -type d -exec rm -rf {} +
