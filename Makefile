# make repro   set up, run whatever of the pipeline is out of date, and show the comparison
# make test    set up and run the tests
# make torture   kill the pipeline at random moments, run it again each time, and compare with a run that nobody killed
# make clean   remove the environment
# make clean-scratch   remove what interrupted runs have kept to go on from
#
# PYTHON=python3.12 chooses the interpreter; VENV=dir an environment elsewhere, such as one you already have.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(shell cksum requirements.txt | cut -d' ' -f1)
TEST_READY := $(VENV)/.ready-test-$(shell cat requirements.txt requirements-test.txt | cksum | cut -d' ' -f1)
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: repro test setup clean clean-scratch torture
repro: setup
	@dvc repro
	@python -m firstsight.reporting.table

test: setup $(TEST_READY)
	@ruff check .
	@python -m pytest

# From an unpacked archive there is no git, and DVC has to be told.
setup: $(READY)
	@if [ ! -e .git ]; then dvc config --local core.no_scm true; fi

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: expected Python 3.11 or newer, found $$($(PYTHON) --version 2>&1); set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) requirements.txt
	@touch $@

$(TEST_READY): requirements-test.txt | $(READY)
	$(INSTALL) requirements-test.txt
	@touch $@

clean:
	rm -rf $(VENV)

clean-scratch: setup
	@python -m firstsight.runs.scratch

torture: setup
	@python -m benchmarks.torture
