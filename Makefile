# phoenix: two commands. `make run` does the main job, `make test` is the whole gate.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1
export MPLBACKEND ?= agg
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# compiled modules are kept, whatever the shell says: without them each fresh process compiles torch anew, for 8 seconds
export PYTHONDONTWRITEBYTECODE :=
DATA ?= phantom
EXPERIMENT ?= 01_quickstart
QUICK := nbs/experiments/params/quickstart_$(if $(filter phantom,$(DATA)),phantom,images).yaml
PARAMS ?= $(if $(filter 01_quickstart,$(EXPERIMENT)),$(QUICK),nbs/experiments/params/$(EXPERIMENT).yaml)

.PHONY: run test install gate lint readme docs notebooks lab clean help

help:          ## list the targets
	@grep -E '^[a-z]+: .*##|^[a-z]+:  *##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install: $(STAMP)  ## build .venv with the exact versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"phoenix needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}; say make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e ".[dev]"
	touch $(STAMP)

run: install   ## from raw images to a verified INT8 model: make run [DATA=folder] [SECONDS=s] [EPOCHS=n] [MODEL=name] [EXPERIMENT=13_organs]
	$(BIN)/phoenix run $(EXPERIMENT) -f $(PARAMS) -p data="$(DATA)" \
	  $(if $(filter command line environment,$(origin EPOCHS)),-p epochs=$(EPOCHS)) \
	  $(if $(filter command line,$(origin SECONDS)),-p seconds=$(SECONDS)) \
	  $(if $(MODEL),-p model=$(MODEL))

test: install gate  ## the whole gate: clean and export leave no diff, ruff, notebooks, README, pytest with coverage
	$(BIN)/python -m pytest -q -n 2 -m "not slow" --cov=phoenix --cov-report=term:skip-covered --cov-fail-under=90

gate: install
	$(BIN)/python .ci/gate.py

lint: install  ## ruff on the package
	$(BIN)/ruff check phoenix tests .ci

readme: install  ## README.md from nbs/index.ipynb
	$(BIN)/python .ci/readme.py

notebooks: install  ## execute every library notebook and keep its outputs
	$(BIN)/nbdev-test --save --n-workers 2 nbs && $(BIN)/nbdev-clean

lab: install   ## JupyterLab on the notebooks
	$(BIN)/jupyter lab nbs

docs: install  ## the site (needs Quarto 1.7 or newer)
	$(BIN)/nbdev-docs

clean:         ## remove runs, caches and the environment
	rm -rf $(VENV) runs _docs _proc nbs/_proc .pytest_cache .ruff_cache data/cache data/raw
