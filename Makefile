# `make demo`: a talking video from assets/ in demo.mp4, and a sheet of its frames in demo.png.
# `make test`: the tests of the core and of the nodes that take little, in a few minutes. `make test-all`: all tests.
# `make lint`: ruff's rules, its format, and mypy's types.
# `make docs`: the pages of docs/ in build/docs, with the public names' docstrings.
# All set up .venv first, once; they need python3 (3.10 or later) and make.

PYTHON ?= python3
# Only where .venv has no torch yet. Name another build here, e.g. make demo TORCH="torch==2.13.0 --index-url <index>".
TORCH ?= torch==2.13.0

# Tests run beside each other, each on one thread: a process for every processor, up to 8. Or say how many.
WORKERS ?= logical

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses 8

.PHONY: demo test test-all lint docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/.for-demo
	$(BIN)/memo generate assets/portrait.png assets/voice.wav -o demo.mp4
	$(BIN)/memo sheet demo.mp4 -o demo.png

test: $(VENV)/.for-test
	HYPOTHESIS_PROFILE=fast $(PYTEST) --dist worksteal -m "(core or pack) and not slow" tests/core tests/pack

test-all: $(VENV)/.for-test
	$(PYTEST) --dist loadgroup

# The core's tests with the other Pythons and libraries; the result in tests/versions.md. ONLY="oldest newest" names some.
.PHONY: test-versions
test-versions:
	$(PYTHON) tests/versions.py $(ONLY)

lint: $(VENV)/.for-test build/lint/comfyui_memo
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(VENV)/.for-docs
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build *.egg-info demo*.mp4 demo*.png demo*.safetensors node.zip

# The checkout under a name that Python takes: in one called comfyui-memo a type checker finds no package.
build/lint/comfyui_memo:
	mkdir -p $(@D)
	ln -sfn ../.. $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "memo needs Python 3.10 or later; name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments; install its venv package (on Debian and Ubuntu:" \
	    "apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and by itself: so that the build named above is the one that the other packages find.
$(VENV)/.torch: | $(BIN)/python
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) $(TORCH)
	touch $@

$(VENV)/.for-demo: pyproject.toml | $(VENV)/.torch
	$(PIP) -e .
	touch $@

$(VENV)/.for-test: pyproject.toml | $(VENV)/.torch
	$(PIP) -e '.[test]'
	touch $@ $(VENV)/.for-demo

$(VENV)/.for-docs: pyproject.toml | $(VENV)/.torch
	$(PIP) -e '.[docs]'
	touch $@ $(VENV)/.for-demo
