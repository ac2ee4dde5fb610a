# Two commands: `make demo` and `make test`. Everything else serves them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
UV_VERSION := 0.13.9
# uv from PATH, else bootstrapped into the checkout.
UV := $(or $(shell command -v uv),.nitsum/uv/bin/uv)
RUN := $(UV) run --no-sync
unexport PYTHONDONTWRITEBYTECODE
# The first Python that is new enough; else python3, so that the preflight can say what is wrong with it.
PYTHON = $(or $(shell for p in .venv/bin/python python3 python3.14 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done),python3)

.PHONY: help
help: ## What there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

.nitsum/uv/bin/uv:
	@echo "uv is not installed: getting $(UV_VERSION) into .nitsum/uv"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "missing: Python 3.11 or later: apt install python3.11"; exit 1; }
	@$(PYTHON) -m venv .nitsum/uv && .nitsum/uv/bin/pip install -q uv==$(UV_VERSION)

.PHONY: sync
sync: $(if $(filter .nitsum/%,$(UV)),.nitsum/uv/bin/uv) ## The Python environment, as uv.lock says
	@$(UV) sync --frozen --extra engine --group models

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
	$(RUN) proto/generate.sh >/dev/null 2>&1 && git diff --exit-code --stat -- proto

.PHONY: test
test: lint ## Everything, from lint to the end-to-end test
	$(RUN) pytest tests/unit tests/property tests/golden -n 2 -q
	@for d in cluster engine e2e; do if compgen -G "tests/$$d/test_*.py" >/dev/null; then $(RUN) pytest tests/$$d -q || exit 1; fi; done

.PHONY: preflight
preflight: ## What this machine lacks for the demo, each with its remedy
	@command -v python3 >/dev/null || { echo "missing: Python 3.11 or later: apt install python3.11"; exit 1; }
	@PYTHONPATH=local $(PYTHON) -m nitsum_local.preflight

.PHONY: demo
demo: preflight ## The main job, live (KEEP=1 stays up)
	@$(MAKE) --no-print-directory sync
	@$(RUN) python -m nitsum_local.demo $(if $(KEEP),--keep)
