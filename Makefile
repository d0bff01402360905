# The commands of Pressroom. Everything they need is set up by themselves.
PYTHON ?= python3
VENV := .venv/bin
SRC := $(wildcard libs/*/src services/*/src)
CHECKED := libs services tests tools

export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: checks-env help setup up down test test-fast unit-gateway unit-rest lint models protos

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Make the environment as the lock says
	@$(PYTHON) libs/devstack/src/devstack/bootstrap.py

up: setup ## Start the system: environment, models, servers, services, sample collection
	@./pressroom up

down: ## Stop what make up started, and nothing else
	@if [ -x $(VENV)/python ]; then ./pressroom down; else echo "Nothing is running."; fi

models: setup
	@$(VENV)/python -m modelstore.prepare --store "$${PRESSROOM_HOME:-.pressroom}/models"

protos: setup ## Generate the code of changed protos; publish what was added, unless something was broken
	$(VENV)/buf lint proto
	$(VENV)/buf breaking proto --against proto/published.binpb
	$(VENV)/python tools/gen_protos.py
	$(VENV)/buf build proto --exclude-source-info -o proto/published.binpb

lint: setup ## Style and types
	$(VENV)/ruff check $(CHECKED)
	$(VENV)/ruff format --check $(CHECKED)
	$(VENV)/mypy $(SRC)

checks-env: ## Make the environment of the tools that check k8s/ (.venv-checks)
	@$(PYTHON) tools/checks_env.py

test: setup models checks-env lint ## Everything: lint, unit, contract, integration, and end to end through the running system
	$(VENV)/python -m pytest -m "not e2e"
	$(VENV)/python -m pytest -m e2e

test-fast: setup ## Unit tests alone, in two halves at once: under a minute
	@$(MAKE) --no-print-directory --output-sync=target -j2 unit-gateway unit-rest

UNIT := -q -p no:cacheprovider -m "not integration and not e2e"
unit-gateway:
	@$(VENV)/python -m pytest $(UNIT) services/gateway

unit-rest:
	@$(VENV)/python -m pytest $(UNIT) --ignore=services/gateway
