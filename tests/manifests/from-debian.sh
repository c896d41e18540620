#!/usr/bin/env bash
# from-debian.sh PROGRAM FOLDER: a program out of the Debian package of its name, without installing that. A server would
# start, and a package of a newer release would bring its libraries along. The lists are kept apart from the machine's own,
# and no rights are needed. Where there is no Debian, nothing happens.
set -euo pipefail
release=trixie
program=$1 folder=$2

command -v apt-get > /dev/null && command -v dpkg-deb > /dev/null || exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{state/lists,cache/archives}/partial
# The machine's own mirror, if it has one.
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2> /dev/null | grep -m1 '/debian/\?$' || true)
printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n' "${mirror:-http://deb.debian.org/debian}" \
  $release /usr/share/keyrings/debian-archive-keyring.gpg > "$work/debian.sources"
apt=(apt-get -qq -o Dir::Etc::sourcelist="$work/debian.sources" -o Dir::Etc::sourceparts=- -o Dir::State="$work/state"
  -o Dir::Cache="$work/cache" -o Dir::State::status=/dev/null -o APT::Sandbox::User= -o Acquire::Languages=none)
"${apt[@]}" update
cd "$work"
"${apt[@]}" download "$program"
dpkg-deb -x "$program"_*.deb tree
cp "tree/usr/bin/$program" "$folder/"
