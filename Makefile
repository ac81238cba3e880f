# The two commands of the README, and what maintainers use. Each sets up what it needs in .venv, once.
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
# What pytest has rewritten is kept for the next run, whatever the environment says: 5 s of a start.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --no-loadscope-reorder

.PHONY: demo test test-slow test-browser lint format docs bench evaluate clean
.DEFAULT_GOAL := help

help:  ## say what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.ready  ## draw the contact sheet with the bundled model (outputs/demo)
	@$(BIN)/imprompt demo -o outputs/demo

test: $(VENV)/.ready-dev  ## run all tests but the slow and the browser's, JOBS of them at a time
	@OMP_NUM_THREADS=1 $(PYTEST) -m "not slow" --ignore=tests/browser

test-slow: $(VENV)/.ready-dev  ## run the tests that start clusters, several processes or a compiler
	@OMP_NUM_THREADS=1 $(PYTEST) -m slow --ignore=tests/browser

test-browser: $(VENV)/.ready-dev  ## test the page in Chromium; screenshots go to outputs/browser
	@command -v chromium chromium-browser google-chrome >/dev/null || \
		{ echo "Chromium is needed; on Debian: apt-get install chromium" >&2; exit 1; }
	@[ -d $(VENV)/axe ] || npm install --silent --no-save --prefix $(VENV)/axe axe-core@4
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser

lint: $(VENV)/.ready-dev  ## style, types, complexity, who may import whom, and that the docs build
	@$(BIN)/ruff check src tests recipes benchmarks docs
	@$(BIN)/ruff format --check src tests recipes benchmarks docs
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache | tail -n 4
	@$(BIN)/python .ci/complexity src
	@$(BIN)/mkdocs build --strict --quiet

docs: $(VENV)/.ready-dev  ## build the documentation into build/docs
	@$(BIN)/mkdocs build --strict

format: $(VENV)/.ready-dev  ## put the style right
	@$(BIN)/ruff check --fix src tests recipes benchmarks
	@$(BIN)/ruff format src tests recipes benchmarks

bench: $(VENV)/.ready-dev  ## measure speed, as ratios within one run
	@for script in benchmarks/*.py; do $(BIN)/python $$script; done

evaluate: $(VENV)/.ready  ## measure the bundled model on held-out pictures
	@$(BIN)/imprompt evaluate

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "imprompt needs Python 3.11 or newer; say PYTHON=python3.12, for instance" >&2; exit 1; }
	@echo "making $(VENV)" >&2
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing torch, diffusers and transformers into $(VENV) (a minute or two, once)" >&2
	@$(PIP) install -c constraints.txt -e '.[control]'
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@echo "installing the tools for tests into $(VENV)" >&2
	@$(PIP) install -c constraints.txt -e '.[dev,docs,control,recipe,face,lora,kolors,serve,evaluate,ray]'
	@touch $@

clean:  ## remove the environment and what was drawn
	rm -rf $(VENV) outputs
