#!/usr/bin/env bash
# Installs what the checks need, into target/manifests and nowhere else, and runs them.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=target/manifests
mkdir -p "$here/tools"

if ! command -v kubectl > /dev/null && ! command -v kustomize > /dev/null; then
  echo "kubectl is needed, 1.27 or later: https://kubernetes.io/docs/tasks/tools/" >&2
  exit 1
fi

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

if ! cmp -s tests/manifests/requirements.txt "$here/requirements.txt"; then
  rm -rf "$here/venv"
  # Debian has the module in a package of its own.
  python3 -m venv "$here/venv" || { as_root apt-get install -y -q python3-venv && python3 -m venv --clear "$here/venv"; }
  "$here/venv/bin/pip" install --quiet --requirement tests/manifests/requirements.txt
  cp tests/manifests/requirements.txt "$here/requirements.txt"
fi

# Taken out of its package rather than installed: the package would start a server.
if ! command -v promtool > /dev/null && [ ! -x "$here/tools/promtool" ] && command -v apt-get > /dev/null; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  download() { (cd "$folder" && apt-get download -q prometheus > /dev/null 2>&1); }
  if download || { as_root apt-get update -q > /dev/null && download; }; then
    dpkg-deb -x "$folder"/prometheus_*.deb "$folder/tree"
    cp "$folder/tree/usr/bin/promtool" "$here/tools/"
  fi
fi

exec "$here/venv/bin/python" -B tests/manifests/check.py
