# make help lists the targets. PYTHON is the interpreter that .venv is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/eve_tiny

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev check-python data pretrain evaluate test gpu lint format tensorboard clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

pretrain: data  ## bring the emoji, train eve_tiny (or go on with it), evaluate it
	@if [ -d $(RUN) ]; then resume=--resume; fi; \
	$(BIN)/python -m eve.pretrain --recipe eve_tiny --run_dir $(RUN) $$resume
	@$(BIN)/python -m eve.evaluate --task pretrain --checkpoint $(RUN)/export
	@echo "pictures: $(RUN)/samples/    curves: make tensorboard    metrics: $(RUN)/metrics.jsonl"

data: setup  ## build the emoji shards and their tokenizer
	@$(BIN)/python -m tools.make_emoji --out data/emoji
	@[ -f data/emoji/tokenizer.model ] || \
	$(BIN)/python -m tools.train_tokenizer data/emoji/train --output data/emoji/tokenizer.model --vocab-size 4000

evaluate: setup  ## the table of held-out results of the last make pretrain
	@$(BIN)/python -m eve.evaluate --task pretrain --checkpoint $(RUN)/export

test: setup-dev  ## all tests
	@$(BIN)/python -m pytest

gpu:  ## with a GPU: its tests, all kernels beside their peers, a step of EVE-Base; in runs/gpu
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m tools.measure_gpu

lint: setup-dev  ## ruff and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: setup-dev  ## ruff's formatting and safe fixes
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

tensorboard: setup  ## curves, pictures and expert load of all runs at localhost:6006
	@$(BIN)/tensorboard --logdir runs

clean:  ## remove caches
	rm -rf .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## remove .venv as well; data/ and runs/ stay
	rm -rf $(VENV)

setup: $(VENV)/.runtime  ## .venv with requirements.txt
setup-dev: $(VENV)/.development  ## .venv with requirements-dev.txt

# Each stamp is written when its installation is whole; a changed list installs again.
$(VENV)/.runtime: requirements.txt | check-python $(BIN)/pip
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.development: requirements.txt requirements-dev.txt | check-python $(BIN)/pip
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $(VENV)/.runtime $@

$(BIN)/pip: | check-python
	@$(PYTHON) -m venv $(VENV)

check-python:
	@command -v $(PYTHON) >/dev/null || \
	{ echo "error: there is no $(PYTHON); install Python 3.11 to 3.13 or give PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	{ echo "error: $$($(PYTHON) --version) found, expected 3.11 to 3.13; give PYTHON=python3.12 or the like" >&2; exit 2; }
	@[ -x $(BIN)/pip ] || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	{ echo "error: $(PYTHON) cannot make a virtual environment; on Debian or Ubuntu: apt install python3-venv" >&2; exit 2; }
