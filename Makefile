# One verb does all that it needs, from a bare checkout with Python 3.11+ and pip: `make demo`, `make test`.

PYTHON ?= python3
# One worker a core, each with one thread: twice as fast as one worker with all of them.
PYTEST_FLAGS ?= --numprocesses=auto --maxprocesses=8 --dist=worksteal
BENCH ?= decode
LOWEST := transformers-5.16.0

BIN := .venv/bin
VENV := .venv/.ready
COMPAT := .compat/$(LOWEST)
KVIKIO := .kvikio

# The checkout root stays off sys.path: `kernels/` would shadow the Hugging Face package of that name.
export PYTHONSAFEPATH := 1
export KVTIER_HYPOTHESIS_PROFILE ?= ci
unexport PYTHONPATH

.PHONY: demo test lint unit nightly compat bench clean
.DELETE_ON_ERROR:

demo: $(VENV)
	$(BIN)/kvtier demo

test: lint unit compat

lint: $(VENV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests/typing
	$(BIN)/lint-imports --no-logo

unit compat: export OMP_NUM_THREADS ?= 1

unit: $(VENV) $(KVIKIO)/.ready
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_FLAGS)

# Many more cases of every law, and the tests that are marked slow.
nightly: $(VENV) $(KVIKIO)/.ready
	KVTIER_HYPOTHESIS_PROFILE=nightly OMP_NUM_THREADS=1 $(BIN)/python -m pytest --timeout=7200 -o faulthandler_timeout=7000 $(PYTEST_FLAGS)

# The integration again, with the oldest transformers that is supported in front of the newest.
compat: $(VENV) $(COMPAT)/.ready
	PYTHONPATH=$(CURDIR)/$(COMPAT) $(BIN)/python -m pytest $(PYTEST_FLAGS) tests/integrations/hf

bench: $(VENV)
	$(BIN)/python benchmarks/run.py $(BENCH)

$(VENV): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvtier needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

$(COMPAT)/.ready: $(VENV) tests/lowest-transformers.txt
	rm -rf $(COMPAT)
	$(BIN)/python -m pip install --quiet --no-deps --target $(COMPAT) -r tests/lowest-transformers.txt
	@touch $@

# The real kvikio, for the tests of its engine, which run in a process of their own; without it they are skipped.
$(KVIKIO)/.ready: $(VENV) tests/kvikio.txt
	rm -rf $(KVIKIO)
	@if $(BIN)/python -m pip install --quiet --no-deps --target $(KVIKIO) -r tests/kvikio.txt; then touch $@; \
	else rm -rf $(KVIKIO); echo "kvikio cannot be installed here: the tests of its engine are skipped"; fi

clean:
	rm -rf .venv .compat .kvikio build dist .coverage* htmlcov *.egg-info
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
