# Needs Python 3.11 or newer with its venv module, and make; everything else is installed into .venv.
PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMPS := .stamps
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
TESTS = $(BIN)/python -m pytest $(ARGS)
# Two processes, one thread each; a file stays in one of them, since its tests share what is costly to make.
QUICK = OMP_NUM_THREADS=1 $(TESTS) -n 2 --dist loadfile
# Triton reads the source of its functions, so shapes are not checked from outside in its modules.
TRITON_TESTS = $(VENV)-triton/bin/python -m pytest --jaxtyping-packages=pliant.core,beartype.beartype $(ARGS)

.PHONY: help learn test test-all oracles triton lint format install clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

learn: $(STAMPS)/run  ## learn a changing stream of digits, then write a report; ARGS="--change relabel"
	$(BIN)/pliant learn digits $(ARGS)

test: $(STAMPS)/dev  ## the quick tests
	$(QUICK)

test-all: $(STAMPS)/dev oracles  ## quick and slow tests, and those against peer packages
	$(TESTS) -m "not oracle"

oracles: $(STAMPS)/oracles  ## tests against peer packages
	$(VENV)-oracles/bin/python -m pytest -m oracle -rs tests/oracles

triton: $(STAMPS)/triton  ## the forms for CUDA, in Triton's interpreter and compiler; needs no GPU
	TRITON_INTERPRET=1 $(TRITON_TESTS) tests/kernels/test_triton.py
	$(TRITON_TESTS) tests/kernels/test_triton_compile.py

lint: $(STAMPS)/dev  ## style, types, floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMPS)/dev  ## put the source into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMPS)/dev  ## install the package for work on it

clean:  ## remove what was installed
	rm -rf $(VENV) $(VENV)-oracles $(VENV)-triton $(STAMPS)

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "pliant needs Python 3.11 or newer as '$(PYTHON)'; name another one, as in: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "'$(PYTHON)' has no venv module; install it (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@mkdir -p $(STAMPS)
	@touch $@

# The build backend comes from the constraints too, so nothing unpinned is fetched for the build.
$(STAMPS)/run: $(STAMPS)/venv pyproject.toml constraints.txt
	$(INSTALL) hatchling editables
	$(INSTALL) --no-build-isolation -e .
	@touch $@

$(STAMPS)/dev: $(STAMPS)/run
	$(INSTALL) --no-build-isolation -e ".[dev]"
	@touch $@

# Peers that cannot live beside our own dependencies get an environment of their own.
$(STAMPS)/oracles: $(STAMPS)/venv requirements-oracles.txt
	$(PYTHON) -m venv --clear $(VENV)-oracles
	$(VENV)-oracles/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r requirements-oracles.txt
	# Without its mlstm_kernels, whose license we keep away from and which no parity here needs.
	$(VENV)-oracles/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps xlstm==2.0.6
	$(VENV)-oracles/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps --no-build-isolation -e .
	@touch $@

# An environment on top of the other, since torch behaves differently where it finds Triton.
$(STAMPS)/triton: $(STAMPS)/dev requirements-triton.txt
	$(PYTHON) -m venv --clear $(VENV)-triton
	$(VENV)-triton/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r requirements-triton.txt
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')')" \
		> $$($(VENV)-triton/bin/python -c 'import site; print(site.getsitepackages()[0])')/pliant-base.pth
	@touch $@
