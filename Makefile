# Two commands for everyone: `make demo` and `make test`. Each sets up what it needs in .venv on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CPU build of torch where pip finds one; set TORCH= to keep a torch that is already there
TORCH ?= torch==2.13.0

.PHONY: demo test lint format wheel clean setup

demo: setup
	$(BIN)/tandem-attn demo

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: setup
	$(BIN)/python -m pip wheel --no-deps -w dist .

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml tools/setup.sh
	bash tools/setup.sh $(PYTHON) $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
