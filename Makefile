# Two commands do everything from nothing: `make train` and `make test`. Both may be repeated.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint notebook clean

train: .venv/.examples
	$(BIN)/python -m examples.moonlight.train --preset tiny --output-dir runs/moonlight --resume

# Tests that promise bits run as users do. The others compile much and compute little: XLA optimizes
# nothing there and emits code in the older, quicker way, which takes half their time off. An XLA that
# does not know a flag says so and stops; then leave it out. With `loadfile` the tests of a file share
# the programs that they compile.
test: .venv/.test .aot/.tpu
	$(BIN)/python -m pytest -n 2 tests/bits
	XLA_FLAGS="--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false" \
	  $(BIN)/python -m pytest -n 2 --dist loadfile --ignore=tests/bits

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
