# make demo     set up, fetch the real weights, train, remove channels, report
# make test     set up and run the tests
# make check    lint, types, tests
# make package  build sdist and wheel, install the wheel where nothing else is, and use it
# make licences the licence of everything that the package needs; fails where one is not allowed
# CI runs the last three, and fuzz-short.
#
# make lock     write the lock files anew, after a change of pyproject.toml or constraints.txt
# make sbom     what is installed, as CycloneDX: dist/chanscale.cdx.json
# make fuzz     changed files for each reader, for a few minutes; installs atheris (Linux) in a folder of its own;
#               fuzz-short: 200 of them for each
# make audit    known vulnerabilities of what is locked; needs PyPI's own service
#
# What is installed is locked: by version, and by the SHA-256 of each file. LOCK=0 goes by version alone.
# PIP_ARGS is handed to pip: a mirror, or on a Linux machine without a GPU
#   PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" for the small build of torch.

PYTHON ?= python3
PIP_ARGS ?=
LOCK ?= 1
BIN := .venv/bin
TOOLS := .venv/tools/bin

.PHONY: demo test lint types check package licences lock sbom audit fuzz fuzz-short clean

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

licences: .venv/installed-dev
	$(BIN)/python tools/licences.py

lock: .venv/tools/installed
	$(TOOLS)/python tools/lock.py

sbom: .venv/installed .venv/tools/installed
	mkdir -p dist
	$(TOOLS)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		-o dist/.chanscale.cdx.json.tmp $(BIN)/python
	mv dist/.chanscale.cdx.json.tmp dist/chanscale.cdx.json

audit: .venv/tools/installed
	$(TOOLS)/python tools/audit.py

FUZZ_SECONDS ?= 20

fuzz: .venv/installed-dev .venv/fuzz/installed
	OMP_NUM_THREADS=1 PYTHONPATH=.venv/fuzz $(BIN)/python tools/fuzz.py all --seconds $(FUZZ_SECONDS)

# With one seed: where this fails, it is for a change of the code.
fuzz-short: .venv/installed-dev .venv/fuzz/installed
	OMP_NUM_THREADS=1 PYTHONPATH=.venv/fuzz $(BIN)/python tools/fuzz.py all --runs 200 --seconds 60 --seed 1

.venv/fuzz/installed: .venv/bin/python
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps --target .venv/fuzz atheris==3.0.0
	touch $@

clean:
	rm -rf .venv build dist src/*.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

ifeq ($(LOCK),0)
install-runtime = $(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e .
install-dev = $(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[dev]'
else
install-runtime = $(BIN)/python tools/install_locked.py requirements.lock $(PIP_ARGS)
install-dev = $(BIN)/python tools/install_locked.py requirements-dev.lock $(PIP_ARGS)
endif

.venv/installed: .venv/bin/python pyproject.toml constraints.txt requirements.lock
	$(install-runtime)
	touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml constraints.txt requirements-dev.lock
	$(install-dev)
	touch $@ .venv/installed

# What the tools need, pip included, stays out of what they look into.
.venv/tools/installed: .venv/bin/python tools/requirements.lock
	$(PYTHON) -m venv .venv/tools
	$(TOOLS)/python -m pip install $(PIP_ARGS) --require-hashes -r tools/requirements.lock
	touch $@
