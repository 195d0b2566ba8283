# make demo       install into .venv and run the demonstration study (about twelve minutes the first time)
# make test       lint, types and tests: what decides whether a change lands
# make test-all   the same with the slow tests
# make test-gpu   the tests that need a GPU; they skip where torch finds none (CONSTRAINTS= keeps a torch of your own)
# make campaign   thousands of faults in the real commands, each judged (hours; OPTIONS="--minutes 30", see docs/operations.md)
# make docs       build the documentation into site/

PYTHON ?= $(firstword $(foreach p,python3 python3.12 python3.11 python,$(if $(shell $(p) -c \
	'import sys; print(1 if (3, 11) <= sys.version_info[:2] <= (3, 12) else "")' 2>/dev/null),$(p))))
VENV := .venv
BIN := $(VENV)/bin
# Exact versions that were tested together. `make demo CONSTRAINTS=` leaves them out, for a torch of your own.
CONSTRAINTS ?= constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

# The tests of a file share what they made once.
SIDE_BY_SIDE := -n 2 --dist loadfile

export HF_HUB_DISABLE_TELEMETRY = 1
export DO_NOT_TRACK = 1
export PREFECT_SERVER_ANALYTICS_ENABLED = false
# Otherwise pyright asks the network for a newer version of itself.
export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1

.PHONY: demo test test-all test-gpu campaign lint docs clean

demo: $(VENV)/installed
	@$(BIN)/python flows.py demo

test: lint
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-all: lint
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m ""

test-gpu: $(VENV)/installed-test
	@$(BIN)/python -m pytest -m gpu

campaign: $(VENV)/installed-test
	@PYTHONPATH=tests $(BIN)/python -m campaign $(OPTIONS)

lint: $(VENV)/installed-test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/pyright

docs: $(VENV)/installed-docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

$(BIN)/python:
	@$(if $(PYTHON),,echo "Python 3.11 or 3.12 was not found; name one with: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 2)
	@$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "installing into $(VENV): about three minutes and 4 GB ..."
	@$(PIP) --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@echo "installing what the tests need ..."
	@$(PIP) --editable '.[test]'
	@$(PIP) --no-deps dictionary-learning  # only its trainer is compared with; its dependencies are language-model tools
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	@echo "installing what the documentation needs ..."
	@$(PIP) --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) workspace site
