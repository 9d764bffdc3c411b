# The commands people use. Everything runs inside .venv, which `make install` fills from the lock
# file, and offline once installed.
#
#   make demo     quantize the bundled model, evaluate it, serve it, ask it about a picture
#   make test     lint, types, tests
#   make help     the other targets

SHELL := /bin/bash
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
# A top-level folder called kernels/ must not shadow the package of that name on sys.path.
export PYTHONSAFEPATH := 1
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1
export TOKENIZERS_PARALLELISM := false

STAMP := $(VENV)/.installed
DEMO_JSON ?= .demo/demo.json
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test lint types unit slow bench-cpu compile-report gpu gpu-vllm clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s $$'\t'

install: $(STAMP)  ## make .venv from the lock file (TORCH_INDEX: index with torch+cpu, if needed)

$(STAMP): docker/requirements-cpu.lock docker/install_cpu.sh docker/torchvision_cpu.py pyproject.toml
	docker/install_cpu.sh $(VENV)
	@touch $@

demo: $(STAMP)  ## quantize, evaluate, serve and ask the bundled model (JSON: $DEMO_JSON)
	$(BIN)/qig-serve demo --json $(DEMO_JSON)

test: $(STAMP) lint types unit  ## lint, types and all unmarked tests

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy
	$(BIN)/mypy

unit: $(STAMP)  ## the unmarked tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

slow: $(STAMP)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

bench-cpu: $(STAMP)  ## the CPU path against bf16 F.linear
	$(BIN)/python tests/benchmarks/bench_cpu.py

compile-report: $(STAMP)  ## cross-compile every kernel; registers, spills, instructions per weight
	$(BIN)/python -m qig_serve.kernels.compile_report

# On a GPU machine torch and triton are the machine's own; .venv, where there is one, holds CPU builds
# with which this gets as far as the missing GPU.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
# Stages and options as in the head of gpu_kernels.py: make gpu KERNEL_ARGS="--stages warm,time"
KERNEL_ARGS ?=
gpu:  ## on a machine with a GPU: check, tune and time the kernels in six minutes (KERNEL_ARGS)
	@mkdir -p .gpu/path && ln -sfn ../../qig_serve .gpu/path/qig_serve
	PYTHONPATH=$(CURDIR)/.gpu/path$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) tests/benchmarks/gpu_kernels.py $(KERNEL_ARGS)

# Stages and options as in the head of gpu_vllm.py: make gpu-vllm GPU_ARGS="--device cpu --tiny together"
GPU_ARGS ?=
gpu-vllm:  ## on a machine with a GPU and vLLM: the end-to-end benchmark in 390 seconds (GPU_ARGS)
	@mkdir -p .gpu/path && ln -sfn ../../qig_serve .gpu/path/qig_serve
	PYTHONPATH=$(CURDIR)/.gpu/path$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) tests/benchmarks/gpu_vllm.py $(GPU_ARGS)

clean:  ## remove what the targets made, but for .venv
	rm -rf .demo build .pytest_cache .mypy_cache .ruff_cache
