#!/bin/sh
# Starts Redis as what the sentinels say that it is: the master, or a replica of it.
set -eu
. /etc/redis/find-master.sh
umask 077
# A copy, since the sentinels have it rewritten at a failover. It holds the password, so it is in memory only.
{
  cat /etc/redis/redis.conf
  echo "maxmemory $REDIS_MAXMEMORY"
  echo "requirepass \"$REDIS_PASSWORD\""
  echo "masterauth \"$REDIS_PASSWORD\""
  echo "replica-announce-ip $me"
  [ "$master" = "$me" ] || echo "replicaof $master 6379"
} > /run/redis/redis.conf
exec redis-server /run/redis/redis.conf
