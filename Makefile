# Every target does its own set-up: the first one that needs it makes .venv/.
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
# The version that the GPU machines carry; `make test-newest` takes the newest release.
JAX_VERSION ?= 0.11.2
EXTRAS := test,dev
STAMP := $(VENV)/.installed
AOT := $(CURDIR)/$(VENV:.venv%=.aot%)

.PHONY: help setup demo test test-fast test-kernels test-faults test-rdma test-ray aot run-test-ray test-newest lint proto clean
help:
	@echo "make demo         run a real batch file through the shipped model"
	@echo "make test         lint, types and all tests"
	@echo "make test-fast    tests that take under ten seconds each"
	@echo "make test-kernels GPU kernels, on a machine without a GPU"
	@echo "make test-faults  clusters whose processes are killed at work"
	@echo "make test-rdma    RDMA verbs, in an emulated machine with soft-RoCE"
	@echo "make test-ray     clusters whose engines Ray places, in .venv-ray/"
	@echo "make aot          what the GPU compiler makes of the kernels, without a GPU"
	@echo "make test-newest  all tests with the newest JAX, in .venv-newest/"
	@echo "make lint         ruff and mypy"
	@echo "make proto        the modules of server/proto/*.proto"

setup: $(STAMP)

$(STAMP): pyproject.toml
	@set -e; found=""; \
	for candidate in "$$PYTHON" python3.12 python3.13 python3.14 python3 \
	    $$(ls -d $$HOME/.pyenv/versions/3.1[2-9]*/bin/python3 2>/dev/null); do \
	  [ -n "$$candidate" ] || continue; \
	  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then \
	    found="$$candidate"; break; \
	  fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "jaxdual needs Python 3.12 or newer with venv; none found on PATH or under ~/.pyenv/versions." >&2; \
	  echo "Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; \
	fi; \
	echo "setting up $(VENV)/ with $$($$found --version) ..."; \
	$$found -m venv $(VENV); \
	$(PY) -m pip install --quiet --disable-pip-version-check --upgrade pip; \
	if [ "$(JAX_VERSION)" = newest ]; then jax=jax; else jax="jax==$(JAX_VERSION)"; fi; \
	$(PY) -m pip install --quiet --disable-pip-version-check "$$jax" -e '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP)
	$(PY) -m jaxdual.offline -i examples/batch.jsonl -o build/demo.jsonl --report build/demo-report.json --overwrite --show

# Two at a time: most of a test's time is one thread's, compiling.
test: lint
	$(PY) -m pytest -n 2 --dist loadfile -m "not kernels and not faults and not rdma and not ray"

test-fast: $(STAMP)
	$(PY) -m pytest -m "not slow and not kernels and not faults and not rdma and not ray"

# JAX's CUDA plugin alone, beside the environment: enough to compile with the tools of a CUDA installation.
$(AOT)/.installed: $(STAMP)
	rm -rf $(AOT)
	version=$$($(PY) -c 'import jax; print(jax.__version__)') && \
	$(PY) -m pip install -q --no-deps --target $(AOT) jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version
	touch $@

# Processes of clusters killed at work: what every request becomes, and what is left behind.
test-faults: $(STAMP)
	$(PY) -m pytest -m faults

# RDMA by soft-RoCE in an emulated machine, which is made in .rdma/ at first; four to six minutes.
test-rdma: $(STAMP)
	timeout --foreground -k 10 600 tests/rdma/run.sh $(PY)

# Ray has an environment of its own: it brings many packages.
test-ray:
	$(MAKE) run-test-ray VENV=.venv-ray EXTRAS=test,dev,ray

run-test-ray: $(STAMP)
	$(PY) -m pytest -m ray

aot: $(AOT)/.installed
	mkdir -p build
	PYTHONPATH=$(AOT) $(PY) -m bench.aot --json build/aot.json --docs docs/kernels.md

# XLA's pool of threads must hold all warpgroups of an interpreted kernel, which wait for each other.
test-kernels: $(STAMP) $(if $(wildcard /usr/local/cuda/bin/ptxas),$(AOT)/.installed)
	PJRT_NPROC=16 JAXDUAL_AOT=$(AOT) $(PY) -m pytest -m kernels -rs

test-newest:
	$(MAKE) test VENV=.venv-newest JAX_VERSION=newest

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The modules made here are committed, so that nobody needs the compiler to install or run.
proto: $(STAMP)
	$(PY) -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. $$(find server/proto -name '*.proto')

clean:
	rm -rf build .mypy_cache .ruff_cache .hypothesis
