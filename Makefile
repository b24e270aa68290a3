# Each target makes .venv, installs what it needs there, and runs. No step comes before.
# Another interpreter: make PYTHON=python3.13 test. Fewer processes: make JOBS=1 test.

PYTHON ?= python3
JOBS ?= logical

VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: bench bench-cuda bench-tpu clean demo docs help lint test

demo: $(VENV)/.has-examples ## Train on the handwritten digits; results in out/digits
	$(BIN)/python examples/digits.py

test: $(VENV)/.has-test ## Run the tests and the doctests
	$(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=worksteal

# Without the variable, the wrapper of pyright asks a server for newer releases.
lint: export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
lint: $(VENV)/.has-dev ## Check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.has-docs ## Build the documentation into site/
	$(BIN)/mkdocs build --strict

# PyTorch takes part if it is in .venv. A short form: make FLAGS=--quick bench.
bench: $(VENV)/.has-bench ## Measure what constraints cost, beside other libraries
	$(BIN)/python benchmarks/speed.py $(FLAGS)

# JAX for other platforms has environments of its own, so that all else keeps to the CPU.
# No TPU and no GPU is needed: their compilers are enough.
bench-tpu: ## Count what steps do on TPUs, check it, and lower all maps
	$(MAKE) VENV=$(VENV)/tpu $(VENV)/tpu/.has-tpu
	$(VENV)/tpu/bin/python benchmarks/accelerators.py

bench-cuda: ## Count the kernels of steps on an H100; downloads 4.4 GB
	$(MAKE) VENV=$(VENV)/cuda $(VENV)/cuda/.has-cuda
	$(VENV)/cuda/bin/python benchmarks/accelerators.py --platform cuda

clean: ## Remove everything that the other targets make
	rm -rf $(VENV) out site dist .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## Show this text
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# One stamp for each extra of pyproject.toml: a second run installs nothing.
$(VENV)/.has-%: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)
