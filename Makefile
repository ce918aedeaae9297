# Two commands do everything on a machine that has Python: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := pyproject.toml constraints.txt
# which build of torch: auto (CUDA where nvidia-smi answers, else for the CPU), cpu, cuda, or as-is (what is there already)
TORCH ?= auto
CONSTRAINTS := $(if $(filter as-is,$(TORCH)),,-c constraints.txt)

# tests start this program often: let Python keep what it has compiled, whatever the shell says
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint types tests parity soak schema docs clean

demo: $(VENV)/installed
	$(BIN)/s2vflow run recipes/demo.yaml

test: lint types tests

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

# one thread a worker: two workers with two threads each wait for one another (measured: 60 s of CPU instead of 17)
tests: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

parity: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "parity or slow"

soak: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -m soak -s

schema: $(VENV)/installed
	for what in recipe manifest events; do $(BIN)/s2vflow schema --of $$what -o schemas/$$what.schema.json; done

docs: $(VENV)/installed
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/torch: $(BIN)/python constraints.txt tools/install_torch.sh
	sh tools/install_torch.sh $(BIN)/python $(TORCH)
	touch $@

$(VENV)/installed: $(VENV)/torch $(SETUP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/torch $(SETUP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e '.[dev]'
	touch $@ $(VENV)/installed
