# make demo     set up, fetch the real weights, train, remove channels, report
# make test     set up and run the tests
# make check    lint, types, tests
# make package  build sdist and wheel, install the wheel where nothing else is, and use it
#
# CI runs the last two.
#
# PIP_ARGS is handed to pip: a mirror, or on a Linux machine without a GPU
#   PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" for the small build of torch.

PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin

.PHONY: demo test lint types check package clean

demo: .venv/installed
	$(BIN)/chanscale demo

test: .venv/installed-dev
	$(BIN)/pytest

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/installed-dev
	$(BIN)/mypy

check: lint types
	$(MAKE) test

package: .venv/installed-dev
	$(BIN)/python tools/check-package $(PIP_ARGS)

clean:
	rm -rf .venv build dist src/*.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@ .venv/installed
