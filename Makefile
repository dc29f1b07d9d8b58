# Two commands do everything from nothing: `make train` and `make test`. Both may be repeated.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint notebook clean

train: .venv/.examples
	$(BIN)/python -m examples.moonlight.train --preset tiny --output-dir runs/moonlight --resume

# The examples' tests compile much and compute little: XLA's backend optimizes nothing there, which
# halves their time. The library's own tests promise bits, and run as users do.
test: .venv/.test .aot/.tpu
	$(BIN)/python -m pytest -n 2 --ignore=tests/moonlight --ignore=tests/scaling_law
	XLA_FLAGS=--xla_backend_optimization_level=0 $(BIN)/python -m pytest -n 2 tests/moonlight tests/scaling_law

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Takes outputs out of the notebook before it is committed.
notebook: .venv/.test
	$(BIN)/python -m examples.colab.clean

# The stamps are touched last, so an interrupted installation is taken up again.
.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "muon_jax needs Python 3.11 or later; run: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv --clear .venv
	touch $@

.venv/.examples: .venv/.python pyproject.toml
	$(BIN)/python -m pip install -q -e ".[examples]"
	touch $@

.venv/.test: .venv/.python pyproject.toml
	$(BIN)/python -m pip install -q -e ".[test]"
	touch $@

# Compiles for TPUs on any machine. Not in .venv: JAX would look for a TPU whenever it starts.
.aot/.tpu: .venv/.test
	$(BIN)/python -m pip install -q --no-deps --upgrade --target .aot \
	  $$($(BIN)/python -m benchmarks.targets tpu)
	touch $@

clean:
	rm -rf .venv .aot runs
