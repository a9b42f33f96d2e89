# Everything a fresh clone needs: `make demo` shows what EightGig does, `make test` and `make check` keep it so.
# The first call creates and fills .venv (minutes); later calls find it standing (no time at all).

SHELL := /bin/bash
VENV := .venv
FILLED := $(VENV)/.filled
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test check format docs

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' Makefile

demo: $(FILLED) ## fine-tune the small model that ships in the package, on this machine, in minutes
	$(BIN)/eightgig demo

test: $(FILLED) ## all tests that need no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: $(FILLED) docs ## format, lint, types, who may import whom, documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(FILLED) ## put the code into the one format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(FILLED) ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The stamp is written last, so an installation that was interrupted starts again.
$(FILLED): pyproject.toml constraints.txt scripts/set_up.sh scripts/install_torch.sh
	scripts/set_up.sh $(VENV)
	@touch $@
