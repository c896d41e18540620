#!/usr/bin/env bash
# A Valkey server for the tests, in target/servers, where the machine has none: out of Debian's package, not installed.
# Debian 12 has it among its backports; they are asked for this one package and not enabled. The libraries that it needs
# are those of redis-server.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=target/servers

command -v valkey-server > /dev/null && exit 0
[ -x $here/valkey-server ] && $here/valkey-server --version > /dev/null && exit 0
release=$(. /etc/os-release 2> /dev/null && [ "${ID:-}" = debian ] && echo "${VERSION_CODENAME:-trixie}" || true)
[ -n "$release" ] || { echo "valkey-server is missing, and this is no Debian: its tests will say so" >&2; exit 0; }
[ "$release" = bookworm ] && release=bookworm-backports
mkdir -p $here
tests/manifests/from-debian.sh valkey-server $here "$release" valkey-server valkey-tools
