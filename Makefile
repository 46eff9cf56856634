# make demo, make test and make lint each set up what they need, and can be repeated.
VENV ?= .venv
export VENV
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: help setup demo test test-fast test-slow controlplane lint format lock build clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

setup:  ## the virtual environment with torch, verl and this project
	@scripts/setup.sh

demo: setup  ## two GRPO steps of stock verl on this CPU, every response token traced, results collected and shown
	@$(BIN)/python scripts/demo.py

test: setup .controlplane-if-go test-fast test-slow  ## every test, with real verl and a real control plane (minutes)

test-fast: setup  ## the tests that need no verl run, side by side on all cores (a minute)
	@$(PYTEST) -n auto -m "not slow"

test-slow: setup  ## real verl, real rank processes and a real control plane, one after the other
	@$(PYTEST) -m slow

controlplane: setup  ## etcd, Kubernetes' control plane, Helm and CRDs for tests/cluster, once (minutes; needs Go 1.26)
	@$(BIN)/python scripts/controlplane.py

.PHONY: .controlplane-if-go
.controlplane-if-go: setup
	@$(BIN)/python scripts/controlplane.py --optional >/dev/null

lint: setup  ## ruff, mypy --strict, import directions, shell syntax
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@bash -n scripts/setup.sh .ci/run

format: setup  ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

UV = VIRTUAL_ENV=$(VENV) $$(command -v uv || echo $(BIN)/uv)

lock: setup  ## resolve constraints.txt and constraints-image.txt anew from pyproject.toml and the .in files
	@$(UV) pip compile --quiet --universal --python-version 3.11 \
	    --all-extras --constraint constraints.in --no-header --no-annotate pyproject.toml --output-file constraints.txt
	@$(UV) pip compile --quiet --python-version 3.12 --python-platform x86_64-manylinux_2_28 --extra trainer --extra wandb \
	    --extra store --no-header --no-annotate constraints-image.in pyproject.toml --output-file constraints-image.txt

build: setup  ## the wheel and the source distribution, in dist/
	@$(BIN)/python -m hatchling build

clean:  ## delete the demo's output and the tools' caches (not the environment, not runs/)
	@rm -rf .demo dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
