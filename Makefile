# Everything runs from .venv, which `make setup` prepares; PYTHON chooses the interpreter it is made with (3.11+).
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
RUN ?= runs/quickstart
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
COVERED ?= tests
ROOMS ?= models pipeline callbacks
DEFAULT := -n auto --dist loadfile --no-loadscope-reorder -m "not slow and not gpu and not slurm"

.PHONY: demo help rehearse status setup test unit test-slow test-gpu test-slurm verify test-oldest coverage lint docs clean

##@ Run

demo: setup  ## the quickstart, offline: teacher, distilled student, pruned, recovered, 4 bits, exports, report
	@echo "==> running the quickstart: about 8 minutes on 2 cores; results in runs/quickstart"
	$(BIN)/python train.py

help:  ## this page
	@awk 'BEGIN { FS = ":.*##" } \
		/^##@ / { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+:.*##/ { printf "  make %-12s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Examples (after make setup; python train.py --help tells the rest)"
	@echo "  $(BIN)/python train.py dry_run=true"
	@echo "  $(BIN)/python train.py +experiment=demo/prune_recover"
	@echo "  $(BIN)/python train.py +experiment=quantize_only model.path=FOLDER data.train=TEXT quantizer=gptq scheme=w4a16_g128"

rehearse: setup  ## the flagship's chain in small on a throw-away Slurm of this machine: submitted, preempted, finished
	$(BIN)/python -m tests.slurm.rehearse runs/rehearsal

status: setup  ## what has become of a run: make status RUN=FOLDER
	@$(BIN)/python train.py status run_dir=$(RUN)

##@ Prepare

setup: $(VENV)/ready  ## make .venv with the pinned dependencies (PYTHON=python3.12 chooses the interpreter)

$(VENV)/ready: constraints.txt pyproject.toml
	@echo "==> preparing $(VENV): PyTorch and friends, some minutes the first time"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:  ## delete .venv, runs/, and what the tools have cached
	rm -rf $(VENV) $(OLDEST) runs build site htmlcov .coverage *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

##@ Check

test: lint unit  ## style, types, layers and the default tests: what CI runs

unit: setup  ## the default tests alone
	@echo "==> running the tests"
	$(PYTEST) $(DEFAULT)

test-slow: setup  ## the tests that take minutes each
	$(PYTEST) -m "slow and not gpu and not slurm"

test-gpu: setup  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m "gpu"

test-slurm: setup  ## on a throw-away Slurm with two pretended nodes (Debian: slurmctld slurmd slurm-client munge)
	$(BIN)/python -m pytest -m "slurm"

verify: setup  ## every stage that trains under every strategy: what two ranks learn is what one process learns
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.parity

test-oldest: $(OLDEST)/ready  ## a short test on the lowest versions that pyproject.toml allows, in an environment of their own
	@echo "==> running a short test on the oldest allowed versions: about 4 minutes on 2 cores"
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -W ignore -k "not two_ranks and not zero and not sharded" \
		tests/test_load.py tests/test_student.py tests/data/test_bounded.py tests/training/test_training.py

$(OLDEST)/ready: pyproject.toml
	@echo "==> preparing $(OLDEST): the lower bounds of pyproject.toml, some minutes the first time"
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct --editable '.[dev]'
	@touch $@

coverage: setup  ## the default tests, and which lines they run, stages' own processes aside (htmlcov/index.html)
	@echo "==> running $(COVERED) with coverage"
	$(PYTEST) $(DEFAULT) $(addprefix --cov=,$(ROOMS)) --cov-report=html --cov-report=term:skip-covered $(COVERED)

lint: setup  ## style (ruff), types (mypy), layers (import-linter)
	@echo "==> checking style, types and layers"
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

##@ Document

docs: setup  ## the documentation in site/, built strictly: a broken link is an error
	$(BIN)/mkdocs build --strict
