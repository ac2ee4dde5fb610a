# Two commands: `make demo` and `make test`. Everything else serves them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
UV_VERSION := 0.13.9
# uv from PATH, else bootstrapped into the checkout.
UV := $(or $(shell command -v uv),.nitsum/uv/bin/uv)
RUN := $(UV) run --no-sync
unexport PYTHONDONTWRITEBYTECODE
# The first of them that is new enough: where there is a python3.11, python3 may be an older one or missing.
PYTHON := $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
NEEDS_PYTHON = $(if $(PYTHON),true,echo "missing: Python 3.11 or later: apt install python3.11"; exit 1)
# A home that cannot be written, as in some CI: caches go into the checkout.
ifneq ($(shell c="$${XDG_CACHE_HOME:-$$HOME/.cache}"; mkdir -p "$$c" 2>/dev/null && test -w "$$c" && echo yes),yes)
export XDG_CACHE_HOME := $(CURDIR)/.nitsum/cache
export GOPATH := $(CURDIR)/.nitsum/go
endif
.NOTPARALLEL:

.PHONY: help
help: ## What there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

.nitsum/uv/bin/uv:
	@echo "uv is not installed: getting $(UV_VERSION) into .nitsum/uv"
	@$(NEEDS_PYTHON)
	@$(PYTHON) -m venv .nitsum/uv || { echo "missing: Python's venv: apt install $(PYTHON)-venv, or put uv on PATH"; exit 1; }
	@.nitsum/uv/bin/pip install -q --disable-pip-version-check uv==$(UV_VERSION)

.PHONY: preflight
preflight: ## What this machine lacks, each with its remedy
	@$(NEEDS_PYTHON)
	@PYTHONPATH=local PYTHONDONTWRITEBYTECODE=1 $(PYTHON) -m nitsum_local.preflight

# Tests and demo run on CPU, where SGLang never calls FlashInfer but imports it wherever it is installed: 2 s of each import.
# For a GPU: uv sync --extra engine
CPU_ONLY := --no-install-package flashinfer-python
.PHONY: sync
sync: $(if $(filter .nitsum/%,$(UV)),.nitsum/uv/bin/uv) ## The Python environment, as uv.lock says
	@$(UV) sync --frozen --extra engine --extra profile --extra report --group models $(CPU_ONLY)

.PHONY: generate
generate: sync ## Python code of the protobuf contracts
	$(RUN) proto/generate.sh

.PHONY: lint
lint: sync ## Format, lint, types, import directions, contracts
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy
	$(RUN) lint-imports
	$(RUN) buf lint
	$(RUN) proto/generate.sh --check

.PHONY: binaries
binaries: sync ## etcd, kube-apiserver, kube-controller-manager, helm: built once, then cached
	@$(RUN) python -m nitsum_local.binaries >/dev/null

NO_BROWSER = NOT TESTED: no browser opened the report page. chromium is missing: apt-get install chromium, as root
.PHONY: browser
browser: ## chromium, in which a test opens the report page: installed where it is missing, by root on Debian
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
		&& echo "chromium is missing: apt-get installs it" && export DEBIAN_FRONTEND=noninteractive \
		&& timeout 120 apt-get update -qq && timeout 300 apt-get install -qq -y --no-install-recommends chromium >/dev/null; } \
		|| echo "$(NO_BROWSER)"

.PHONY: test
test: preflight lint binaries browser ## Everything, from lint to the end-to-end test
	$(RUN) pytest tests/unit tests/property tests/sim tests/golden -n 2 -q
	$(RUN) pytest tests/engine -n 2 --dist loadfile -q
	@# Alone: it looks at all that is left on the machine.
	$(RUN) pytest tests/e2e/test_demo_interrupt.py -q
	@# The planner flips by the demand that the machine can serve, so beside the system's tests is room for light ones only.
	$(RUN) pytest tests/e2e tests/cluster --ignore tests/e2e/test_demo_interrupt.py -n 2 --dist loadfile --no-loadscope-reorder -q
	@command -v chromium >/dev/null || echo "$(NO_BROWSER)"

.PHONY: demo
demo: preflight sync ## The main job, live (KEEP=1 stays up)
	$(RUN) python -m nitsum_local.demo $(if $(KEEP),--keep)
