# The recipes that people and continuous integration share.
.PHONY: demo test lint servers bench drill

demo: ## Serve the demo: no configuration, no servers
	cargo run --release

test: servers lint ## Everything: lints, unit tests, and stories on real servers
	cargo test --locked
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --quiet

lint:
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings

servers: ## Install PostgreSQL and Redis from Debian's packages, where they are missing
	@ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 && command -v redis-server >/dev/null && command -v setpriv >/dev/null && command -v openssl >/dev/null || { \
	  sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$sudo apt-get update -q && DEBIAN_FRONTEND=noninteractive $$sudo apt-get install -y -q --no-install-recommends \
	    postgresql redis-server util-linux openssl; }

drill: servers ## Every fault in turn against three replicas, for ten minutes: prints how old each read was
	cargo test --locked --release --test drill -- --seconds 15 --mode $(or $(MODE),outbox)

bench: servers ## What lanes save against checking a connection out for every read
	cargo bench --locked
