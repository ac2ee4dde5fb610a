# Two commands: `make demo` and `make test`. Everything else serves them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
UV_VERSION := 0.13.9
# uv from PATH, else bootstrapped into the checkout.
UV := $(or $(shell command -v uv),.nitsum/uv/bin/uv)
RUN := $(UV) run --no-sync
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help
help: ## What there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

.nitsum/uv/bin/uv:
	@echo "uv is not installed: getting $(UV_VERSION) into .nitsum/uv"
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "nitsum needs Python 3.11 or later; $$(python3 --version) is here"; exit 1; }
	@python3 -m venv .nitsum/uv && .nitsum/uv/bin/pip install -q uv==$(UV_VERSION)

.PHONY: sync
sync: $(if $(filter .nitsum/%,$(UV)),.nitsum/uv/bin/uv) ## The Python environment, as uv.lock says
	@$(UV) sync --frozen --extra engine --extra profile --group models

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

.PHONY: binaries
binaries: sync ## etcd, kube-apiserver, kube-controller-manager, helm: built once, then cached
	@$(RUN) python -m nitsum_local.binaries >/dev/null

.PHONY: test
test: lint binaries ## Everything, from lint to the end-to-end test
	$(RUN) pytest tests/unit tests/property tests/golden -n 2 -q
	@for d in cluster engine e2e; do if compgen -G "tests/$$d/test_*.py" >/dev/null; then $(RUN) pytest tests/$$d -q || exit 1; fi; done

.PHONY: demo
demo: sync ## The main job, live (KEEP=1 stays up)
	$(RUN) python -m nitsum_local.demo $(if $(KEEP),--keep)
