# `make help` lists what there is. Everything runs in .venv, which `make install` creates.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DATA   ?=
OUT    ?=
RUN    ?= runs/smoke-synthetic

.DEFAULT_GOAL := help
.PHONY: help install smoke test lint types format serve bench clean

help:  ## this list
	@awk -F ':.*## *' '/^[a-z]+:.*##/ { printf "%-10s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## the environment in .venv, versions as in constraints.txt

# uv installs in seconds what pip needs minutes for; where it cannot (it does not read pip's settings), pip does.
# UV_FIND_LINKS: uv ignores pip's variable of the same meaning. Bytecode is compiled once here, not at every start.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: $(PYTHON) is missing or older than Python 3.11; run make PYTHON=/path/to/python3.11"; exit 2; }
	@echo "installing into $(VENV) (minutes)"; date +%s >.install-started
	@$(PYTHON) -m venv $(VENV)
	@unset PYTHONDONTWRITEBYTECODE; \
	    { $(BIN)/pip install --quiet uv -c constraints.txt && UV_FIND_LINKS="$${PIP_FIND_LINKS:-}" $(BIN)/uv pip install \
	      --quiet --python $(BIN)/python --compile-bytecode -e '.[dev]' -c constraints.txt; } || \
	    { echo "uv could not install, pip tries"; $(BIN)/pip install --quiet -e '.[dev]' -c constraints.txt; }
	@echo "installed in $$(( $$(date +%s) - $$(cat .install-started) )) s"; rm -f .install-started
	@touch $@

smoke: install  ## raw videos to results table in minutes; DATA=folder for real videos, OUT=folder for the results
	@$(BIN)/python -m flows --preset smoke $(if $(DATA),--data "$(DATA)") $(if $(OUT),--out "$(OUT)")

test: install  ## the whole test suite
	@$(BIN)/python -m pytest

lint: install  ## style, format and who may import whom
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

types: install  ## mypy
	@$(BIN)/mypy

format: install  ## rewrite the sources in the house format
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

serve: install  ## MLflow's pages for RUN (default: the smoke run) on http://127.0.0.1:5000
	@test -f "$(RUN)/mlflow.db" || { echo "error: no $(RUN)/mlflow.db; run make smoke, or give RUN=folder"; exit 2; }
	@MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow server --host 127.0.0.1 \
	    --port 5000 --workers 1 --backend-store-uri "sqlite:///$$(cd "$(RUN)" && pwd)/mlflow.db"

# The peers (decord, litdata, ...) want an environment of their own: one of them holds numpy back.
.venv-bench/.installed: benchmarks/requirements.txt
	@$(PYTHON) -m venv .venv-bench && .venv-bench/bin/pip install --quiet uv
	@unset PYTHONDONTWRITEBYTECODE; UV_FIND_LINKS="$${PIP_FIND_LINKS:-}" .venv-bench/bin/uv pip install --quiet \
	    --python .venv-bench/bin/python --compile-bytecode -r benchmarks/requirements.txt
	@touch $@

bench: install .venv-bench/.installed  ## benchmarks, with their peers, into benchmarks/results/ and docs/performance.md
	@.venv-bench/bin/python -m benchmarks $(if $(DATA),--data "$(DATA)")
	@.venv-bench/bin/python -m benchmarks models
	@$(BIN)/python -m benchmarks study --rounds 3
	@$(BIN)/python -m benchmarks again --rounds 3
	@.venv-bench/bin/python -m benchmarks page

clean:  ## removes the environment and caches; runs/ stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
