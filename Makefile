# What a person types; `make help` lists it. Works with GNU make and a POSIX shell.
#
# Everything is installed into .venv, editable. Each step leaves a stamp, so that a warm `make` calls no pip.

PYTHON ?= python3
RESULTS ?= benchmarks/results
GPU_SECONDS ?= 480

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
CSRC := $(shell find csrc -type f)

# Without an NVIDIA GPU torch is held to one version, of which pip then takes the CPU-only build if it is
# offered one: a fifth of the download.
CONSTRAINTS = $(shell (nvidia-smi -L || test -e /proc/driver/nvidia) >/dev/null 2>&1 || echo -c constraints-cpu.txt)
PIP = $(BIN)/python -m pip install --disable-pip-version-check -q $(CONSTRAINTS)
# Built against the torch just installed, not against a second one in an isolated environment. The CUDA library
# is left out: on a GPU the Triton kernels do the work, and `make gpu` builds the rest.
INSTALL = FASTGEN_CUDA=0 $(PIP) --no-build-isolation -e

.DELETE_ON_ERROR:
.PHONY: help sample test test-all bench reliability gpu lint clean

help:
	@echo "make sample     40 digits into samples.png (sets up .venv at the first call)"
	@echo "make test       the tests, without the slow ones"
	@echo "make test-all   every test"
	@echo "make bench      the benchmarks, on this machine"
	@echo "make reliability kills, full disks, signals and resumed runs, counted, in minutes (FULL=--full: longer)"
	@echo "make gpu        on a machine with a GPU, torch, triton and nvcc: build the CUDA library with the"
	@echo "                Python at hand (no .venv, no network), run the GPU tests and benchmarks in 9 minutes"
	@echo "                RESULTS=folder for the records (now: $(RESULTS))"
	@echo "make lint       ruff: rules and format"
	@echo "make clean      remove what was built (.venv stays)"
	@echo "PYTHON=...      the Python to use (now: $(PYTHON))"

sample: $(STAMPS)/package
	$(BIN)/fastgen sample ddpm-mnist -n 40 --seed 0 --labels 0,1,2,3,4,5,6,7,8,9 -o samples.png

test: $(STAMPS)/package $(STAMPS)/test
	$(BIN)/python -m pytest -m "not slow" tests

test-all: $(STAMPS)/package $(STAMPS)/test
	$(BIN)/python -m pytest tests

bench: $(STAMPS)/package $(STAMPS)/bench
	$(BIN)/python -m benchmarks --out $(RESULTS)

reliability: $(STAMPS)/package
	$(BIN)/python -m benchmarks.reliability $(FULL)

# All of it, tests that fail or not, in less than nine minutes: tests get half of GPU_SECONDS, and those that are left
# are skipped (kernels stay compiled, so a second call comes further); the benchmarks get the rest.
# Nothing is installed, so the kernels must be found inside the package: by a link.
gpu: export PYTHONPATH := $(CURDIR)
gpu:
	@start=$$(date +%s); status=0; set -x; \
	FASTGEN_CUDA=1 $(PYTHON) setup.py -q build_ext --inplace || exit 1; \
	test -e fastgen/kernels || ln -s ../kernels fastgen/kernels || exit 1; \
	FASTGEN_TEST_SECONDS=$$(( $(GPU_SECONDS) / 2 )) \
	$(PYTHON) -m pytest -q -m gpu --continue-on-collection-errors tests || status=1; \
	left=$$(( start + $(GPU_SECONDS) - $$(date +%s) )); \
	$(PYTHON) -m benchmarks --device cuda --stop $$left --budget $$(( left / 2 )) --out $(RESULTS) || status=1; \
	exit $$status

lint: $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build dist fastgen_kernels.egg-info fastgen/libfastgen_* fastgen/_build_info.json
	rm -rf .pytest_cache .ruff_cache .hypothesis $(STAMPS)/package
	test ! -L fastgen/kernels || rm fastgen/kernels

$(STAMPS)/venv:
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: constraints-cpu.txt | $(STAMPS)/venv
	$(PIP) "setuptools>=77" "torch>=2.11"
	touch $@

# When only C++ changed, nothing needs installing: the libraries are rebuilt in place.
$(STAMPS)/package: $(STAMPS)/torch pyproject.toml setup.py $(CSRC)
	$(if $(filter-out csrc/%,$?),$(INSTALL) .,FASTGEN_CUDA=0 $(BIN)/python setup.py -q build_ext --inplace)
	touch $@

# One package more, of other people's models: without what it depends on, which is torchvision, and with the one
# dependency that its networks use. An extra cannot say that.
$(STAMPS)/test $(STAMPS)/bench: pyproject.toml | $(STAMPS)/package
	$(INSTALL) ".[$(notdir $@)]"
	$(PIP) --no-deps denoising-diffusion-pytorch==2.3.4 einops
	touch $@

# The version of ruff is named once, in pyproject.toml: another one formats differently.
$(STAMPS)/lint: pyproject.toml | $(STAMPS)/venv
	$(BIN)/python -m pip install --disable-pip-version-check -q "$$(sed -n 's/^lint = \["\(.*\)"\]/\1/p' pyproject.toml)"
	touch $@
