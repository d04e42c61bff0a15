# The words of this project. `make` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-services test-empaia lint format types imports default-model transfer ci clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WSI := $(BIN)/wsi-mmm
# One compute thread per process: results do not depend on it, and the tests run several model threads of their own.
export OMP_NUM_THREADS ?= 1

# Test files side by side. Each process may hold a model or two: four processes need about 8 GB.
TEST_PROCESSES ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4)))

help:  ## this list
	@grep -E '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/:.*  ## /\t/' | expand -t 16

setup: $(STAMP)  ## the pinned environment in .venv

$(STAMP): pyproject.toml constraints.txt
	@python=; for name in python3.11 python3 python3.12 python3.13; do \
	    if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$name; break; fi; done; \
	  [ -n "$$python" ] || { echo "error: no Python 3.11 or newer in PATH (python3.11, python3)" >&2; exit 1; }; \
	  $(BIN)/python -m pip --version >/dev/null 2>&1 || "$$python" -m venv $(VENV) || \
	    { echo "error: python -m venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "installing into $(VENV) (torch is large: the first time takes minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

demo: setup  ## a synthetic slide from pixels to GeoJSON, in demo/
	@$(WSI) demo --output demo

test: setup  ## the whole suite, slow tests included
	@$(BIN)/python -m pytest -m "not services and not empaia" -n $(TEST_PROCESSES) --dist worksteal

test-fast: setup  ## the suite without the slow tests
	@$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal

test-services: setup  ## tests against a real S3 server and JuiceFS, started when the environment names none
	@deploy/services/with.sh $(BIN)/python -m pytest -m services || [ $$? -eq 75 ]

test-empaia: setup  ## tests with EMPAIA's own validators and command line, installed apart in build/empaia
	@tests/empaia/official/setup.sh && $(BIN)/python -m pytest -m "empaia and not slow" || [ $$? -eq 75 ]

lint: setup  ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: setup  ## let ruff write the format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

types: setup  ## mypy, strict
	@$(BIN)/mypy

imports: setup  ## import-linter: the floors
	@$(BIN)/lint-imports --no-logo

# make default-model DATA=folder    folder: nuclei/dsb2018_stained_nuclei.zip, and slides/ as pipelines/default/slides.csv says
# ... ARGS="--set steps=3"          a few steps of each of its trainings, to see that all of it works
default-model: PY := env -u OMP_NUM_THREADS $(BIN)/python pipelines/default
default-model: TRAIN := env -u OMP_NUM_THREADS $(WSI) train pipelines/default/train.toml
default-model: HEADS := --set steps=300 --set optim.frozen=6 --set augment.stain=0.5 --set data.stain.batch=20 \
  --set data.nuclei.batch=1 --set data.recoloured.batch=1
default-model: setup  ## train the default model anew, into runs/default (hours on two cores; goes on where it stopped)
	@$(PY)/prepare.py --data $(or $(DATA),../shared/data) --out data/default
	@$(TRAIN) $(ARGS)
	@$(TRAIN) --set model.start=runs/default/model --set out=runs/default/refined --set steps=1200 --set optim.rate=1e-3 \
	  --set seed=2 $(ARGS)
	@$(TRAIN) --set model.start=runs/default/refined/model --set out=runs/default/heads --set seed=3 $(HEADS) $(ARGS)
	@$(PY)/relabel.py --model runs/default/heads/model --eager 0.7 --largest 0 --out data/default/found
	@$(TRAIN) --set model.start=runs/default/heads/model --set out=runs/default/slides --set steps=500 --set optim.rate=1e-3 \
	  --set seed=4 --set data.background.labels=data/default/found/labels --set data.background.batch=4 \
	  --set data.nuclei.batch=3 --set data.recoloured.batch=3 $(ARGS)
	@$(PY)/relabel.py --model runs/default/slides/model --out data/default/found-again
	@$(TRAIN) --set model.start=runs/default/slides/model --set out=runs/default/again --set steps=800 --set optim.rate=1e-3 \
	  --set seed=5 --set data.background.labels=data/default/found-again/labels --set data.background.batch=3 \
	  --set data.nuclei.batch=4 --set data.recoloured.batch=4 $(ARGS)
	@$(TRAIN) --set model.start=runs/default/again/model --set out=runs/default/last --set seed=6 $(HEADS) \
	  --set data.background.labels=data/default/found-again/labels $(ARGS)

# make transfer DATA=data ARGS="--times 4 --out runs/longer"
transfer: setup  ## the experiment of docs/transfer.md (an hour or more; goes on where it stopped)
	@nice -n 5 $(BIN)/python pipelines/transfer/run.py --data $(or $(DATA),../shared/data) $(ARGS)

# make bench-geojson ARGS="--objects 1000000" runs tests/benchmarks/bench_geojson.py
bench-%: setup
	@[ -f tests/benchmarks/bench_$*.py ] || { echo "error: no benchmark '$*'; there are:" >&2; \
	  ls tests/benchmarks | sed -nE 's/^bench_(.*)\.py$$/  bench-\1/p' >&2; exit 1; }
	@PYTHONPATH=tests $(BIN)/python tests/benchmarks/bench_$*.py $(ARGS)

ci: setup  ## everything that must hold
	@.ci/run

clean:  ## remove what the words above made, the environment included
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
