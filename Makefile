# make repro   set up, run whatever of the pipeline is out of date, and show the comparison; JOBS=1 runs one stage at a
#              time, as is usual with a GPU
# make lint    set up, then check style, format and types
# make test    set up, then lint and run the unit tests and the smoke preset once, in one process
# make test-all   run every test, with real DVC, Slurm, a browser, several processes, kills and a model of true size; as
#                 root on Debian, install the packages of it that some of these need
# make publish REPO=owner/name   show what would be pushed to the hub; with PUSH=1 push it; VARIANT=student-distilled
# make torture   kill the pipeline at random moments, run it again each time, and compare with a run that nobody killed
# make audit   look up what is installed in a database of known vulnerabilities
# make clean   remove the environment
# make clean-scratch   remove what interrupted runs have saved
#
# PYTHON=python3.12 chooses the interpreter; VENV=dir an environment elsewhere, such as one you already have;
# WORKERS=4 how many tests run at a time (each takes up to 2 GB of memory, one of them 12).

PYTHON ?= python3
VENV ?= .venv
VARIANT ?= student-distilled
WORKERS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(shell cksum requirements.txt | cut -d' ' -f1)
TEST_READY := $(VENV)/.ready-test-$(shell cat requirements.txt requirements-demo.txt requirements-test.txt | cksum | cut -d' ' -f1)
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement
export PATH := $(abspath $(BIN)):$(PATH)
# DVC asks for the user's name, which a number that the machine does not know has not (docker run --user).
export USER ?= $(shell id -un 2> /dev/null || true)
# DVC reads names of files in any script, whatever the locale.
export PYTHONUTF8 := 1

# In parallel, each file's tests in one process and the longest files first; tests/conftest.py says why.
PYTEST = python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: repro lint test test-all system-packages publish audit setup clean clean-scratch torture
# Here and below the command is run as a module, which is this clone's own; $(BIN)/firstsight is that of the clone which
# made $(VENV).
repro: setup
	@python -m firstsight repro $(if $(filter command,$(firstword $(origin JOBS))),--jobs $(JOBS))
	@python -m firstsight table

lint: setup $(TEST_READY)
	@ruff check .
	@ruff format --check .
	@pyrefly check

test: lint
	@$(PYTEST) -m "not slow and not system"

test-all: lint system-packages
	@$(PYTEST)

publish: setup
	@if [ -z "$(REPO)" ]; then echo "error: expected REPO=owner/name, found none"; exit 1; fi
	@python -m firstsight publish $(VARIANT) $(REPO) $(if $(filter 1,$(PUSH)),--push)

system-packages:
	@sh tests/system_packages.sh

# From an unpacked archive there is no git, and DVC has to be told.
setup: $(READY)
	@if [ ! -e .git ]; then dvc config --local core.no_scm true; fi

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: expected Python 3.11 or newer, found $$($(PYTHON) --version 2>&1); set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(TEST_READY): requirements-test.txt | $(READY)
	$(INSTALL) requirements-test.txt
	@touch $@

audit: setup
	$(BIN)/python -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet --disable-pip-version-check pip-audit
	@$(VENV)/audit/bin/pip-audit --path $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

clean:
	rm -rf $(VENV)

clean-scratch: setup
	@python -m firstsight clean-scratch

torture: setup
	@python -m benchmarks.torture
