# make quickstart   the main job: improve a 135M model over three rounds of iterative DPO, on a CPU, in minutes
# make test         the tests
# make lint         ruff, mypy, the import contract, hadolint
# make lock         constraints/ from .venv, after the tests passed with it
#
# Each makes what it needs: .venv with uv, then the install, in the versions of constraints/. EXTRA=gpu or EXTRA=cpu overrides what the machine suggests.

PYTHON ?= python3
EXTRA ?= $(if $(shell command -v nvidia-smi 2>/dev/null),gpu,cpu)
BIN := .venv/bin
INSTALLED := .venv/.installed-$(EXTRA)
ARGS ?=

.PHONY: install quickstart test lint format lock clean

install: $(INSTALLED)

quickstart: $(INSTALLED)
	$(BIN)/iterdpo quickstart $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(INSTALLED)
	tools/lock

clean:
	rm -rf .venv

$(INSTALLED): pyproject.toml tools/install constraints/$(EXTRA).txt
	PYTHON="$(PYTHON)" EXTRA="$(EXTRA)" tools/install
	touch $@
