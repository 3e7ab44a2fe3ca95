# Every task of Tunemill by name; `make` alone lists them. Recipes only call the command line.

WHERE ?= local
MODEL ?= tiny
TASK ?= stdlib
RUN ?= $(MODEL)-$(TASK)
QUANT ?= Q4_K_M
SIZES ?= 0,100,300,1000,all
METHOD ?=
SET ?=
ARGS ?=

TARGETS ?= default
TAG ?= $(shell sed -n 's/^TAG=//p' compose/.env)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TUNEMILL := $(BIN)/tunemill
SERVER := $(VENV)/.server
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# What runs a stage and the pipeline, what it needs first, and how this machine sees the same store.
ifeq ($(WHERE),local)
STORE ?= .tunemill/store
STAGE := $(TUNEMILL)
PIPELINE := $(TUNEMILL) pipeline
NEEDED := $(INSTALLED)
else ifeq ($(WHERE),compose)
STORE ?= s3://tunemill
STAGE := MAKE_PID=$$PPID compose/run.sh
PIPELINE := MAKE_PID=$$PPID compose/pipeline.sh
ON_HOST := compose/host.sh
else ifeq ($(WHERE),k8s)
# The store of cluster.yaml; another address for it, as this machine reaches it, is STORE and AWS_ENDPOINT_URL_S3.
STORE ?= $(or $(shell sed -n 's/^  url: *"\{0,1\}\([^" ]*\).*/\1/p' $(or $(TUNEMILL_CLUSTER),cluster.yaml) 2>/dev/null),s3://tunemill)
STAGE := $(TUNEMILL) submit
PIPELINE := $(TUNEMILL) submit pipeline
NEEDED := $(INSTALLED)
else
$(error WHERE=$(WHERE) is not known: local (the default), compose or k8s)
endif

# SET="learning_rate=1e-4 seed=7" becomes one --set for each word.
RECIPE := --model $(MODEL) --task $(TASK) --run $(RUN) --store $(STORE) \
	$(if $(METHOD),--set method=$(METHOD)) $(foreach pair,$(SET),--set '$(pair)')

.DEFAULT_GOAL := help
.NOTPARALLEL: # stages read what the one before them published
.PHONY: help demo pipeline fetch prepare train merge convert imatrix quantize infer evaluate pull sweep serve \
	up down images lock install doctor test test-s3 test-images lint format bench bench-infer bench-gpu clean

##@ Start here
help: ## List every target
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z0-9-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\nVariables: WHERE=%s MODEL=%s TASK=%s RUN=%s QUANT=%s STORE=%s METHOD= SET="key=value …"\n' \
		$(WHERE) $(MODEL) $(TASK) $(RUN) $(QUANT) $(STORE)

demo: $(NEEDED) ## Make, fine-tune, quantize and judge a tiny model, from nothing (about 6 minutes)
	$(PIPELINE) --model tiny --task stdlib --store $(STORE) --quant F16 --quant Q4_K_M \
		$(if $(METHOD),--set method=$(METHOD) --run tiny-stdlib-$(METHOD)) $(ARGS)

doctor: ## Say what is missing on this machine and how to get it
	@PYTHONPATH=tools $(if $(wildcard $(TUNEMILL)),$(BIN)/python,$(PYTHON)) -m tunemill.doctor

##@ Stages (WHERE=local, compose or k8s; MODEL, TASK, RUN, QUANT, STORE, SET)
pipeline: $(NEEDED) ## Run all stages in order, reusing what exists
	$(PIPELINE) $(RECIPE) --quant $(QUANT) $(ARGS)

fetch: ## Get the base model at its pinned revision, or make the tiny one
prepare: ## Read, clean and split the task's data
train: ## Fine-tune: METHOD=lora, qlora or full
merge: ## Fold the adapter into the base weights
convert: ## Make the F16 GGUF and compare its token ids with the tokenizer's
imatrix: ## Measure on training prompts what matters in the model, for SET=imatrix=true
quantize: ## Quantize to QUANT, on the machine that will run it
infer: ## Classify or generate over the held-out texts
evaluate: ## Judge the predictions: report.html and report.json

fetch prepare train merge convert imatrix: $(NEEDED)
	$(STAGE) $@ $(RECIPE) $(ARGS)

quantize infer evaluate: $(NEEDED)
	$(STAGE) $@ $(RECIPE) --set quant=$(QUANT) $(ARGS)

pull: $(INSTALLED) ## Fetch the finished GGUF of RUN and QUANT, verified, and say how to run it
	$(ON_HOST) $(TUNEMILL) pull $(RECIPE) --quant $(QUANT) $(ARGS)

sweep: $(INSTALLED) ## The learning curve of RUN and QUANT on this machine, over SIZES of the train split
	$(ON_HOST) $(TUNEMILL) sweep $(RECIPE) --quant $(QUANT) --train-sizes $(SIZES) $(ARGS)

serve: $(SERVER) ## Serve the GGUF of RUN and QUANT to OpenAI's clients, on this machine alone
	$(ON_HOST) $(TUNEMILL) serve $(RUN)/gguf-$(shell echo $(QUANT) | tr A-Z a-z) --store $(STORE) $(ARGS)

##@ The lab in containers (GPU=1, STORE_ENDPOINT, STORE_PORT, REGISTRY, TAG)
up: ## Start an S3 server for the stages, with keys of its own, and prove that it is fit
	compose/up.sh

down: ## Stop it; what is stored stays, unless ARGS=--volumes
	compose/down.sh $(ARGS)

images: ## Build the images: TARGETS=cuda for NVIDIA GPUs, "store infer" for some
	TAG=$(TAG) REVISION=$$(git rev-parse HEAD) SOURCE=$$(git config --get remote.origin.url || echo unknown) \
		docker buildx bake -f images/docker-bake.hcl $(TARGETS)

lock: $(INSTALLED) ## Resolve the images' packages anew, after a change in pyproject.toml
	UV=$(BIN)/uv images/locks/lock.sh

##@ Development
install: $(INSTALLED) ## Make the virtual environment with everything in it

$(INSTALLED): pyproject.toml tools/tunemill/gguf/source.py
	@$(PYTHON) -c 'import sys; sys.exit("Tunemill needs Python 3.11 or newer: set PYTHON=python3.x" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[all,test]'
	$(BIN)/python -m tunemill.gguf.source
	touch $@

$(SERVER): $(INSTALLED) tools/tunemill/gguf/server.py
	$(BIN)/python -m tunemill.gguf.server
	touch $@

test: $(INSTALLED) ## Run the tests that need nothing but pip
	$(BIN)/pytest $(PARALLEL) -m 'not s3 and not docker' $(ARGS)

test-s3: $(INSTALLED) ## Run the tests that need a real S3 server (root on Debian)
	$(BIN)/python tests/s3/run.py $(BIN)/pytest $(PARALLEL) -m s3 $(ARGS)

test-images: $(INSTALLED) ## Build the images and run the tests in containers (Docker, or root on Debian)
	$(BIN)/python tests/images/run.py $(BIN)/pytest -m docker $(ARGS)

lint: $(INSTALLED) ## Check style, types and architecture
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck -x .ci/run compose/*.sh images/*/*.sh tests/*/*.sh
	$(BIN)/hadolint images/*/Dockerfile

format: $(INSTALLED) ## Rewrite the sources in the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(INSTALLED) ## Measure merge, transfers and start-up, side by side with their peers
	$(BIN)/python tests/bench/bench_startup.py
	$(BIN)/python tests/bench/bench_merge.py
	$(BIN)/python tests/bench/bench_transfer.py

bench-infer: $(SERVER) ## Measure inference beside its peers: ARGS="--cap FOLDER" for CAP's texts too (about 12 minutes)
	$(BIN)/python tests/bench/bench_infer.py $(ARGS)

bench-gpu: ## Measure training on this machine's GPU (needs PyTorch, no installation, no network)
	PYTHONPATH=tools $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tests/bench/bench_gpu.py

clean: ## Remove the virtual environment and caches; the store stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
