# What one can do here. Everything runs in .venv, which `make` builds from constraints.txt when it is missing or old.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What pyproject.toml asks for: pip would say so only when gigabytes are there. Without pip is what a failed `venv` left.
FITS := -c 'import pip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))'
TESTS ?= tests

export HF_HUB_DISABLE_TELEMETRY := 1
export RAY_USAGE_STATS_ENABLED := 0

.DEFAULT_GOAL := help
.PHONY: help install demo test test-long test-fast lint types format kills kills-nodes clean

help:  ## list the tasks
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

# torch as the index has it: PyPI's for Linux brings CUDA, also to machines without a GPU (README says how not to).
# torchvision comes without its dependencies, because only the tests want it (timm, their reference, imports it).
$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/python $(FITS) 2>/dev/null || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python $(FITS) || { echo "$$($(BIN)/python --version) is not one of 3.11 to 3.14; name one that is:" \
		"make install PYTHON=python3.12"; exit 1; } >&2
	@$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(STAMP)-dev: $(STAMP)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps torchvision
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	@touch $@

install: $(STAMP)  ## make the virtual environment with pinned dependencies

demo: $(STAMP)  ## run the whole job on drawn pictures with the small model that ships here
	@$(BIN)/patchstream demo

# In the order of the names: by default the files with the fewest tests come last, which here are the slowest ones.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 15 -rs

test: $(STAMP)-dev lint types  ## lint, types, import rules and the tests (15 to 22 minutes on 2 cores)
	@$(PYTEST) -m "not long" $(TESTS)

test-long: $(STAMP)-dev  ## the rest: clusters of several nodes, submitted jobs, servers that die, measurements
	@$(PYTEST) -m long $(TESTS)

test-fast: $(STAMP)-dev  ## the tests that take seconds
	@$(BIN)/python -m pytest -m "not slow" $(TESTS)

lint: $(STAMP)-dev  ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(STAMP)-dev  ## mypy, strict, on the packages
	@$(BIN)/mypy

format: $(STAMP)-dev  ## let ruff put the code in order
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

kills: $(STAMP)-dev  ## long campaign: kill drivers, actors and workers at random moments, KILLS times
	@PATCHSTREAM_KILLS=$${KILLS:-200} $(BIN)/python -m pytest tests/flow/test_flow_kills.py

kills-nodes: $(STAMP)-dev  ## the same with whole nodes of a cluster: kill -9 of a raylet while another node joins
	@PATCHSTREAM_NODE_KILLS=$${KILLS:-10} $(BIN)/python -m pytest tests/cluster/test_cluster_kills.py

clean:  ## remove what is built, not what is downloaded
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache demo-output
