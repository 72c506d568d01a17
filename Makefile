# TORCH=... chooses another torch, TORCH= keeps the one that is there: see tools/setup.sh.
# Two commands for everyone: `make demo` and `make test`. Each sets up what it needs in .venv on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.PHONY: demo test lint format wheel clean setup

demo: setup
	$(BIN)/tandem-attn demo

test: setup
	bash tools/triton_matrix.sh $(VENV)
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
