# Each target makes .venv, installs what it needs there, and runs. No step comes before.
# Another interpreter: make PYTHON=python3.13 test. Fewer processes: make JOBS=1 test.

PYTHON ?= python3
JOBS ?= logical

VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: clean demo docs help lint test

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

clean: ## Remove everything that the other targets make
	rm -rf $(VENV) out site dist .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## Show this text
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# One stamp for each extra of pyproject.toml: a second run installs nothing.
$(VENV)/.has-%: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)
