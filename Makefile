# One command on a fresh machine: each target finds a Python, makes .venv, installs into it, then does its work.
# Repeated runs skip all of that until pyproject.toml changes. Written for GNU make 3.81 and any POSIX shell.

# Anything may be added to the command that a target runs: make test ARGS="tests/moe -k router"
ARGS =
# The interpreter for .venv; looked for where none is named.
PYTHON =
# What pip is asked for in place of our own choice of torch: make test TORCH=torch==2.12.0
TORCH =
# The interpreter of `make gpu`, which installs nothing: it has torch with CUDA already.
PYTHON3 ?= python3

TORCH_VERSION := 2.13.0
PIP := .venv/bin/python -m pip --disable-pip-version-check --no-input
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup train test gpu lint format clean

help:
	@echo "make train    set up, then train a small MoE on this machine (recipes/quickstart.py)"
	@echo "make test     set up, then run the whole test suite"
	@echo "make gpu      on a CUDA machine whose python3 has torch: GPU tests and every benchmark, at most 8 minutes"
	@echo "make lint     ruff, pyright and the floors (import-linter)"
	@echo "make format   let ruff rewrite the files"
	@echo "make setup    only find a Python, make .venv and install into it"
	@echo "make clean    remove .venv and caches; runs/ and data/ stay"
	@echo
	@echo 'ARGS="..." is added to the command: make train ARGS="--trainer.steps 50", make test ARGS="-k router"'
	@echo "PYTHON=...  names the interpreter (>= 3.11), TORCH=torch==... the build of torch; both count when .venv is made"

train: $(INSTALLED)
	.venv/bin/python recipes/quickstart.py $(ARGS)

test: $(INSTALLED)
	.venv/bin/python -m pytest $(ARGS)

# What PYTHONPATH holds already stays: packages that such a machine lacks may have been brought along.
gpu:
	PYTHONPATH=".:kernels:recipes$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON3) benchmarks/run_on_gpu.py $(ARGS)

lint: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python
	.venv/bin/lint-imports --no-logo

format: $(INSTALLED)
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

setup: $(INSTALLED)

clean:
	rm -rf .venv build moe_train.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find moe kernels recipes tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# A name on PATH is not enough: it may be a shim for a version that is not there, or lack the venv module.
.venv/bin/python:
	@for python in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11); do \
	  if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    echo "Making .venv with $$("$$python" -c 'import sys; print(sys.executable, sys.version.split()[0])')"; \
	    exec "$$python" -m venv --clear .venv; \
	  fi; \
	done; \
	echo "No usable Python: need >= 3.11 with its venv module; tried $(or $(PYTHON),python3 python3.13 python3.12 python3.11)." >&2; \
	echo "Name one with: make PYTHON=/path/to/python3 ... (Debian and Ubuntu: apt install python3-venv)" >&2; \
	exit 1

# torch comes first, because the rest would pull in the build with CUDA (several GB) on a machine without a GPU.
$(INSTALLED): pyproject.toml | .venv/bin/python
	@if [ -n "$(TORCH)" ]; then \
	  echo "Installing $(TORCH), as asked"; \
	  $(PIP) install -qq "$(TORCH)" || exit 1; \
	elif $(PIP) show --quiet torch >/dev/null 2>&1; then \
	  echo "Keeping the torch that is in .venv"; \
	elif nvidia-smi >/dev/null 2>&1; then \
	  echo "NVIDIA GPU found: taking torch as the package index offers it"; \
	else \
	  echo "No NVIDIA GPU found: installing the CPU build of torch $(TORCH_VERSION)"; \
	  if ! $(PIP) install -qq "torch==$(TORCH_VERSION)+cpu" >.venv/torch.log 2>&1; then \
	    if ! grep -q "No matching distribution found for torch" .venv/torch.log; then cat .venv/torch.log >&2; exit 1; fi; \
	    echo "pip's package indexes have no CPU build under that name: taking torch $(TORCH_VERSION) as they offer it."; \
	    echo "On Linux x86-64 that build carries CUDA, several GB; it runs on the CPU all the same."; \
	    $(PIP) install -qq "torch==$(TORCH_VERSION)" || exit 1; \
	  fi; \
	fi
	@echo "Installing moe-train and what it needs (a few minutes the first time)"
	@$(PIP) install -qq --editable ".[dev]"
	@touch $(INSTALLED)
	@.venv/bin/python -c 'from importlib.metadata import version as v; print("Installed: torch", v("torch") + ", deepspeed", v("deepspeed") + ", transformers", v("transformers"))'
