#!/usr/bin/env bash
# Runs all tests. The stories (`tests/it`) run side by side with dozens of real servers on few cores; where a machine stands
# still for a moment, a service rightly distrusts its cache, and a story that expects a hit fails. So stories that failed are
# told again, each alone, once other machines leave this one its processors (for which five minutes are waited in all): once,
# and if that fails twice more, which must both pass. Those that fail alone fail; those that pass are named, as unsteady.
set -euo pipefail
cd "$(dirname "$0")/.."
most=32
wait_until=300
log=$(mktemp)
trap 'rm -f "$log"' EXIT

cargo test --locked --no-fail-fast 2>&1 | tee "$log" && exit 0

# Cargo names what failed at the end: nothing but the stories may have.
failed=$(sed -n 's/^    `\(.*\)`$/\1/p' "$log")
stories=$(sed -n 's/^test \([^ ]*\) \.\.\. FAILED$/\1/p' "$log" | sort -u)
count=$(printf '%s' "$stories" | grep -c . || true)
if [ "$failed" != "--test it" ] || [ "$count" -eq 0 ] || [ "$count" -gt "$most" ]; then
  echo "failed: ${failed:-the build}" >&2
  exit 1
fi

# How much of two busy seconds other machines have, in percent: it can't be seen while this one is idle.
stolen() {
  local before after
  before=$(awk '/^cpu /{print $9, $2+$3+$4+$5+$6+$7+$8+$9}' /proc/stat)
  for _ in $(seq "$(nproc)"); do timeout 2 sh -c 'while :; do :; done' & done
  wait
  after=$(awk '/^cpu /{print $9, $2+$3+$4+$5+$6+$7+$8+$9}' /proc/stat)
  echo "$before $after" | awk '{print int(100 * ($3 - $1) / ($4 - $2))}'
}
calm() {
  local since=$SECONDS
  while [ "$wait_until" -gt 0 ] && [ "$(stolen)" -gt 15 ]; do
    sleep 10
    wait_until=$((wait_until - SECONDS + since)) since=$SECONDS
  done
}
alone() { calm && cargo test --locked --test it -- --exact "$1"; }
for story in $stories; do
  echo "once more, alone: $story"
  alone "$story" || { alone "$story" && alone "$story"; } || { echo "failed alone: $story" >&2; exit 1; }
done
echo "unsteady, but sound alone:" $stories
