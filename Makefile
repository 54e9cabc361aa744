# make train | compare | bench | test | lint | setup | help. Every target makes or repairs the environment first
# (tools/setup_env.sh).

CONFIG ?= configs/shapes/miti_detr.yaml
OUTPUT ?= output/$(basename $(patsubst configs/%,%,$(CONFIG)))
STUDY ?= configs/studies/shapes_6x6.yaml
ARGS ?=
JOBS ?= 2

export PYTHON
ENV_PYTHON = "$$(bash tools/setup_env.sh --print-python)"
COVERAGE = --cov=miti_detr --cov-report=term --cov-fail-under=90

.DEFAULT_GOAL := help
.PHONY: help setup train compare bench test lint

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16
	@echo
	@echo "  CONFIG=$(CONFIG)  OUTPUT=$(OUTPUT)"
	@echo "  STUDY=$(STUDY)"
	@echo "  ARGS: KEY VALUE pairs for make train and compare, pytest options for make test"
	@echo "  JOBS=$(JOBS): processes of make compare and test; PYTHON: the Python to build .venv with"

setup: ## make or repair the Python environment
	@bash tools/setup_env.sh

train: setup ## train CONFIG into OUTPUT, evaluate, draw curves and detections; again: resume
	@bash tools/train.sh $(ENV_PYTHON) "$(CONFIG)" "$(OUTPUT)" $(ARGS)

compare: setup ## train the arms of STUDY, JOBS at a time, and write its report; again: resume
	@$(ENV_PYTHON) -W ignore::FutureWarning -m miti_detr.cli compare --study "$(STUDY)" --jobs $(JOBS) \
		--output "output/compare/$(basename $(notdir $(STUDY)))" $(ARGS)

bench: setup ## measure all that docs/benchmarks.md says, into output/bench; again: go on
	@bash tools/bench.sh $(ENV_PYTHON)

test: setup ## run the tests; the whole suite with line coverage
	@OMP_NUM_THREADS=1 $(ENV_PYTHON) -m pytest -n $(JOBS) $(if $(strip $(ARGS)),$(ARGS),$(COVERAGE))

lint: setup ## ruff check, ruff format --check and mypy
	@$(ENV_PYTHON) -m ruff check .
	@$(ENV_PYTHON) -m ruff format --check .
	@$(ENV_PYTHON) -m mypy
