# `make demo` and `make test` need nothing but Python 3.11 or newer; the virtual environment is theirs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OUT ?= runs/demo

.PHONY: demo test test-gpu lint clean

# Waiting threads sleep: on a machine that is busy with something else, spinning ones take the cores from each other.
demo: $(VENV)/installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/hippodrome demo --out $(OUT)

test: $(VENV)/installed-test
	$(BIN)/ruff check hippodrome tests
	$(BIN)/ruff format --check hippodrome tests
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# For a machine with a GPU, run by the Python that holds its torch: `make test-gpu PYTHON=...` needs no installation.
test-gpu:
	$(PYTHON) -m pytest -m gpu

lint: $(VENV)/installed-test
	$(BIN)/ruff format hippodrome tests
	$(BIN)/ruff check --fix hippodrome tests

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
