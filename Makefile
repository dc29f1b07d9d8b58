# Two commands do everything from nothing: `make train` and `make test`. Both may be repeated.
PYTHON ?= python3
BIN := .venv/bin
# Whose JAX goes into the environment: cpu, cuda12, cuda13 or tpu.
ACCELERATOR ?= cpu
ifneq ($(words $(filter cpu cuda12 cuda13 tpu,$(ACCELERATOR)))$(words $(ACCELERATOR)),11)
$(error ACCELERATOR is "$(ACCELERATOR)", expected cpu, cuda12, cuda13 or tpu: see docs/accelerators.md)
endif
JAX := $(if $(filter-out cpu,$(ACCELERATOR)),"jax[$(ACCELERATOR)]")
# The stamp of an empty environment. One that was made for another accelerator lacks it.
MADE := .venv/.python$(if $(JAX),-$(ACCELERATOR))
# The other end of the range of versions that pyproject.toml names, looked for when it is asked for.
ifneq ($(findstring newest,$(MAKECMDGOALS)),)
NEWEST_PYTHON ?= $(shell .ci/newest-python)
endif
NEWEST_BIN := .venv-newest/bin

.PHONY: train test test-newest test-packaged lint docs notebook clean

train: .venv/.examples
	$(BIN)/python -m examples.moonlight.train --preset tiny --output-dir runs/moonlight --resume

# Tests that promise bits are compiled to the code that users get, the others with flags that save
# time, of those that the installed jaxlib knows. With `loadfile` the tests of a file share the
# programs that they compile; tests/conftest.py has the order of the files.
test: .venv/.test .aot/.tpu
	flags="$$($(BIN)/python -m tests.xla_flags bits)" && \
	  XLA_FLAGS="$$flags" $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m bits
	flags="$$($(BIN)/python -m tests.xla_flags)" && \
	  XLA_FLAGS="$$flags" $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not bits"

# The same for the newest Python that is here, and with it the newest JAX, but for what one stack is
# enough for. The inner make finds the environment of another Python wanting, and makes it anew.
test-newest:
	@test -n "$(NEWEST_PYTHON)"
	@$(MAKE) --no-print-directory .venv-newest/.test NEWEST_PYTHON="$(NEWEST_PYTHON)"
	@$(NEWEST_BIN)/python -c 'import sys, jax; print("Python", sys.version.split()[0], "and jax", jax.__version__)'
	$(NEWEST_BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "bits and not one_stack"
	flags="$$($(NEWEST_BIN)/python -m tests.xla_flags)" && \
	  XLA_FLAGS="$$flags" $(NEWEST_BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not bits and not one_stack"

# The packed library in an environment with nothing else, and the tests that need nothing else.
test-packaged: .venv/.test
	$(BIN)/python -m tests.packaged

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The documentation site, into site/. Warnings are errors.
docs: .venv/.docs
	$(BIN)/python docs/site.py

# Takes outputs out of the notebooks before they are committed.
notebook: .venv/.test
	$(BIN)/python -m examples.colab.clean

# The stamps are touched last, so an interrupted installation is taken up again.
$(MADE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "muon_jax needs Python 3.11 or later; run: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv --clear .venv
	touch $@

.venv/.examples: $(MADE) pyproject.toml
	$(BIN)/python -m pip install -q $(JAX) -e ".[examples]"
	touch $@

.venv/.test: $(MADE) pyproject.toml
	$(BIN)/python -m pip install -q $(JAX) -e ".[test]"
	touch $@

.venv/.docs: $(MADE) pyproject.toml
	$(BIN)/python -m pip install -q $(JAX) -e ".[docs]"
	touch $@

.venv-newest/.$(notdir $(NEWEST_PYTHON)):
	"$(NEWEST_PYTHON)" -m venv --clear .venv-newest
	touch $@

.venv-newest/.test: .venv-newest/.$(notdir $(NEWEST_PYTHON)) pyproject.toml
	$(NEWEST_BIN)/python -m pip install -q -e ".[test-core]"
	touch $@

# Compiles for TPUs on any machine. Not in .venv: JAX would look for a TPU whenever it starts.
.aot/.tpu: .venv/.test
	$(BIN)/python -m pip install -q --no-deps --upgrade --target .aot \
	  $$($(BIN)/python -m benchmarks.targets tpu)
	touch $@

clean:
	rm -rf .venv .venv-newest .aot runs site .cache
