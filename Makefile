# Each target sets up what it needs on a fresh machine: `make demo`, `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
TORCH ?= torch==2.13.0

.PHONY: demo test check setup setup-test data clean

demo: setup data ## Train a vision transformer at low rank beside its dense twin (about 7 minutes on 2 cores).
	$(BIN)/oialr compare fashion_mnist_vit --own --out $(OUT)

test: setup-test data check ## Style, types and the whole test suite.
	$(BIN)/python -m pytest

check: setup-test ## Style and types only.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/installed
setup-test: $(VENV)/installed-test

# Torch comes first: its wheel must not be replaced by what another package asks for.
$(VENV)/installed: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[plot]"
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet --editable ".[test]"
	@if command -v mpirun >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends openmpi-bin libopenmpi-dev; \
	else echo "mpirun is missing and only root can install it: the tests under MPI are skipped"; fi
	@if command -v slurmctld >/dev/null && command -v shellcheck >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && env/local_slurm.sh install && \
	  apt-get install -y -qq --no-install-recommends shellcheck; \
	else echo "Slurm or shellcheck is missing and only root can install them: tests under Slurm are skipped"; fi
	@if command -v chromium >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; then :; \
	else echo "chromium is missing and only root can install it: the tests of the report page are skipped"; fi
	touch $@

data: setup
	$(BIN)/oialr data fetch fashion-mnist

clean: ## Remove the virtual environment and runs.
	rm -rf $(VENV) runs
