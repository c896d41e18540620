#!/bin/sh
# Ready: the master, or a replica that has the master's data. A roll goes on only then.
set -eu
redis-cli -e --raw info replication | tr -d '\r' | grep -qE '^(role:master|master_link_status:up)$'
