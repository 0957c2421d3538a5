# Needs nothing but make and Python 3.11 or newer; every target sets up what it uses.
#   make test ARGS="-k merge"                      more arguments for pytest (or for the demo)
#   make test PYTHON=python3.13 VENV=.venv313      another Python, in an environment of its own
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
COUNT ?= 10000
SEED ?= 0
# Compiling is most of what the tests do, one core a process; a file's tests share what is compiled.
WORKERS ?= --numprocesses=auto --maxprocesses=4 --dist=loadfile

# A stamp is written after a whole install, one per Python version and set of extras.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
STAMP := $(VENV)/.installed-$(VERSION)
RUN := $(VENV)/bin/python -m
RECIPE := LORA_JAX_RECIPES=1 PYTHONPATH=$(abspath $(VENV))/recipes

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo bench bench-run bench-accelerator published test test-accelerator test-all test-newest test-docs newest-python recipes fuzz docs wheel lint format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1 \t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(STAMP)-demo ## fine-tune a real sentence encoder and print what it learned
	@$(RUN) examples.sentiment $(ARGS)

bench: ## a training step beside other ways to do LoRA, in an environment of its own
	@$(MAKE) --no-print-directory bench-run VENV=.venv-bench

bench-run: $(STAMP)-bench
	@$(RUN) benchmarks.train_step $(ARGS)

# With the Python that has the device's own jax (and torch); pip would bring JAX for the CPU.
bench-accelerator: ## what adapters cost on this GPU or TPU: tables, and accelerator.json (PYTHON=...)
	@$(PYTHON) -m benchmarks.accelerator $(ARGS)

published: $(STAMP)-published ## results of papers, made again: a table and pictures in published/
	@$(RUN) benchmarks.published $(ARGS)

test: $(STAMP)-test ## the default suite: tests, doctests, README
	@$(RUN) pytest $(WORKERS) $(ARGS)

test-all: $(STAMP)-test ## the default suite and the slow tests, compiled as users compile
	@LORA_JAX_OPTIMIZE=1 $(RUN) pytest $(WORKERS) -m "" $(ARGS)

test-accelerator: $(STAMP)-test ## what makes sense on one GPU or TPU (needs jax[cuda12] or jax[tpu] in VENV)
	@LORA_JAX_ACCELERATOR=1 $(RUN) pytest -p no:xdist $(ARGS)

test-newest: ## the default suite on the newest Python found, with the newest jax
	@python="$$($(MAKE) -s --no-print-directory newest-python)"; \
	if [ -z "$$python" ]; then echo "no Python newer than $(VERSION) found: nothing to run"; \
	else $(MAKE) --no-print-directory test PYTHON="$$python" VENV=.venv-newest; fi

test-docs: $(STAMP)-test ## every page of the documentation and every notebook, executed
	@$(RUN) pytest $(WORKERS) -m "" tests/project/test_docs.py $(ARGS)

# Other packages' models, apart: what they depend on would take minutes, and some of it disagrees.
recipes: $(VENV)/recipes/packages $(VENV)/recipes/gemma ## recipes and a notebook of other packages' models, executed
	@$(RECIPE)/packages $(RUN) pytest tests/project/test_docs.py -m "" \
	  -k "blocks_run and recipes and not gemma or notebook_runs and nnx_gemma" $(ARGS)
	@$(RECIPE)/gemma $(RUN) pytest tests/project/test_docs.py -k "blocks_run and recipes and gemma" $(ARGS)

$(VENV)/recipes/%: docs/recipes/%.txt | $(STAMP)-test
	@echo "installing what docs/recipes/$*.txt lists into $@"
	@rm -rf $@
	@$(RUN) pip install -qq --disable-pip-version-check --no-deps --target $@ -r $<
	@touch $@

fuzz: $(STAMP)-test ## random programs against their merged weights (COUNT=10000 SEED=0)
	@$(RUN) tests.stress.fuzz --count $(COUNT) --seed $(SEED) $(ARGS)

docs: $(STAMP)-docs ## the documentation as a site in site/; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict

wheel: $(STAMP)-build ## a wheel in dist/ that installs in a fresh environment and passes a smoke test
	@rm -rf dist $(VENV)/wheel
	@$(RUN) build --quiet --outdir dist .
	@$(PYTHON) -m venv $(VENV)/wheel
	@$(VENV)/wheel/bin/python -m pip install -qq --disable-pip-version-check "$$(ls dist/*.whl)[cli]"
	@cd dist && PATH="$(abspath $(VENV))/wheel/bin:$$PATH" bash ../.ci/smoke
	@rm -rf $(VENV)/wheel

lint: $(STAMP)-cli,dev ## style, format and types
	@$(RUN) ruff check
	@$(RUN) ruff format --check
	@$(RUN) mypy

format: $(STAMP)-cli,dev ## what lint can repair by itself
	@$(RUN) ruff check --fix-only
	@$(RUN) ruff format

# Prints the newest Python that is newer than $(PYTHON) and really runs (a pyenv shim may not), or nothing.
newest-python:
	@for minor in 14 13 12; do \
	  [ "$(VERSION)" != "3.$$minor" ] || exit 0; \
	  for python in python3.$$minor \
	      $$(ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.$$minor.*[0-9]/bin/python 2>/dev/null | sort -rV); do \
	    if "$$python" -c 'import ensurepip, venv' 2>/dev/null; then echo "$$python"; exit 0; fi; \
	  done; \
	done

clean: ## remove environments, caches and builds
	rm -rf .venv* build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo_output published
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP)-%: pyproject.toml | $(STAMP)
	@echo "installing lora-jax[$*] into $(VENV) (Python $(VERSION)); the first time takes a minute or two"
	@$(RUN) pip install -qq --disable-pip-version-check --editable ".[$*]"
	@touch $@

$(STAMP):
	@case "$(VERSION)" in \
	  3.1[1-9]|3.[2-9][0-9]) ;; \
	  "") echo "$(PYTHON) does not run: pass PYTHON=... (3.11 or newer)" >&2; exit 1 ;; \
	  *) echo "lora_jax needs Python 3.11 or newer, and $(PYTHON) is $(VERSION): pass PYTHON=..." >&2; exit 1 ;; \
	esac
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@
