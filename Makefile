# gptlab. `make` alone prints this help, or runs the .config that `make defconfig-NAME` wrote (docs/make-front.md).
# `make demo` installs what the README's commands need (`install-demo`); `make install`, `test` and `lint` add the rest.
# Without a GPU, PyTorch's CPU build saves gigabytes: make install TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Another interpreter: make install PYTHON=python3.13

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
RUN := runs/stdlib-demo_seed1337

KCONFIG := $(BIN)/python -m gptlab.kconfig

.DEFAULT_GOAL := $(if $(wildcard .config),run,help)
.PHONY: help install install-demo demo test test-all test-faults lint format clean menuconfig run test-matrix

help:
	@echo "make demo      install, then train a small GPT on Python's source code in a minute or two and show the result"
	@echo "make test      install, run the tests (under 5 minutes)"
	@echo "make test-all  run the long tests too: kills, compilation, whole runs (under 35 minutes)"
	@echo "make test-faults  every test of faults, in its longest form: hundreds of kills, thousands of damaged files"
	@echo "make lint      run ruff, mypy and the check of the import rules"
	@echo "make format    format the code with ruff"
	@echo "make install   make .venv with all extras but wandb and trackio, and the tools of tests and lint;"
	@echo "               TORCH_INDEX=https://download.pytorch.org/whl/cpu without a GPU,"
	@echo "               PYTHON=python3.13 for another interpreter"
	@echo "make install-demo  make .venv with what the README's commands need, about half of it"
	@echo "make defconfig-NAME   write .config for a recipe or study; 'gptlab recipes' and 'gptlab studies' list the names"
	@echo "make menuconfig       change .config in menus"
	@echo "make                  with a .config: train its recipe, or run its study (also: make run)"
	@echo "make test-matrix      run the study of .config"
	@echo "make clean     remove .venv and caches; runs/ and data/ stay"

install-demo: $(DEMO_STAMP)

$(DEMO_STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "gptlab needs Python 3.11 to 3.13; PYTHON=python3.12 make install names another"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -q -c constraints.txt -e '.[offline,menuconfig]'
	@touch $@

install: $(STAMP)

$(STAMP): $(DEMO_STAMP)
	$(PIP) install -q -c constraints.txt -e '.[offline,menuconfig,data,precision,energy,tensorboard,harness,gguf,dev]'
	@touch $@

demo: install-demo
	@$(BIN)/python examples/demo.py

defconfig-%: install-demo
	@$(KCONFIG) defconfig $*

menuconfig run test-matrix: install-demo
	@$(KCONFIG) $@

test: install
	@$(BIN)/python -m pytest -n 2 --dist loadgroup

test-all: install
	@$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not faults"

test-faults: install
	@$(BIN)/python -m pytest -n 2 --dist loadgroup -m "faults or not faults" tests/test_faults_*.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	@$(BIN)/ruff check -q --fix . ; $(BIN)/ruff format -q .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .kconfig
