# The commands of Pressroom. Everything they need is set up by themselves.
PYTHON ?= python3
VENV := .venv/bin
SRC := $(wildcard libs/*/src services/*/src) loadtest tools/bench_engine tools/bench_gateway tools/bench_overload
CHECKED := libs services loadtest tests tools

export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help setup checks-env vllm-env clients-env test-clients up down test test-fast test-vllm unit-gateway unit-services unit-rest lint models protos compose-env loadtest \
	bench-load bench-perplexity bench-colocation bench-usage bench-gateway bench-engine bench-behaviour bench-greedy bench-gpu bench-overload llama-server

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Make the environment as the lock says
	@$(PYTHON) libs/devstack/src/devstack/bootstrap.py

up: setup ## Start the system: environment, models, servers, services, sample collection
	@./pressroom up

down: ## Stop what make up started, and nothing else
	@if [ -x $(VENV)/python ]; then ./pressroom down; else echo "Nothing is running."; fi

compose-env: ## Make the secrets that docker-compose.yml asks for: .env, kept if it is there
	@$(PYTHON) tools/compose_env.py

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
	@$(PYTHON) tools/side_env.py checks

vllm-env: ## Make the environment that vLLM runs in for test-vllm and bench-engine (.venv-vllm, 3.3 GB)
	@$(PYTHON) tools/side_env.py vllm

test-vllm: setup models vllm-env ## The engine suite against a real vLLM on the CPU; not a part of make test
	$(VENV)/python -m pytest -m vllm services/generator

clients-env: ## Make the environment of clients from outside for test-clients (.venv-clients, 2.4 GB)
	@$(PYTHON) tools/side_env.py clients

test-clients: setup models clients-env ## tritonclient, lm-eval, guidellm and aiperf, unchanged, against a system of its own; not a part of make test
	$(VENV)/python -m pytest -m clients tests/clients

test: setup models checks-env lint ## Everything: lint, unit, contract, integration, and end to end through the running system
	$(VENV)/python -m pytest -m "not e2e and not vllm and not clients"
	$(VENV)/python -m pytest -m e2e

test-fast: setup ## Unit tests alone, in three parts at once: under a minute
	@$(MAKE) --no-print-directory --output-sync=target -j3 unit-gateway unit-services unit-rest

UNIT := -q -p no:cacheprovider -m "not integration and not e2e and not vllm and not clients"
unit-gateway:
	@$(VENV)/python -m pytest $(UNIT) services/gateway

unit-services:
	@$(VENV)/python -m pytest $(UNIT) services --ignore=services/gateway

unit-rest:
	@$(VENV)/python -m pytest $(UNIT) libs loadtest tests

# One of USERS=n, STEPS=1,2,4, TRACE=file or RATE=n; with DURATION=30s, TRAFFIC=chat|grounded|mixed, OUT=folder, PAGE=1,
# and ARGS for everything else (ARGS=--help lists it). loadtest/README.md explains.
LOAD := $(if $(USERS),--users $(USERS) --spawn-rate $(USERS) --run-time $(or $(DURATION),60s)) \
	$(if $(USERS),,$(if $(DURATION),--run-time $(DURATION))) \
	$(if $(TRACE),--arrivals trace --trace $(TRACE)) $(if $(RATE),--arrivals poisson --rate $(RATE)) \
	$(if $(STEPS),--steps $(STEPS)) $(if $(STEP_TIME),--step-time $(STEP_TIME)) \
	$(if $(TRAFFIC),--traffic $(TRAFFIC)) $(if $(OUT),--out $(OUT)) $(if $(PAGE),--page) $(ARGS)
USUAL_LOAD := --steps 1,2,4,8,16,32

loadtest: setup ## Load on what make up started: rows in CSV, one HTML report with the curves and the knee
	@$(VENV)/python -m loadtest $(or $(strip $(LOAD)),$(USUAL_LOAD))

bench-load: loadtest

bench-perplexity: setup models ## What quantising costs: perplexity in bf16 and packed, on a text of ours, and the ratio
	@$(VENV)/python tools/bench_perplexity.py $(ARGS)

bench-colocation: setup models ## Chat's time per output token alone and beside a finetune, in pairs, and their ratio
	@$(VENV)/python tools/bench_colocation.py $(ARGS)

bench-gateway: setup ## The gateway beside LiteLLM's proxy and Envoy, in front of one mock upstream, in turns (4 minutes)
	@PYTHONPATH=tools $(VENV)/python -m bench_gateway $(ARGS)

# tools/bench_engine/README.md explains; ARGS=--help lists what each takes.
BENCH := PYTHONPATH=tools $(VENV)/python -m bench_engine

bench-usage: setup ## How long reports take over a ledger of a million requests: p50 and p95
	$(VENV)/python tools/bench_usage.py

bench-engine: setup models ## Tokens/s and TTFT of the generator beside OpenVINO, vLLM and llama.cpp, in turns (8 minutes)
	@$(BENCH) speed $(ARGS)

bench-behaviour: setup models ## What the generator promises beside speed: stutter, prefix cache, ragged arrivals, cancels
	@$(BENCH) behaviour $(ARGS)

bench-greedy: setup models ## Greedy text of the generator beside transformers, token by token
	@$(BENCH) greedy $(ARGS)

bench-gpu: setup models ## The torch engine beside transformers' continuous batching on a CUDA device
	@$(BENCH) gpu $(ARGS)

bench-overload: setup ## Goodput of the gateway at 1 to 5 times a backend's capacity, and fairness between two tenants (4 minutes)
	@PYTHONPATH=tools $(VENV)/python -m bench_overload $(ARGS)

llama-server: ## Compile llama.cpp's server for this processor, as a peer of bench-engine (half an hour)
	@$(PYTHON) tools/llama_server.py
