# A Rust toolchain, Python 3.9 or later and make are all that these need, but for Java in `test-sdks`, a C++ compiler in
# `fuzz`, Maven and a JDK 25 in `e2e`, and a Docker engine in `image` and `test-docker`; Node and Go come as Python wheels.

PYTHON ?= python3
BUILD = cargo build --locked --bin keybrake --example stripe-standin

.DEFAULT_GOAL := help
.PHONY: help demo run test test-sdks test-long soak e2e fuzz bench lint image test-docker test-helm test-k8s

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: ## what a billing flow charges without Keybrake and with it: offline, no Stripe account (DEMO=--json for machines)
	@$(BUILD)
	@$(PYTHON) tests/demo/demo.py $(DEMO)

run: ## a sidecar in front of your own Stripe account; asks for the key that it lacks
	@sh docker/run.sh

test: ## all tests: those of Rust, then the real Stripe SDKs of Python and Node against a sidecar
	$(BUILD)
	cargo test --locked $(IGNORED)
	$(PYTHON) tests/sdk/setup.py --node --localstripe >/dev/null
	"$$($(PYTHON) tests/sdk/setup.py)" -m pytest tests/sdk

# What cannot be installed fails the tests that need it, not the others.
test-sdks: ## the real Stripe SDKs of Go and Java (needs a JDK and Maven), and Stripe's own check of what is forwarded
	$(BUILD)
	-$(PYTHON) tests/sdk/setup.py --go --java >/dev/null
	"$$($(PYTHON) tests/sdk/setup.py)" -m pytest tests/sdk/more

test-long: export KEYBRAKE_TEST_KILL_ROUNDS ?= 50
test-long: export KEYBRAKE_TEST_MUTATIONS ?= 50000
test-long: export KEYBRAKE_TEST_FORMS ?= 50000
test-long: export KEYBRAKE_TEST_HISTORIES ?= 10000
test-long: export KEYBRAKE_TEST_FLEET_HISTORIES ?= 500
test-long: export KEYBRAKE_TEST_CUTS ?= 20
test-long: export KEYBRAKE_TEST_QUESTIONS ?= 20
test-long: export KEYBRAKE_TEST_FLEET_ROUNDS ?= 10
# What is left out of the default run for its time.
test-long: IGNORED = -- --include-ignored
test-long: test ## the same with 50 rounds of SIGKILL under load (KEYBRAKE_TEST_KILL_ROUNDS) and many more made-up inputs

soak: ## an hour of 200 requests a second while Stripe fails, then what must be true (SOAK_SECONDS=3600, SOAK_RPS=200)
	$(BUILD)
	$(PYTHON) tests/soak/soak.py

e2e: ## the flows of kestra/ on the real Kestra engine, 1.3 and 2.0, with and without Keybrake (E2E_VERSIONS, E2E_ONLY, KESTRA_URL)
	$(BUILD)
	"$$($(PYTHON) tests/sdk/setup.py)" -m pytest tests/e2e/test_server.py
	"$$($(PYTHON) tests/sdk/setup.py)" tests/e2e/e2e.py $(E2E)

fuzz: ## libFuzzer on what reads requests, FUZZ_SECONDS=60 for each of FUZZ_TARGETS; needs a C++ compiler
	@sh tests/fuzz/run.sh

bench: ## what a call costs, beside nginx (BENCH_ONLY, BENCH_PEERS=1) and in a ledger that grew (GROWTH_CALLS) or a fleet's; audit; a collector
	cargo bench --locked --bench proxy
	cargo bench --locked --bench growth
	cargo bench --locked --bench fleet
	cargo bench --locked --bench audit
	cargo bench --locked --bench collect

lint: ## formatting, clippy and rustdoc, warnings as errors
	cargo fmt --check
	cargo fmt --check --manifest-path tests/fuzz/Cargo.toml
	cargo clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS=-Dwarnings cargo doc --locked --no-deps

IMAGE ?= keybrake:dev
RUST ?= rust:1.95-bookworm

image: ## the container image IMAGE=keybrake:dev: a static binary on nothing, built in RUST=rust:1.95-bookworm
	docker build --file docker/Dockerfile --build-arg RUST=$(RUST) --tag $(IMAGE) .

test-docker: ## image and compose files with a real Docker engine: the one that answers, else (as root) Debian's own
	$(BUILD)
	"$$($(PYTHON) tests/sdk/setup.py)" -m pytest tests/docker

# The chart is Kestra's and not here: `helm pull` it from Kestra's chart repository, unpacked (--untar).
test-helm: ## the overlay of kestra/helm in Kestra's chart, rendered by Helm's engine; CHARTS=kestra, the unpacked chart
	KESTRA_CHARTS="$(CHARTS)" "$$($(PYTHON) tests/helm/setup.py)" -m pytest tests/helm

MUSL = $(shell uname -m)-unknown-linux-musl
test-k8s: export KEYBRAKE_TEST_BUILT ?= $(or $(CARGO_TARGET_DIR),target)/$(MUSL)/release
# Debian's musl-tools, containerd, runc, containernetworking-plugins, etcd-server, busybox-static, postgresql, and Go or its
# wheel.
test-k8s: ## CHARTS=kestra installed in a real Kubernetes of one node, which is built first; needs root and an hour once
	rustup target add $(MUSL)
	cargo build --locked --release --target $(MUSL) --bin keybrake --example stripe-standin
	$(PYTHON) tests/helm/setup.py --kubernetes >/dev/null
	KESTRA_CHARTS="$(CHARTS)" KEYBRAKE_TEST_KUBERNETES="$$($(PYTHON) tests/helm/setup.py --kubernetes | tail -n 1)" \
	  "$$($(PYTHON) tests/helm/setup.py)" -m pytest -s tests/helm/node
