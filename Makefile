# Two commands do everything on a fresh machine with Python 3.11 or later: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0 # the build without CUDA where no GPU is; TORCH='torch>=2.11' for another

.PHONY: demo test check bench gpu format clean

demo: $(VENV)/.demo
	$(BIN)/wearfleet-cloud demo $(if $(DATASET),--dataset $(DATASET)) $(if $(DATA_ROOT),--data-root $(DATA_ROOT)) \
	  $(if $(KEEP),--keep)

test: $(VENV)/.test system-packages
	PATH="$(CURDIR)/$(BIN):$$PATH" bash tests/run.sh

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	PYTHON=$(CURDIR)/$(BIN)/python protos/generate.sh --check

bench: $(VENV)/.test system-packages
	PATH="$(CURDIR)/$(BIN):$$PATH" bash tests/benchmarks/run.sh

# Needs a CUDA machine with torch, triton and pytest already there; installs nothing.
gpu:
	bash tests/gpu/run.sh

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs build dist

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet "$(strip $(TORCH))"
	$(BIN)/pip install --quiet -e ".[cloud,edge]"
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/pip install --quiet -e ".[cloud,edge,postgres,privacy,ray]" --group dev
	touch $@

.PHONY: system-packages
system-packages:
	bash tests/install-system-packages.sh
