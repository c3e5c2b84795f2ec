# Two commands: `make demo` and `make test`. Both make .venv when it is missing or older than pyproject.toml.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
ARGS ?=

.PHONY: demo test oldest lint bench setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "vtok needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	@echo "installing vtok and its dependencies into $(VENV) (minutes the first time: PyTorch is large)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/vtok demo --out out/demo.png $(ARGS)

# One thread a worker: the tests' models are too small to share cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal $(ARGS)

# The engine at the lower end of the window of transformers; `make test` is at its upper end.
OLDEST := 5.19.0
oldest: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/oldest transformers==$(OLDEST)
	PYTHONPATH=$(VENV)/oldest OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 $(ARGS) \
	  tests/test_contract.py tests/test_engine.py tests/test_undo.py tests/test_prompts.py tests/test_handle.py tests/test_stages.py \
	  tests/test_kv.py tests/test_decoding.py

lint: $(STAMP)
	$(BIN)/python -m ruff check .

bench: $(STAMP)
	$(BIN)/vtok bench --check $(ARGS)

clean:
	rm -rf $(VENV) build dist out *.egg-info
