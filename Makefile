# The commands of a working copy. Everything runs from $(VENV), which `make venv` fills. A torch of the pinned version that is
# there before, such as the smaller build for the CPU, stays.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TRITON36 ?= .venv-triton36
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: venv demo test test-slow bench venv-triton36 aot golden lint format types clean

venv: $(STAMP)

demo: $(STAMP)
	$(BIN)/zoo run recipes/demo.yaml

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing into $(VENV): about 3.4 GB to download, 7 GB on disk, on Linux with the CUDA build of torch."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,dev]"
	touch $@

test: $(STAMP)
	$(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder --benchmark-disable

test-slow: $(STAMP)
	$(PYTEST) -m slow -n $(WORKERS) --dist loadfile --no-loadscope-reorder --benchmark-disable

bench: $(STAMP)
	$(PYTEST) benchmarks -q -rs --benchmark-columns=median,min,max,rounds

venv-triton36: $(TRITON36)/.installed

$(TRITON36)/.installed: benchmarks/triton36.txt
	@echo "Installing into $(TRITON36): torch 2.11 and Triton 3.6, 5 GB on disk."
	test -x $(TRITON36)/bin/python || $(PYTHON) -m venv $(TRITON36)
	$(TRITON36)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/triton36.txt
	touch $@

aot: $(STAMP) $(TRITON36)/.installed
	$(BIN)/python benchmarks/aot.py --python $(TRITON36)/bin/python --jobs $(WORKERS)

golden: $(STAMP)
	$(BIN)/python tools/lavis_reference.py --env .venv-lavis --out tests/golden
	$(BIN)/python tools/torchscale_reference.py --env .venv-torchscale --out tests/golden

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(STAMP)
	$(BIN)/mypy

clean:
	rm -rf build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
