#!/bin/sh
# Starts a sentinel that watches the master.
set -eu
# A sentinel ends at a name that nobody knows, and a pod's is not known before it has an address.
. /etc/redis/find-master.sh
until getent hosts "$master" > /dev/null; do
  sleep 1
  . /etc/redis/find-master.sh
done
umask 077
# The identity comes of the name: with one made anew at each start, the others would go on counting the old ones, and
# in the end find no majority.
cat > /run/redis/sentinel.conf <<CONF
port 26379
dir /run/redis
protected-mode no
sentinel resolve-hostnames yes
sentinel announce-hostnames yes
sentinel announce-ip $me
sentinel myid $(printf %s "$HOSTNAME" | sha1sum | cut -c 1-40)
sentinel monitor cache-aside $master 6379 2
sentinel auth-pass cache-aside $REDIS_PASSWORD
sentinel down-after-milliseconds cache-aside 2000
sentinel failover-timeout cache-aside 10000
sentinel parallel-syncs cache-aside 2
CONF
exec redis-server /run/redis/sentinel.conf --sentinel
