# Each target sets up what it needs on a fresh machine: `make demo`, `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
TORCH ?= torch==2.13.0
# How many tests run beside each other; most wait for their own processes now and then.
WORKERS ?= 2
# Where the tests marked gpu compute. All others compute on the CPU, on a machine with a GPU too.
DEVICE ?= cuda

# Bytecode is written where a module is first imported: compiling all of torch would take longer than loading it.
PIP := $(BIN)/pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE

# Programs beside packages, data beside style and types.
MAKEFLAGS += --jobs=2

.PHONY: demo test test-fast tests tests-long tests-gpu docs check setup setup-test programs data clean

demo: setup data ## Train a vision transformer at low rank beside its dense baseline (about 7 minutes on 2 cores).
	$(BIN)/oialr compare fashion_mnist_vit --own --out $(OUT)

test: check tests ## Style, types and the whole test suite.

tests: setup-test programs data
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) -m "not long"
	@if nvidia-smi -L >/dev/null 2>&1; then $(MAKE) tests-gpu; fi

tests-long: setup-test programs data ## Tests marked long, which make test leaves out.
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long

test-fast: setup-test data ## The inner loop: what needs no processes, no Slurm, no MPI (under a minute on 2 cores).
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) \
	  -m "not slow and not slurm and not mpi and not gpu and not long"

docs: setup-test ## The documentation, into build/docs; a warning is an error.
	$(BIN)/python -c "import sphinx, myst_parser, furo, sphinxcontrib.mermaid" 2>/dev/null || $(PIP) --editable ".[docs]"
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

tests-gpu: setup-test ## Tests that need a GPU; DEVICE=cpu runs their bodies without one.
	OIALR_TEST_DEVICE=$(DEVICE) $(BIN)/python -m pytest -m gpu -rs tests/gpu

check: setup-test ## Style and types only.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The demo needs little; for tests everything is installed in one go.
setup: $(VENV)/installed-$(if $(filter test test-fast tests tests-gpu docs check setup-test,$(MAKECMDGOALS)),test,plot)
setup-test: $(VENV)/installed-test

$(VENV)/installed-%: $(VENV)/torch-installed setup.cfg pyproject.toml
	$(PIP) --editable ".[$*]"
	# Its interpreter runs the GPU kernels on the CPU; torch for GPUs brings it along.
	test $* = plot || $(BIN)/python -c "import triton" 2>/dev/null || $(PIP) --no-deps triton==3.6.0 || true
	touch $@

# Torch comes first: its wheel must not be replaced by what another package asks for.
$(VENV)/torch-installed:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) $(TORCH)
	touch $@

# What tests start if it is there: MPI, Slurm, a browser.
PROGRAMS := mpirun slurmctld slurmd sbatch munged shellcheck chromium
PACKAGES = openmpi-bin libopenmpi-dev shellcheck chromium $$(env/local_slurm.sh packages)

programs:
	@for program in $(PROGRAMS); do command -v $$program >/dev/null || missing="$$missing $$program"; done; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(PACKAGES) >/dev/null; then :; \
	else echo "missing, and only root can install them:$$missing; their tests are skipped"; fi

data: setup
	$(BIN)/oialr data fetch fashion-mnist

clean: ## Remove the virtual environment and runs.
	rm -rf $(VENV) runs
