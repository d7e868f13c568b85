# `make demo` and `make test` set everything up themselves. GPU=1 installs CUDA builds instead of CPU ones. QUANTISE=1
# adds what the step `quantise` needs, where its method is not none.

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name))))
HARDWARE := $(if $(GPU),cuda,cpu)
# Files of tests run side by side, each as a whole.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
READY := .venv/.ready-$(HARDWARE)
READY_TO_QUANTISE := .venv/.ready-quantise

# Stages are started by name, from the environment they were installed in.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# No tool reports to its makers: the first is DVC's switch, the other one Prefect's, MLflow's and vLLM's.
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := 1

.PHONY: help setup demo test test-fast test-matrix test-oldest format lock ui trials soak audit bench-search families

help: ## Show these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1|\2/' | column -t -s '|'

setup: $(READY) $(if $(QUANTISE),$(READY_TO_QUANTISE)) ## Create .venv with the locked versions

$(READY): requirements/$(HARDWARE).txt requirements/install pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "Python 3.11, 3.12 or 3.13 is needed, found $$($(PYTHON) --version); name one: make setup PYTHON=python3.11" >&2; exit 1; }
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	requirements/install $(HARDWARE)
	@rm -f .venv/.ready-* && touch $@

$(READY_TO_QUANTISE): $(READY) requirements/quantise.txt
	requirements/install $(HARDWARE) quantise
	@touch $@

demo: setup ## Compress the model of params.yaml and show what came out
	finercut run

test: setup ## Check style, audit the lock and run the tests; the last lines say so where the lock could not be audited
	ruff check .
	requirements/audit $(HARDWARE) || test $$? -eq 3
	pytest --durations=20 -m "not matrix" $(PARALLEL)
	@test ! -e .venv/.not-audited || cat .venv/.not-audited

test-fast: setup ## Check style and run what needs no server, no engine, no training and no whole pipeline: minutes
	ruff check .
	pytest --durations=10 -m "not slow and not matrix" $(PARALLEL)

test-matrix: setup ## Run what `make test` leaves out, for another case says as much: more families, kills and scheduled runs
	pytest --durations=10 -m matrix $(PARALLEL)

test-oldest: setup ## Test checkpoints and families with the lowest transformers that pyproject.toml admits
	python -m pip install --quiet --upgrade --no-deps --target .venv/oldest "transformers==5.16.1" "huggingface-hub>=1.5,<2"
	PYTHONPATH=.venv/oldest:$(CURDIR) pytest tests/test_families.py tests/test_probe.py tests/test_modeling.py -k "not vllm"

trials: setup ## Kill every stage many times and show what came of it (half an hour)
	PYTHONPATH=tests python trials/kill_trials.py

soak: setup ## Let a schedule start 24 runs and show what each left behind (an hour)
	PYTHONPATH=tests python trials/soak.py

audit: setup ## Look the locked versions up among known vulnerabilities; fails where there are no advisories to be had
	requirements/audit $(HARDWARE)

format: setup ## Put the code into the house format
	ruff check --fix .
	ruff format .

lock: setup ## Resolve the requirements anew, for CPU and CUDA
	uv pip compile pyproject.toml --extra pipeline --extra servers --extra cpu --extra dev --python-version 3.11 --upgrade \
		--no-emit-find-links --no-emit-index-url --no-annotate -o requirements/cpu.txt
	uv pip compile pyproject.toml --extra pipeline --extra servers --extra cuda --extra dev --python-version 3.11 --upgrade \
		--no-emit-find-links --no-emit-index-url --no-annotate -o requirements/cuda.txt

ui: setup ## Browse the recorded runs at http://127.0.0.1:5000
	mlflow ui

families: setup ## Try every model type of the installed transformers and write docs/families-table.md (minutes)
	rm -f docs/families-table.md
	python benchmarks/families.py docs/families-table.md

bench-search: setup ## Compare the search's modes with the authors' way and brute force
	python benchmarks/search.py
