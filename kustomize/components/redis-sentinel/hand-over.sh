#!/bin/sh
# Before a master stops, another takes over: nobody has to wait until the sentinels miss it.
[ "$(redis-cli --raw role | head -n 1)" = master ] || exit 0
for peer in 0 1 2; do
  sentinel="cache-aside-sentinel-$peer.cache-aside-sentinel"
  answer=$(env -u REDISCLI_AUTH timeout 2 redis-cli -h "$sentinel" -p 26379 --raw sentinel failover cache-aside 2>/dev/null)
  [ "$answer" = OK ] && break
done
# Until the sentinels name the other one. This one would still call itself the master for some seconds; it need not wait.
for _ in 1 2 3 4 5 6 7 8 9 10; do
  . /etc/redis/find-master.sh
  [ "$master" = "$me" ] || exit 0
  sleep 1
done
