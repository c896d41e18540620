#!/usr/bin/env bash
# Installs what the checks need, into target/manifests and nowhere else. Debian and PyPI are all that is asked.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=$PWD/target/manifests
mkdir -p "$here/tools"

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

# With kustomize 5, which came with 1.27: older ones know no components, or render them differently.
is_recent() { "$1" version --client 2> /dev/null | grep -q 'Kustomize Version: v5'; }
is_recent "$here/tools/kubectl" || is_recent kubectl || tests/manifests/from-debian.sh kubectl "$here/tools"

[ -x "$here/tools/promtool" ] || command -v promtool > /dev/null || tests/manifests/from-debian.sh promtool "$here/tools"

# Made again too if the machine's Python, to which it links, has gone.
if ! cmp -s tests/manifests/requirements.txt "$here/requirements.txt" || ! "$here/venv/bin/python" -c '' 2> /dev/null; then
  rm -rf "$here/venv"
  # Debian has the module in a package of its own.
  python3 -m venv "$here/venv" > /dev/null || {
    as_root apt-get update -qq
    as_root apt-get install -y -qq --no-install-recommends python3-venv > /dev/null
    python3 -m venv --clear "$here/venv"
  }
  "$here/venv/bin/pip" install --quiet --disable-pip-version-check --requirement tests/manifests/requirements.txt
  cp tests/manifests/requirements.txt "$here/requirements.txt"
fi
