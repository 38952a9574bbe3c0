# Everything a newcomer types. Needs git, make and Python 3.11 or newer; the rest is fetched when it is first needed.
.DEFAULT_GOAL := help
SHELL := /bin/sh
PYTHON := .venv/bin/python
LOCAL := $(PYTHON) -m taskmesh_local
# Decides what a fault campaign does, and when.
SEED ?= 1
MINUTES ?= 60
FAULTS = $(LOCAL) faults --seed $(SEED) --report .taskmesh-faults/seed-$(SEED).json
# Made by deploy/local/bootstrap once the workspace is installed; older than the lock means: install again.
INSTALLED := .venv/.installed
# Processes that run tests; many of these wait, so there may be more than cores.
JOBS ?= 4
# `make test RABBITMQ=4`, `make up RABBITMQ=4`: see docs/rabbitmq.md.
export TASKMESH_RABBITMQ := $(or $(RABBITMQ),$(TASKMESH_RABBITMQ))
# Many an image sets it: each process of a mesh would compile our own code again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install up down status logs demo traces test faults faults-long faults-planted faults-alerts bench bench-quick bench-telemetry costs scaling dashboards k8s-tools k8s-check k8s-render images check fmt

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(INSTALLED): uv.lock pyproject.toml $(wildcard shared/pyproject.toml services/*/pyproject.toml deploy/*/pyproject.toml) deploy/local/bootstrap
	@deploy/local/bootstrap
	@touch $@

install: $(INSTALLED) ## Install the workspace into .venv, nothing else

up: $(INSTALLED) ## Start the whole mesh, or one process: make up name=gateway-api
	@$(LOCAL) up $(name)

down: $(INSTALLED) ## Stop everything; the data stays (make down purge=1 deletes it)
	@$(LOCAL) down $(if $(purge),--purge)

status: $(INSTALLED) ## Show every process, and whether it is up
	@$(LOCAL) status

logs: $(INSTALLED) ## Print the logs: make logs name=billing-worker follow=1
	@$(LOCAL) logs $(name) $(if $(follow),--follow)

demo: $(INSTALLED) ## Send 30 invoices through the mesh and watch them; starts the mesh when it is down
	@$(LOCAL) demo $(args)

traces: $(INSTALLED) ## Send 1,000 requests through the mesh, and check that each has left one whole trace
	@$(LOCAL) thousand $(args)

test: $(INSTALLED) ## Run all tests but the fault campaign, with real servers they start themselves; RABBITMQ=4 takes that release
	@$(PYTHON) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not faults" $(args)

faults: $(INSTALLED) ## Kill and cut off parts of a mesh under load for 4 minutes, and check it: make faults SEED=2
	@$(FAULTS) --minutes 4 $(args)

faults-long: $(INSTALLED) ## The same for an hour: make faults-long SEED=2 MINUTES=15
	@$(FAULTS) --minutes $(MINUTES) $(args)

faults-planted: $(INSTALLED) ## Plant bugs in the mesh, and check that a campaign finds them
	@$(PYTHON) -m pytest -m faults tests/faults $(args)

faults-alerts: $(INSTALLED) ## Provoke the fault of each alert in a mesh that a real Prometheus watches
	@$(PYTHON) -m pytest -m faults tests/observability $(args)

# The programs that Taskmesh is measured against are in the group `bench`: nothing else installs them.
RIVALS := .venv/.rivals
$(RIVALS): $(INSTALLED)
	@echo "installing what Taskmesh is measured against (uv sync)" >&2
	@UV_PYTHON_DOWNLOADS=never .taskmesh/tools/bin/uv sync --frozen --quiet --inexact --group bench --python $(PYTHON)
	@touch $@
BENCH = PYTHONPATH=bench $(PYTHON) -m meshbench

bench: $(RIVALS) ## Measure Taskmesh against others, 10 to 15 minutes: make bench args="--only submit --rounds 5"
	@$(BENCH) $(args)

bench-quick: $(RIVALS) ## The first cases of it in 90 seconds; records, and never fails on a figure
	@$(BENCH) --quick $(args)

bench-telemetry: $(INSTALLED) ## Measure what telemetry costs the gateway and a worker
	@$(PYTHON) bench/telemetry.py $(args)

costs: $(INSTALLED) ## Measure what a task costs each part of the mesh that is up, for docs/scaling.md: make costs args="--tasks 200"
	@$(LOCAL) costs --write $(args)

scaling: $(INSTALLED) ## Run the examples of docs/scaling.md, and write their output and pictures anew
	@$(LOCAL) examples docs/scaling.md

check: $(INSTALLED) ## Lint, formatting, types, and who may import whom
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy -p taskmesh -p gateway -p billing_worker -p email_worker -p taskmesh_local -p taskmesh_observability -p meshbench
	@.venv/bin/lint-imports

dashboards: $(INSTALLED) ## Write the Grafana dashboards from their description in deploy/observability
	@PYTHONPATH=deploy/observability/src $(PYTHON) -m taskmesh_observability
	@$(PYTHON) deploy/k8s/copy-observability

# Other people's checkers of manifests, in an environment of their own.
MANIFEST_TOOLS := .taskmesh/manifest-tools
$(MANIFEST_TOOLS)/.installed: tests/deploy/tools/uv.lock $(INSTALLED)
	@echo "installing the checkers of manifests (uv sync)" >&2
	@UV_PROJECT_ENVIRONMENT=$(CURDIR)/$(MANIFEST_TOOLS) UV_PYTHON_DOWNLOADS=never \
		.taskmesh/tools/bin/uv sync --frozen --quiet --project tests/deploy/tools --python $(PYTHON)
	@touch $@

k8s-tools: $(MANIFEST_TOOLS)/.installed

k8s-check: $(INSTALLED) k8s-tools ## Check deploy/k8s: everything that needs no cluster
	@$(PYTHON) -m pytest tests/deploy $(args)

k8s-render: ## Render every overlay into dist/, for kubectl apply -f
	@mkdir -p dist
	@for overlay in deploy/k8s/overlays/*/; do kubectl kustomize $$overlay > dist/$$(basename $$overlay).yaml || exit 1; done

images: ## Build the images of the three services: make images TAG=0.1.0 (docker, podman or buildah)
	@TAG=$(or $(TAG),dev) deploy/images/build

fmt: $(INSTALLED) ## Format the code, and mend what the linter can mend
	@$(PYTHON) -m ruff check --fix-only --quiet .
	@$(PYTHON) -m ruff format .
