# make train | compare | bench | gpu | gpu-study | quick | fuzz | test | coverage | lint | site | setup | help. Every
# target but site first makes or repairs the environment (tools/setup_env.sh).

CONFIG ?= configs/shapes/miti_detr.yaml
OUTPUT ?= output/$(basename $(patsubst configs/%,%,$(CONFIG)))
STUDY ?= configs/studies/shapes_6x6.yaml
ARGS ?=
JOBS ?= 2
EXAMPLES ?= 2000

export PYTHON
ENV_PYTHON = "$$(sh tools/setup_env.sh --print-python)"
# Many tests start processes, which would compile every module again if bytecode were not written.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(ENV_PYTHON) -m pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup train compare bench gpu gpu-study quick fuzz test coverage lint site

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 16
	@echo
	@echo "  CONFIG=$(CONFIG)  OUTPUT=$(OUTPUT)"
	@echo "  STUDY=$(STUDY)"
	@echo "  ARGS: KEY VALUE pairs for train and compare, names of runs for bench, pytest options for test"
	@echo "  JOBS=$(JOBS): processes of compare, quick and test; PYTHON: the Python to build .venv with"

setup: ## make or repair the Python environment
	@sh tools/setup_env.sh

train: setup ## train CONFIG into OUTPUT, evaluate, draw curves and detections; resumes if interrupted
	@bash tools/train.sh $(ENV_PYTHON) "$(CONFIG)" "$(OUTPUT)" $(ARGS)

compare: setup ## train the arms of STUDY, JOBS at a time, and write its report; resumes if interrupted
	@$(ENV_PYTHON) -W ignore::FutureWarning -m miti_detr.cli compare --study "$(STUDY)" --jobs $(JOBS) \
		--output "output/compare/$(basename $(notdir $(STUDY)))" $(ARGS)

bench: setup ## measure the runs of benchmarks/runs.yaml into output/bench; skips finished ones
	@$(ENV_PYTHON) -W ignore::FutureWarning -m benchmarks $(ARGS)

gpu: setup ## on a machine with a GPU: run its tests, then measure benchmarks/gpu.yaml into output/gpu
	@$(ENV_PYTHON) -m pytest -q tests/gpu
	@$(ENV_PYTHON) -W ignore::FutureWarning -m benchmarks --runs benchmarks/gpu.yaml --output output/gpu $(ARGS)

gpu-study: STUDY = configs/studies/gpu.yaml
gpu-study: JOBS = 1
gpu-study: compare ## on a machine with a GPU: DETR and Miti-DETR on the photographs of ARGS, ten minutes each

quick: setup ## run the quick tests, in less than a minute
	@$(PYTEST) -m "not slow" $(ARGS)

fuzz: setup ## try EXAMPLES random configs, annotation files, images and studies of each kind
	@MITI_DETR_FUZZ_EXAMPLES=$(EXAMPLES) $(PYTEST) tests/fuzz $(ARGS)

test: setup ## run the whole test suite, or the tests in ARGS
	@$(PYTEST) $(ARGS)

coverage: setup ## the same with line coverage, which must be 90 % or more; slower by a third
	@$(PYTEST) --cov=miti_detr --cov-report=term --cov-fail-under=90

lint: setup ## ruff check, ruff format --check and mypy
	@$(ENV_PYTHON) -m ruff check .
	@$(ENV_PYTHON) -m ruff format --check .
	@$(ENV_PYTHON) -m mypy

site: .venv-site/requirements.txt ## build the documentation into output/site, with packages of its own
	@NO_MKDOCS_2_WARNING=1 .venv-site/bin/mkdocs build --strict --config-file tools/docsite/mkdocs.yml
	@echo "site: output/site/index.html"

.venv-site/requirements.txt: tools/docsite/requirements.txt
	@$${PYTHON:-python3} -m venv --clear .venv-site
	@.venv-site/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@cp $< $@
