# The recipes that people and continuous integration share.
.PHONY: demo test lint manifests rehearse image servers bench drill drill-fire walkthrough hot

demo: ## Serve the demo: no configuration, no servers
	cargo run --release

test: servers lint ## Everything: lints, unit tests, stories on real servers, and what a cluster gets
	tests/run.sh
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --quiet
	$(MAKE) manifests

lint:
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	@for features in "" redis memcached "redis,postgres" mysql sqlite; do \
	  echo "the library with the features: $${features:-none}"; \
	  cargo clippy --locked --quiet --lib --no-default-features --features "$$features" -- -D warnings || exit 1; done

manifests: ## Render and judge what a cluster gets: manifests, alerts, configuration, Dockerfile
	cargo build --locked --quiet
	tests/manifests/install.sh
	target/manifests/venv/bin/python -B tests/manifests/check.py

rehearse: ## Image, local overlay, Traefik, Prometheus and a roll under load, without a cluster (root, Debian)
	tests/rehearsal/run.sh

IMAGE ?= ghcr.io/cache-aside/cache-aside
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
BUILDER ?= $(firstword $(foreach tool,docker podman buildah,$(if $(shell command -v $(tool)),$(tool))))
image: ## Build the image with docker, podman or buildah; BUILD_ARGS for more
	$(BUILDER) build --build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD) $(BUILD_ARGS) -t $(IMAGE):$(VERSION) .

servers: ## PostgreSQL, MariaDB, Redis and Memcached from Debian's packages, where they are missing, and Valkey beside them
	@ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 && command -v redis-server >/dev/null && command -v memcached >/dev/null && ls /usr/sbin/mariadbd >/dev/null 2>&1 && command -v setpriv >/dev/null && command -v openssl >/dev/null || { \
	  sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$sudo apt-get update -q && DEBIAN_FRONTEND=noninteractive $$sudo apt-get install -y -q --no-install-recommends \
	    postgresql mariadb-server redis-server memcached util-linux openssl; }
	@tests/it/valkey.sh

drill: servers ## Every fault in turn against three replicas, for ten minutes: prints how old each read was
	cargo test --locked --release --test drill -- --seconds 15 --mode $(or $(MODE),outbox) --cache $(or $(CACHE),redis) --standby $(or $(STANDBY),no)

FIRES := stampede hot cache-killed cache-hung flush slow-database permits idle roll
drill-fire: servers ## Herds, a dead cache, a slow database under load, one after the other: prints who had to wait, as ratios
	ulimit -n $$(ulimit -Hn) && cargo test --locked --release --test fire -- --drill all

.PHONY: $(FIRES:%=drill-%)
$(FIRES:%=drill-%): drill-%: servers ## One of them; PLOT=FILE for where drill-flush draws
	ulimit -n $$(ulimit -Hn) && cargo test --locked --release --test fire -- --drill $* $(if $(PLOT),--plot $(PLOT))

bench: servers ## What lanes save against checking a connection out for every read
	cargo bench --locked --bench lanes

walkthrough: servers ## What an answer takes from the database and from the cache, for the statements of docs/walkthrough.md
	cargo bench --locked --bench walkthrough

hot: servers ## What local_hot_ttl and compress_above cost and save: CPU per read and bytes, as ratios
	cargo bench --locked --bench hot
