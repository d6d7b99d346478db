# Everything runs from .venv, which `make setup` prepares; PYTHON chooses the interpreter it is made with (3.11+).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test setup lint test-slow test-slurm clean

demo: setup  ## run the quickstart: corpus, teacher, student, control, cut, healed, 4 bits, exports, report
	@echo "==> running the quickstart: about 8 minutes on 2 cores; results in runs/quickstart"
	$(BIN)/python train.py

test: setup lint  ## what CI runs
	@echo "==> running the tests"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow and not gpu and not slurm"

test-slow: setup
	$(BIN)/python -m pytest -m "slow"

test-slurm: setup  ## on a throw-away Slurm with two pretended nodes (Debian: slurmctld slurmd slurm-client munge)
	$(BIN)/python -m pytest -m "slurm"

lint: setup
	@echo "==> checking style, types and layers"
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

setup: $(VENV)/ready  ## prepare .venv with the pinned dependencies

$(VENV)/ready: constraints.txt pyproject.toml
	@echo "==> preparing $(VENV): PyTorch and friends, some minutes the first time"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
