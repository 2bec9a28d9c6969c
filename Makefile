# `make demo` and `make test` each work alone on a machine with git, make, gcc and Python >= 3.11 with venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
INPUTS := pyproject.toml constraints.txt setup.py CMakeLists.txt $(shell find csrc -type f)
PIP    := $(BIN)/pip install --disable-pip-version-check -q -c constraints.txt

# OpenMP threads that sleep between parallel regions leave the cores to the other runtimes in the process.
export OMP_NUM_THREADS ?= $(shell getconf _NPROCESSORS_ONLN)
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint tables bench sanitize install clean

demo: $(STAMP)
	$(BIN)/amg demo --out demo

# A worker a core, up to four, of one thread each; a file's tests stay together, as they share what they make.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

# Every table of README.md and docs/ from the committed CSVs.
tables: $(STAMP)
	$(BIN)/python benchmarks/tables.py

# Speed of the hot paths; kept in .benchmarks/ and compared with the run before, where there is one.
bench: $(STAMP)
	$(BIN)/pytest benchmarks/speed --benchmark-autosave $(if $(wildcard .benchmarks/*/*.json),--benchmark-compare) $(BENCH_ARGS)

sanitize: $(STAMP)
	$(BIN)/python -P tests/sanitize.py

install: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("amg needs Python >= 3.11, got %d.%d; set PYTHON=" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch first and alone: the project's own resolution then finds its pin already satisfied. triton is the
# version that belongs to it; without a GPU it only serves the tests (interpreter, ahead-of-time compilation).
$(STAMP): $(BIN)/python $(INPUTS)
	$(PIP) torch==2.13.0
	$(PIP) --no-deps triton==3.7.1
	$(PIP) -e '.[demo,test,dev]'
	@$(BIN)/python -c 'from amg.kernels.extension import REASON; print("amg: " + (REASON or "C++ extension built"))'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info amg/_C*.so demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
