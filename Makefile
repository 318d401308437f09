# fleetfit: `make demo` shows it, `make test` checks it. Each installs what it needs on first use.
# Tests run on all cores, one thread each: `make test WORKERS=1` runs them one by one.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEV    := $(VENV)/.installed-dev
WORKERS ?= auto

.PHONY: demo test test-all lint bench clean help

help:
	@echo "make demo    fifteen models for fifteen devices from one Transformer, and a page that shows how (runs/digits)"
	@echo "make test    format, types, layers and tests"
	@echo "make test-all  the same and the long tests: fleets of many processes, real kits on loopback"
	@echo "make bench   the table of figures in benchmarks/results/ (about an hour on 2 cores)"
	@echo "make clean   remove runs/ and tool caches (the virtual environment stays)"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fleetfit needs Python >= 3.11; set PYTHON=..."; exit 1; }
	@echo "Installing fleetfit and PyTorch into $(VENV), once: about 1 GB to download, some minutes ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on --constraint constraints.txt --editable .
	@touch $@

$(DEV): $(STAMP)
	@echo "Installing what tests need, all engines and formats included, once ..."
	$(BIN)/python -m pip install --progress-bar on --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(STAMP)
	@$(BIN)/fleetfit run digits --out runs/digits

lint: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/pytest -n $(WORKERS) --dist worksteal

test-all: test
	$(BIN)/pytest -m long

bench: $(DEV)
	$(BIN)/python benchmarks/digits.py

clean:
	rm -rf runs .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
