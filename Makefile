# `make demo` and `make test` set everything up in .venv. Another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STORE ?= artifacts

.PHONY: help setup demo test fast lint format clean

help:
	@echo "make demo    build the bundled tiny model on the CPU and make a picture from a prompt"
	@echo "make test    all that CI runs: format, lint, types, imports, every test"
	@echo "make fast    the same without the tests that compile"
	@echo "make format  format the code"
	@echo "make clean   remove .venv and caches (artifacts stay)"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml requirements/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt -e ".[dev]"
	@touch $@

PROMPT ?= a large red circle on the left and a small blue star on the right, under a starry night sky

demo: setup
	$(BIN)/sdxl-run --engine "$$($(BIN)/sdxl-build torch --model tiny --gpu cpu --artifacts $(STORE))" \
	  --prompt "$(PROMPT)" --steps 20 --seed 7 --out demo.png

# Two workers: most tests wait for a compiler or keep one core busy. A file's tests share what they build.
# One thread each: four on two cores spend more than half of their time in waiting for each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

fast: lint
	$(BIN)/python -m pytest -m "not slow"

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
