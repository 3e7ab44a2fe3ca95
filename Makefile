# Every task of Tunemill by name; `make` alone lists them. Recipes only call the command line.

MODEL ?= tiny
TASK ?= stdlib
RUN ?= $(MODEL)-$(TASK)
QUANT ?= Q4_K_M
METHOD ?=
STORE ?= .tunemill/store
SET ?=
ARGS ?=

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TUNEMILL := $(BIN)/tunemill

# SET="learning_rate=1e-4 seed=7" becomes one --set for each word.
RECIPE := --model $(MODEL) --task $(TASK) --run $(RUN) --store $(STORE) \
	$(if $(METHOD),--set method=$(METHOD)) $(foreach pair,$(SET),--set '$(pair)')

.DEFAULT_GOAL := help
.NOTPARALLEL: # stages read what the one before them published
.PHONY: help demo pipeline fetch prepare train merge convert quantize infer evaluate pull \
	install doctor test test-s3 lint format bench bench-gpu clean

##@ Start here
help: ## List every target
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z0-9-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\nVariables: MODEL=%s TASK=%s RUN=%s QUANT=%s STORE=%s METHOD= SET="key=value …"\n' \
		$(MODEL) $(TASK) $(RUN) $(QUANT) $(STORE)

demo: $(INSTALLED) ## Make, fine-tune, quantize and judge a tiny model, from nothing (about 6 minutes)
	$(TUNEMILL) pipeline --model tiny --task stdlib --store $(STORE) --quant F16 --quant Q4_K_M \
		$(if $(METHOD),--set method=$(METHOD) --run tiny-stdlib-$(METHOD)) $(ARGS)

doctor: ## Say what is missing on this machine and how to get it
	@PYTHONPATH=tools $(if $(wildcard $(TUNEMILL)),$(BIN)/python,$(PYTHON)) -m tunemill.doctor

##@ Stages (MODEL, TASK, RUN, QUANT, STORE, SET)
pipeline: $(INSTALLED) ## Run all stages in order, reusing what exists
	$(TUNEMILL) pipeline $(RECIPE) --quant $(QUANT) $(ARGS)

fetch: ## Get the base model at its pinned revision, or make the tiny one
prepare: ## Read, clean and split the task's data
train: ## Fine-tune: METHOD=lora, qlora or full
merge: ## Fold the adapter into the base weights
convert: ## Make the F16 GGUF and compare its token ids with the tokenizer's
quantize: ## Quantize to QUANT, on the machine that will run it
infer: ## Classify or generate over the held-out texts
evaluate: ## Judge the predictions: report.html and report.json

fetch prepare train merge convert: $(INSTALLED)
	$(TUNEMILL) $@ $(RECIPE) $(ARGS)

quantize infer evaluate: $(INSTALLED)
	$(TUNEMILL) $@ $(RECIPE) --set quant=$(QUANT) $(ARGS)

pull: $(INSTALLED) ## Fetch the finished GGUF of RUN and QUANT, verified, into models/
	$(TUNEMILL) store pull $(RUN)/gguf-$(shell echo $(QUANT) | tr A-Z a-z) \
		models/$(RUN)-$(QUANT) --store $(STORE)

##@ Development
install: $(INSTALLED) ## Make the virtual environment with everything in it

$(INSTALLED): pyproject.toml tools/tunemill/gguf/source.py
	@$(PYTHON) -c 'import sys; sys.exit("Tunemill needs Python 3.11 or newer: set PYTHON=python3.x" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[all,test]'
	$(BIN)/python -m tunemill.gguf.source
	touch $@

test: $(INSTALLED) ## Run the tests that need nothing but pip
	$(BIN)/pytest -m 'not s3' $(ARGS)

test-s3: $(INSTALLED) ## Run the tests that need a real S3 server (root on Debian)
	$(BIN)/python tests/s3/run.py $(BIN)/pytest -m s3 $(ARGS)

lint: $(INSTALLED) ## Check style, types and architecture
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck .ci/run tests/s3/*.sh

format: $(INSTALLED) ## Rewrite the sources in the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(INSTALLED) ## Measure merge, transfers and start-up, side by side with their peers
	$(BIN)/python tests/bench/bench_startup.py
	$(BIN)/python tests/bench/bench_merge.py
	$(BIN)/python tests/bench/bench_transfer.py

bench-gpu: ## Measure training on this machine's GPU (needs PyTorch, no installation, no network)
	PYTHONPATH=tools $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tests/bench/bench_gpu.py

clean: ## Remove the virtual environment and caches; the store stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
