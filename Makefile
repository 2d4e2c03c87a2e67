# `make ablation` and `make test` are the two commands of the README; each sets up .venv first if it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# Python compiles a module when it is first imported: of what is installed that is a small part, and a minute less.
INSTALL := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --no-compile

.PHONY: setup ablation lint style types test check gate soak demo docs shell clean

setup: $(VENV)/.installed

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python >= 3.11 is needed, {sys.version.split()[0]} found: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# What runs need, and nothing more.
$(VENV)/.lean: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e .
	touch $@

# Tests, and every command that asks for a package of its own.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e ".[dev,track,corpus,hub,cluster,eval,gguf]"
	touch $(VENV)/.lean $@

ablation: $(VENV)/.lean
	$(BIN)/python -m ablations compare baseline twin other_order fewer_experts more_tokens top_p null_experts attention_sinks --seeds 3 $(ARGS)

demo: $(VENV)/.lean
	$(BIN)/python -m demos $(ARGS)

# The notes and every public function as a static site: site/index.html.
docs: $(VENV)/.lean
	$(INSTALL) -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet -f docs/mkdocs.yml

# A shell in which `python` is the environment's, as pages and reports write it.
shell: $(VENV)/.lean
	. $(BIN)/activate && exec "$${SHELL:-sh}"

lint: style types

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/basedpyright --level error

# One thread per test process: two OpenMP teams on two cores spin at each other's barriers. Stealing keeps a file's tests together: dealt out
# in small lots, which is the default, they would train what they share once in each process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Types are checked beside the tests, which leave a core idle now and then, and told behind them. Either fails the whole.
define types_and_tests
	$(info $(PYTEST) -m "$(1)" $(ARGS))
	@$(BIN)/basedpyright --level error >$(VENV)/types.txt 2>&1 & types=$$!; \
	trap 'kill $$types' INT TERM; \
	$(PYTEST) -m "$(1)" $(ARGS); tests=$$?; \
	wait $$types; types=$$?; \
	echo '$(BIN)/basedpyright --level error'; cat $(VENV)/types.txt; \
	exit $$((tests ? tests : types))
endef

test: style
	$(call types_and_tests,not long)

check: style
	$(call types_and_tests,not slow and not long)

# What the tests hold to on sm_90 alone, for every architecture and every option of the launch tables, and the tests that are too long for
# every change: half an hour, after a change of kernels.
gate: setup
	$(PYTEST) -m long
	$(BIN)/python -m triton_kernels inspect --gate --arch 80 90 100 --all-options $(ARGS)

# An hour of attacks on runs, files, disk, operations and command lines; two minutes of it are among those of `make gate`.
soak: setup
	$(BIN)/python -m tests.soak $(ARGS)

clean:
	rm -rf runs site .pytest_cache .ruff_cache .hypothesis
