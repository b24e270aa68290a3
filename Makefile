# Each target makes .venv, installs what it needs there, and runs. No step comes before.
# Another interpreter: make PYTHON=python3.13 test. Fewer processes: make JOBS=1 test.

PYTHON ?= python3
JOBS ?= logical
# The versions that are supported, oldest first.
PYTHONS := 3.11 3.12 3.13

VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: bench bench-cuda bench-gpu bench-tpu browse clean demo docs help lint
.PHONY: test test-all test-lowest test-newest $(PYTHONS:%=test-%)

demo: $(VENV)/.has-examples ## Train on the handwritten digits; results in out/digits
	$(BIN)/python examples/digits.py

test: $(VENV)/.has-test ## Run the tests and the doctests
	$(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=worksteal

# Other interpreters, and other versions of what eqxreg needs, have environments of their
# own.
test-all: ## Run them on each Python that is there, and test-lowest
	$(MAKE) --no-print-directory --keep-going \
		test $(patsubst %,test-%,$(filter-out $(DEFAULT),$(PYTHONS)) lowest)

test-newest: ## Run them on the newest Python, if that is another
	$(if $(filter $(DEFAULT),$(NEWEST)),\
		@echo "Python $(DEFAULT) is the newest here.",\
		$(MAKE) --no-print-directory test-$(NEWEST))

$(PYTHONS:%=test-%): test-%:
	$(if $(call python,$*),\
		$(MAKE) --no-print-directory PYTHON=$(call python,$*) VENV=$(VENV)/$* test,\
		@echo "Not tested on Python $*, which is neither on the path nor in pyenv.")

test-lowest: ## Run them with the oldest JAX and Equinox that are supported
	PIP_CONSTRAINT=.github/lowest-versions.txt \
		$(MAKE) --no-print-directory VENV=$(VENV)/lowest test

# The interpreter of a version, or nothing. What is on the path may be a shim of pyenv,
# which runs only if that version is selected, or have no `venv`.
python = $(firstword $(shell \
	for python in python$1 "$$(pyenv root 2>/dev/null)"/versions/$1.*/bin/python; do \
		"$$python" -c 'import ensurepip, venv' 2>/dev/null && echo "$$python"; \
	done))
DEFAULT = $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
THERE = $(foreach version,$(PYTHONS),$(if $(call python,$(version)),$(version)))
NEWEST = $(shell printf '%s\n' $(DEFAULT) $(THERE) | sort -V | tail -n 1)

# Without the variable, the wrapper of pyright asks a server for newer releases.
lint: export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
lint: $(VENV)/.has-dev ## Check style, formatting, imports and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.has-docs ## Build the documentation into site/
	$(BIN)/mkdocs build --strict

# The browser is on the path: `apt-get install chromium` in Debian.
browse: $(VENV)/.has-browser docs ## Open each page of site/ in Chromium, without a network
	$(BIN)/python -m pytest docs/_tests

# PyTorch takes part if it is in .venv. A short form: make FLAGS=--quick bench.
bench: $(VENV)/.has-bench ## Measure what constraints cost, beside other libraries
	$(BIN)/python benchmarks/speed.py $(FLAGS)

# JAX for other platforms has environments of its own, so that all else keeps to the CPU.
# No TPU and no GPU is needed: their compilers are enough.
bench-tpu: ## Count what steps do on TPUs, check it, and lower all maps
	$(MAKE) VENV=$(VENV)/tpu $(VENV)/tpu/.has-tpu
	$(VENV)/tpu/bin/python benchmarks/accelerators.py

# On the machine's own Python, whose JAX knows its GPU. Nothing is installed.
bench-gpu: ## Check and time maps, wrappers and steps on this machine's GPU
	$(PYTHON) benchmarks/gpu.py $(FLAGS)

bench-cuda: ## Count the kernels of steps on an H100; downloads 4.4 GB
	$(MAKE) VENV=$(VENV)/cuda $(VENV)/cuda/.has-cuda
	$(VENV)/cuda/bin/python benchmarks/accelerators.py --platform cuda

clean: ## Remove everything that the other targets make
	rm -rf $(VENV) out site dist .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## Show this text
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# One stamp for each extra of pyproject.toml: a second run installs nothing.
$(VENV)/.has-%: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)
