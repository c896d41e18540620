# Sourced by the others: sets $me and $master.
# What the sentinels say comes first. Where none answers, everything is new, and number 0 is the master.
me="$HOSTNAME.cache-aside-sentinel"
master=cache-aside-sentinel-0.cache-aside-sentinel
for peer in 0 1 2; do
  known=$(env -u REDISCLI_AUTH timeout 2 redis-cli -h "cache-aside-sentinel-$peer.cache-aside-sentinel" -p 26379 --raw \
    sentinel get-master-addr-by-name cache-aside 2>/dev/null | head -n 1) || true
  case "$known" in
    cache-aside-sentinel-*) master=$known; break ;;
  esac
done
