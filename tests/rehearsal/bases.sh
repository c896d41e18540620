#!/usr/bin/env bash
# Makes the images that the Dockerfile and the local overlay name, out of Debian's packages and this machine's Rust, for
# machines that reach no registry. What is in the local storage already, pulled or made, stays.
set -euo pipefail
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

there() { buildah inspect --type image "$1" > /dev/null 2>&1; }
debian() { mmdebstrap --quiet --variant=minbase --include="$1" bookworm "$work/base.tar"; }

rust=$(sed -n 's/^ARG RUST_IMAGE=//p' ../../Dockerfile)
if ! there "$rust"; then
  debian ca-certificates,gcc,libc6-dev
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$work/base.tar" / > /dev/null
  buildah add --quiet "$container" "$(rustc --print sysroot)" /usr/local/rust > /dev/null
  buildah config --env PATH=/usr/local/rust/bin:/usr/sbin:/usr/bin:/sbin:/bin --env CARGO_HOME=/usr/local/cargo "$container"
  buildah commit --quiet --rm "$container" "$rust" > /dev/null
fi

redis=$(sed -n 's/^ *image: \(.*redis:.*\)/\1/p' ../../kustomize/components/redis/deployment.yaml)
if ! there "$redis"; then
  debian redis-server
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$work/base.tar" / > /dev/null
  tree=$(buildah mount "$container")
  # The real image has none, and podman gives a volume the rights of the folder that it covers.
  rm -r "$tree/etc/redis"
  buildah umount "$container" > /dev/null
  buildah config --env PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
  buildah commit --quiet --rm "$container" "$redis" > /dev/null
fi

postgres=$(sed -n 's/^ *image: \(.*postgres:.*\)/\1/p' ../../kustomize/components/postgres-local/stateful-set.yaml)
if ! there "$postgres"; then
  debian postgresql
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$work/base.tar" / > /dev/null
  buildah add --quiet --chmod 755 "$container" docker-entrypoint.sh /usr/local/bin/ > /dev/null
  tree=$(buildah mount "$container")
  # The number that the real image gives to the user; the server asks for a name.
  echo 'postgres-image:x:999:999::/:/bin/sh' >> "$tree/etc/passwd"
  buildah umount "$container" > /dev/null
  version=$(tar -tf "$work/base.tar" | sed -n 's|.*/usr/lib/postgresql/\([0-9]*\)/bin/postgres$|\1|p')
  buildah config --env PATH="/usr/lib/postgresql/$version/bin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" \
    --entrypoint '["docker-entrypoint.sh"]' "$container"
  buildah commit --quiet --rm "$container" "$postgres" > /dev/null
fi
