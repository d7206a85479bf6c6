PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
# Two processes that share the demo's work do more than one that computes on every core.
PROCESSES ?= 2
THREADS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < $(PROCESSES) ? 1 : cores / $(PROCESSES))))
# Threads that wait by spinning would take the cores from whatever else runs.
LAUNCH := ACCELERATE_USE_CPU=1 OMP_WAIT_POLICY=passive OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m torch.distributed.run --standalone \
	--nproc-per-node $(PROCESSES)

# Containers often set it; without bytecode each of the many processes here would compile all of torch and diffusers anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint teacher bench clean setup

setup: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'setting up $(VENV): one to three minutes'
	$(BIN)/pip install --disable-pip-version-check --no-compile -e '.[dev]'
	touch $@

demo: $(STAMP)  ## the whole DOLLAR pipeline on moving digits, ending in runs/demo/report.html; resumes where it was
	$(LAUNCH) -m recipes.dollar --config recipes/configs/moving_digits.yaml

test: $(STAMP)  ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

lint: $(STAMP)  ## style, docstrings and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

teacher: $(STAMP)  ## train the embedded VAE and teacher from nothing (about two hours on two cores)
	$(BIN)/python -m recipes.moving_digits.train_teacher

bench: $(STAMP)  ## the digits benchmark: three training seeds, full evaluation
	$(BIN)/python -m benchmarks.digits

clean:  ## remove runs and caches, keep the environment
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
