# make demo and make test do everything themselves, on a machine that has Python 3.11 to 3.13, make,
# git and a package index. The second time they start at once.
#
#   PYTHON      the interpreter to build .venv with      (default: the first that fits)
#   TORCH_ARGS  extra arguments for installing torch, such as an index that has another build
#   ARGS        extra arguments for the command itself, such as ARGS="--minutes 1"

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TORCH  := $(shell sed -n '/^torch==/p' constraints.txt)
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& { command -v "$$p"; break; }; done)
ARGS   ?=

# Allocator settings that hand freed memory back to the system; empty where they do not apply.
TUNED   = env $$($(BIN)/python -c "from shoestring.allocator import tuned_environment as t; \
	print(*(f'{k}={v}' for k, v in t().items()))")

.PHONY: setup demo test test-slow test-triton lint types imports bench-smoke wheel clean
.DEFAULT_GOAL := test

setup: $(STAMP)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed, and none was found." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual\
	 environment; on Debian: apt-get install python3-venv" >&2; exit 1; }

$(STAMP): $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH_ARGS) "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(STAMP)
	@$(TUNED) $(BIN)/python -m shoestring demo $(ARGS)

test: $(STAMP)
	@$(TUNED) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# What takes longer: the examples, groups of processes, more kills and full disks.
test-slow: $(STAMP)
	@$(TUNED) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m slow $(ARGS)

# Kernels in Triton, by its interpreter on the CPU; apart, since Triton takes a gigabyte.
TRITON := $(VENV)/triton
test-triton: $(STAMP)
	@test -d $(TRITON) || $(BIN)/python -m pip install --quiet --no-deps --target $(TRITON) triton==3.9.0
	@env TRITON_INTERPRET=1 PYTHONPATH=$(TRITON) $(BIN)/python -m pytest -n 0 -k triton \
		tests/ops/test_row_triton.py tests/serve/test_attention.py $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(STAMP)
	@$(BIN)/mypy

imports: $(STAMP)
	@$(BIN)/python -m pytest -q tests/test_imports.py

# Every benchmark in its short form: seconds each, only to show that it still runs.
bench-smoke: $(STAMP)
	@for run in benchmarks/*/run.py; do \
		echo "$$run --smoke"; $(TUNED) $(BIN)/python "$$run" --smoke >/dev/null || exit 1; done

wheel: $(STAMP)
	@rm -rf dist && $(BIN)/python -m build --wheel --outdir dist . >/dev/null && ls dist/*.whl

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
