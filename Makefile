# The verbs of daily work. CI calls the same ones.
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-cluster lint bench fuzz load tools clean

CARGO ?= cargo

help: ## what the verbs are
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

demo: ## a gateway, an agent and an API server on loopback, and real requests through the tunnel (ONCE=1: run and exit; REAL=1: the current kubeconfig's cluster)
	$(CARGO) build --workspace --bins $(BUILD)
	$${CARGO_TARGET_DIR:-target}/debug/towline-loadtest demo $(if $(ONCE),--once) $(if $(REAL),--use-kubeconfig)

test: tools ## every test but the slow ones, and a summary of what failed and what was skipped (TEST="rules:: join::": those with such names)
	CARGO=$(CARGO) .ci/test $(TEST)

test-slow: tools ## the tests that take minutes by design: kills, outages, lossy networks (TOWLINE_LONG=1: at full length)
	CARGO=$(CARGO) .ci/test --slow $(TEST)

test-cluster: ## a real one-node cluster without Docker, a gateway and agents in it: root on Linux, and Go to build Kubernetes, once (CHECKS="an_eviction_is_not_noticed": only that)
	CARGO=$(CARGO) loadtest/cluster/run $(CHECKS)

lint: ## format, clippy, documentation, and the rules of this tree: a pure core, who imports whom, one dialect, ids in docs/requirements.md, what is linked
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --document-private-items
	.ci/purity
	.ci/layers --self-test
	.ci/layers
	.ci/ids
	.ci/dialect
	.ci/deny

bench: ## what the core costs without I/O, and whether its instruction counts, or those of a whole request, have grown
	$(CARGO) bench -p towline-proto --bench core
	.ci/instructions
	.ci/per-request --gate

fuzz: ## every fuzz target for FUZZ_SECONDS (60); FUZZ=core: only those of the core
	proto/fuzz/run.sh $(or $(FUZZ_SECONDS),60) $(FUZZ)

load: ## the load test: Towline beside no tunnel, bare copy loops and its peers (LOAD="http --rounds 1": a part of it)
	.ci/tools load
	$(CARGO) build --release --workspace --bins
	$${CARGO_TARGET_DIR:-target}/release/towline-loadtest load $(LOAD)

tools: ## what the tests use beside Rust, where it can be had (kubectl, proxies, balancers)
	.ci/tools

clean:
	$(CARGO) clean
