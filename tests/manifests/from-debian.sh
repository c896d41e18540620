#!/usr/bin/env bash
# from-debian.sh PROGRAM FOLDER [RELEASE [PACKAGE…]]: a program out of Debian's packages (of its name, unless others are
# named), without installing them. A server would start, and a package of a newer release would bring its libraries along.
# The lists are kept apart from the machine's own, and no rights are needed. Where there is no Debian, nothing happens.
set -euo pipefail
program=$1 folder=$(realpath "$2") release=${3:-trixie}
packages=("${@:4}")
[ ${#packages[@]} -gt 0 ] || packages=("$program")

command -v apt-get > /dev/null && command -v dpkg-deb > /dev/null || exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{state/lists,cache/archives}/partial
# The machine's own mirror, if it has one.
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2> /dev/null | grep -m1 '/debian/\?$' || true)
printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n' "${mirror:-http://deb.debian.org/debian}" \
  "$release" /usr/share/keyrings/debian-archive-keyring.gpg > "$work/debian.sources"
apt=(apt-get -qq -o Dir::Etc::sourcelist="$work/debian.sources" -o Dir::Etc::sourceparts=- -o Dir::State="$work/state"
  -o Dir::Cache="$work/cache" -o Dir::State::status=/dev/null -o APT::Sandbox::User= -o Acquire::Languages=none)
"${apt[@]}" update
cd "$work"
for package in "${packages[@]}"; do
  "${apt[@]}" download "$package"
  dpkg-deb -x "$package"_*.deb tree
done
# Where it is a link to a program of another name, that one, under this name.
cp "tree/usr/bin/$program" "$folder/$program"
