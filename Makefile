# Everything a developer runs. Each target makes the virtual environment first, once: `make demo` with what
# TensorKV needs, torch and 200 MB, `make docs` with mkdocs on top, and the others with the tools of its developers.
#   make demo      compare ways to train, with one slow worker and in memory, and draw demo.png (2 minutes)
#   make test      run the tests but those marked slow, within six minutes on two cores
#   make test-mxnet        try MXNet's own gluon.Trainer, in .venv-mxnet, for a numpy that MXNet can import
#   make test-frameworks   try what Trainer, Accelerate, Lightning, TRL and JAX need, in .venv-frameworks (1.5 GB)
#   make bench     measure TensorKV, its peers and the floor, and write docs/benchmarks.md (25 minutes)
#   make docs      build the site, with a reference from the docstrings, in site/; a broken link is an error
#   make check     what must pass before a change is merged
# PIP_ARGS is passed on to pip, for an index or a cache of your own: make test PIP_ARGS="--index-url ..."

# Without the bytecode in __pycache__, each process of each test would compile the sources anew.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.demo
STAMP := $(VENV)/.installed
DOCS := $(VENV)/.docs
FRAMEWORKS_VENV := .venv-frameworks
FRAMEWORKS_BIN := $(FRAMEWORKS_VENV)/bin
FRAMEWORKS := $(FRAMEWORKS_VENV)/.installed
MXNET_VENV := .venv-mxnet
MXNET_BIN := $(MXNET_VENV)/bin
MXNET := $(MXNET_VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup demo test test-all test-frameworks test-mxnet lint types format check coverage bench docs clean

setup: $(STAMP)

# The build backend is installed first, pinned like the rest, so that pip fetches no other for the build.
$(DEMO): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(PIP_ARGS) -c constraints.txt setuptools
	$(PIP) install $(PIP_ARGS) -c constraints.txt --no-build-isolation -e '.[bench]'
	touch $(DEMO)

$(STAMP): $(DEMO)
	$(PIP) install $(PIP_ARGS) -c constraints.txt --no-build-isolation -e '.[dev,bench]'
	touch $(STAMP)

$(DOCS): $(DEMO)
	$(PIP) install $(PIP_ARGS) -c constraints.txt --no-build-isolation -e '.[docs]'
	touch $(DOCS)

demo: $(DEMO)
	$(BIN)/python benchmarks/demo.py --plot demo.png

# Three at a time keep two cores busy: many tests wait for processes of their own. TESTS=path runs some.
test: setup
	$(BIN)/python -m pytest -n 3 --dist worksteal -m "not slow" $(TESTS)

test-all: setup
	$(BIN)/python -m pytest -n 3 --dist worksteal $(TESTS)

# The frameworks would take the tools of the other environment to other versions.
$(FRAMEWORKS): pyproject.toml constraints-frameworks.txt
	test -x $(FRAMEWORKS_BIN)/python || $(PYTHON) -m venv $(FRAMEWORKS_VENV)
	$(FRAMEWORKS_BIN)/python -m pip --disable-pip-version-check install $(PIP_ARGS) -c constraints-frameworks.txt setuptools
	$(FRAMEWORKS_BIN)/python -m pip --disable-pip-version-check install $(PIP_ARGS) -c constraints-frameworks.txt \
		--no-build-isolation -e '.[frameworks]'
	touch $(FRAMEWORKS)

test-frameworks: $(FRAMEWORKS)
	OMP_NUM_THREADS=1 $(FRAMEWORKS_BIN)/python -m pytest tests/frameworks

$(MXNET): pyproject.toml constraints-mxnet.txt
	test -x $(MXNET_BIN)/python || $(PYTHON) -m venv $(MXNET_VENV)
	$(MXNET_BIN)/python -m pip --disable-pip-version-check install $(PIP_ARGS) -c constraints-mxnet.txt setuptools
	$(MXNET_BIN)/python -m pip --disable-pip-version-check install $(PIP_ARGS) -c constraints-mxnet.txt \
		--no-build-isolation -e '.[mxnet]'
	touch $(MXNET)

test-mxnet: $(MXNET)
	OMP_NUM_THREADS=1 $(MXNET_BIN)/python -m pytest tests/frameworks/test_gluon.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy src

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint types test-all

coverage: setup
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n 3 --dist worksteal
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

bench: setup
	$(BIN)/python benchmarks/measureall.py

# It reads the sources and the pages, and runs nothing of them: tests/test_docs.py does that.
docs: $(DOCS)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(FRAMEWORKS_VENV) $(MXNET_VENV) build dist site htmlcov .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
