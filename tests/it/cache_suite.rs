//! One contract for every cache adapter: the same states, the same verdicts.

use std::time::Duration;

use bytes::Bytes;
use cache_aside::cache::entry::{self, Fence};
use cache_aside::cache::memcached::MemcachedCache;
use cache_aside::cache::memory::MemoryCache;
use cache_aside::cache::redis::RedisCache;
use cache_aside::cache::{AnyCache, Cache, CacheError, Fill, Filled, Lease, Lookup, Place, Ticket};
use cache_aside::config::{Config, Env};

use crate::app::PATIENCE;
use crate::servers::{Kind, Memcached, Redis};

const LOCK: Duration = Duration::from_secs(30);

pub fn place(key: &str) -> Place<'_> {
    Place {
        key,
        resource: "fruit",
        shape: 1,
        groups: &[],
        local_ttl: Duration::ZERO,
        filtered: false,
        refreshes: 0,
        strict: false,
    }
}

fn value(text: &'static str, ttl: Duration, grace: Duration) -> Fill {
    let payload = Bytes::from_static(text.as_bytes());
    Fill {
        etag: entry::etag(&payload),
        payload,
        negative: false,
        truncated: false,
        ttl,
        grace,
        cost: Duration::ZERO,
        origin: 0,
    }
}

pub fn lasting(text: &'static str) -> Fill {
    value(text, Duration::from_mins(1), Duration::ZERO)
}

/// What it answers, once it is trusted: a handle that did not look after its connection for a second says nothing, however
/// busy the machine was meanwhile.
async fn answer<T>(ask: impl AsyncFn() -> Result<T, CacheError>) -> T {
    let started = std::time::Instant::now();
    loop {
        match ask().await {
            Err(CacheError::Untrusted) if started.elapsed() < PATIENCE => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            answer => return answer.expect("it answers"),
        }
    }
}

pub async fn lease(cache: &AnyCache, key: &str) -> Lease {
    answer(async || cache.lease(&[place(key)], LOCK).await).await.remove(0)
}

/// A lease on an entry past its TTL. A reader's idea of the server's clock may be a millisecond ahead.
async fn lease_soft(cache: &AnyCache, key: &str) -> Lease {
    loop {
        match lease(cache, key).await {
            Lease::Hit(_) => tokio::time::sleep(Duration::from_millis(1)).await,
            lease => return lease,
        }
    }
}

pub async fn ticket(cache: &AnyCache, key: &str) -> Ticket {
    match lease(cache, key).await {
        Lease::Fill { ticket, .. } => ticket,
        other => panic!("{key}: {other:?}"),
    }
}

pub async fn fill(cache: &AnyCache, key: &str, ticket: Ticket, fill: Fill) -> Filled {
    cache.fill(&[(place(key), ticket, fill)]).await.expect("it answers").remove(0)
}

async fn read(cache: &AnyCache, key: &str) -> Lookup {
    answer(async || cache.read(place(key)).await).await
}

async fn payload(cache: &AnyCache, key: &str) -> String {
    match read(cache, key).await {
        Lookup::Fresh(entry) => String::from_utf8(entry.payload.to_vec()).expect("it is text"),
        other => panic!("{key}: {other:?}"),
    }
}

/// Waits for what a lookup says, never for a time.
async fn until(cache: &AnyCache, key: &str, what: impl Fn(&Lookup) -> bool) {
    let started = std::time::Instant::now();
    while !what(&read(cache, key).await) {
        assert!(started.elapsed() < PATIENCE, "{key} never became so");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Everything that the heart relies on. `other` is a second handle on the same memory.
pub async fn contract(cache: &AnyCache, other: &AnyCache, prefix: &str) {
    let key = |name: &str| format!("{prefix}{name}");

    let filled = key("filled");
    assert_eq!(read(cache, &filled).await, Lookup::Absent);
    let first = ticket(cache, &filled).await;
    assert_eq!(read(cache, &filled).await, Lookup::Pending);
    assert_eq!(lease(other, &filled).await, Lease::Wait { stale: None }, "one filler at a time");
    assert_eq!(fill(cache, &filled, first, lasting("{}")).await, Filled::Stored);
    assert_eq!(payload(other, &filled).await, "{}");
    assert!(matches!(lease(other, &filled).await, Lease::Hit(_)));
    assert_eq!(fill(cache, &filled, first, lasting("late twin")).await, Filled::Fenced);
    assert_eq!(payload(cache, &filled).await, "{}");

    let gone = key("gone");
    let before = ticket(cache, &gone).await;
    other.invalidate(&[&gone]).await.expect("it answers");
    assert_eq!(fill(cache, &gone, before, lasting("old")).await, Filled::Gone, "an invalidation destroys the fence");
    assert_eq!(read(cache, &gone).await, Lookup::Absent);

    let fenced = key("fenced");
    let before = ticket(cache, &fenced).await;
    other.invalidate(&[&fenced]).await.expect("it answers");
    let after = ticket(other, &fenced).await;
    assert_ne!(before.fence, after.fence, "never the same fence twice");
    assert_eq!(fill(cache, &fenced, before, lasting("old")).await, Filled::Fenced);
    assert_eq!(fill(other, &fenced, after, lasting("new")).await, Filled::Stored);
    assert_eq!(payload(cache, &fenced).await, "new");
    cache.invalidate(&[&fenced]).await.expect("it answers");
    cache.invalidate(&[&fenced, &key("never there")]).await.expect("idempotent");
    assert_eq!(read(cache, &fenced).await, Lookup::Absent);

    let forged = key("forged");
    ticket(cache, &forged).await;
    let forger = Ticket { fence: Fence([7; 16]), ..first };
    assert_eq!(fill(cache, &forged, forger, lasting("x")).await, Filled::Fenced);
    cache.release(&[(place(&forged), forger)]).await.expect("it answers");
    assert_eq!(read(cache, &forged).await, Lookup::Pending, "only the holder gives a lease back");

    let released = key("released");
    let held = ticket(cache, &released).await;
    cache.release(&[(place(&released), held)]).await.expect("it answers");
    assert_eq!(read(cache, &released).await, Lookup::Absent);
    assert_eq!(fill(cache, &released, held, lasting("x")).await, Filled::Gone);

    let lapsed = key("lapsed");
    let short = cache.lease(&[place(&lapsed)], Duration::from_millis(30)).await.expect("it answers").remove(0);
    let Lease::Fill { ticket: short, .. } = short else { panic!("{short:?}") };
    until(cache, &lapsed, |lookup| *lookup == Lookup::Absent).await;
    assert_eq!(fill(cache, &lapsed, short, lasting("x")).await, Filled::Gone, "a lock ends by itself");

    let renewed = key("renewed");
    let short = cache.lease(&[place(&renewed)], Duration::from_millis(200)).await.expect("it answers").remove(0);
    let Lease::Fill { ticket: short, .. } = short else { panic!("{short:?}") };
    cache.renew(&[(place(&renewed), short)], LOCK).await.expect("it answers");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(fill(cache, &renewed, short, lasting("slow")).await, Filled::Stored, "a live filler keeps it");

    soft(cache, other, &key("soft")).await;
    ahead(cache, other, &key("ahead")).await;
    shapes(cache, &key("shape")).await;
    holds(cache, other, &key("reserved")).await;
    groups(cache, other, prefix).await;

    let many: Vec<String> = (0..50).map(|index| key(&format!("many{index}"))).collect();
    let places: Vec<Place<'_>> = many.iter().map(|key| place(key)).collect();
    let leases = other.lease(&places, LOCK).await.expect("it answers");
    let fills: Vec<_> = places
        .iter()
        .zip(leases)
        .map(|(place, lease)| match lease {
            Lease::Fill { ticket, .. } => (*place, ticket, lasting("many")),
            other => panic!("{other:?}"),
        })
        .collect();
    assert!(other.fill(&fills).await.expect("it answers").iter().all(|filled| *filled == Filled::Stored));
    let lookups = cache.read_many(&places).await.expect("it answers");
    assert!(lookups.iter().all(|lookup| matches!(lookup, Lookup::Fresh(_))));

    let name = key("kept");
    let kept = Place { resource: "users", ..place(&name) };
    let Lease::Fill { ticket: held, .. } = cache.lease(&[kept], LOCK).await.expect("it answers").remove(0) else {
        panic!("it is new")
    };
    cache.fill(&[(kept, held, lasting("kept"))]).await.expect("it answers");
    cache.purge("fruit").await.expect("it answers");
    let started = std::time::Instant::now();
    loop {
        // While it learns of the new generation it may refuse to answer, but never answer with what was purged.
        match (cache.read(place(&filled)).await, cache.read(kept).await) {
            (Ok(Lookup::Absent), Ok(Lookup::Fresh(_))) => break,
            (Ok(Lookup::Fresh(_)), _) => panic!("a purged entry was served"),
            (_, Ok(Lookup::Absent)) => panic!("another resource lost its entry"),
            _ => {}
        }
        assert!(started.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What is fresh is refreshed ahead by one, stays a hit for all, and is not brought back by its refresher.
async fn ahead(cache: &AnyCache, other: &AnyCache, key: &str) {
    let seen = async |cache: &AnyCache| match read(cache, key).await {
        Lookup::Fresh(entry) => entry.stored_at,
        other => panic!("{other:?}"),
    };
    let lease = async |cache: &AnyCache, refreshes| {
        cache.lease(&[Place { refreshes, ..place(key) }], LOCK).await.expect("it answers").remove(0)
    };
    let first = ticket(cache, key).await;
    assert_eq!(fill(cache, key, first, lasting("old")).await, Filled::Stored);
    let old = seen(cache).await;
    assert!(matches!(lease(cache, 0).await, Lease::Hit(_)));
    assert!(matches!(lease(cache, old + 1).await, Lease::Hit(_)), "it is another");
    let Lease::Fill { ticket: refresh, stale: Some(there) } = lease(cache, old).await else { panic!("nobody has it") };
    assert_eq!(there.payload, "old");
    assert!(matches!(lease(other, old).await, Lease::Wait { stale: Some(_) }), "one refreshes");
    assert!(matches!(lease(other, 0).await, Lease::Hit(_)), "to all others it is a hit");
    assert_eq!(payload(other, key).await, "old");
    until(cache, key, |lookup| matches!(lookup, Lookup::Fresh(entry) if entry.age_ms > 0)).await;
    assert_eq!(fill(cache, key, refresh, lasting("new")).await, Filled::Stored);
    assert_eq!(payload(other, key).await, "new");
    assert!(matches!(lease(other, old).await, Lease::Hit(_)), "it was refreshed meanwhile");
    let Lease::Fill { ticket: late, .. } = lease(other, seen(other).await).await else { panic!("nobody has it") };
    cache.invalidate(&[key]).await.expect("it answers");
    assert_eq!(fill(other, key, late, lasting("old")).await, Filled::Gone);
    // A refresh outlives the entry's own end.
    let short = ticket(cache, key).await;
    let brief = value("short", Duration::from_millis(1500), Duration::ZERO);
    assert_eq!(fill(cache, key, short, brief).await, Filled::Stored);
    let Lease::Fill { ticket: refresh, .. } = lease(cache, seen(cache).await).await else { panic!("nobody has it") };
    // The clock by which it is read is an estimate.
    until(cache, key, |lookup| matches!(lookup, Lookup::Soft(entry) if entry.ttl_ms < -50)).await;
    assert!(matches!(lease(other, 0).await, Lease::Wait { .. }), "its refresher is not overtaken");
    assert_eq!(fill(cache, key, refresh, lasting("long")).await, Filled::Stored);
    assert_eq!(payload(other, key).await, "long");
}

/// An entry past its TTL: one refreshes it, others see it, and an invalidation takes it all the same.
async fn soft(cache: &AnyCache, other: &AnyCache, key: &str) {
    let held = ticket(cache, key).await;
    fill(cache, key, held, value("old", Duration::from_millis(1), Duration::from_mins(1))).await;
    until(cache, key, |lookup| matches!(lookup, Lookup::Soft(_))).await;
    let Lease::Fill { ticket: refresh, stale: Some(stale) } = lease_soft(cache, key).await else {
        panic!("it is soft")
    };
    assert_eq!(stale.payload, "old");
    assert!(stale.ttl_ms <= 0, "{stale:?}");
    assert!(matches!(lease(other, key).await, Lease::Wait { stale: Some(_) }), "one refresher at a time");
    assert!(matches!(read(other, key).await, Lookup::Soft(_)), "the old value stays meanwhile");
    cache.renew(&[(place(key), refresh)], LOCK).await.expect("it answers");
    assert_eq!(fill(cache, key, refresh, lasting("new")).await, Filled::Stored);
    assert_eq!(payload(other, key).await, "new");

    let again = format!("{key}2");
    let held = ticket(cache, &again).await;
    fill(cache, &again, held, value("old", Duration::from_millis(1), Duration::from_mins(1))).await;
    until(cache, &again, |lookup| matches!(lookup, Lookup::Soft(_))).await;
    let Lease::Fill { ticket: refresh, .. } = lease_soft(cache, &again).await else { panic!("it is soft") };
    cache.release(&[(place(&again), refresh)]).await.expect("it answers");
    assert!(matches!(read(cache, &again).await, Lookup::Soft(_)), "a refresh given back leaves the value");
    let refresh = ticket(other, &again).await;
    cache.invalidate(&[&again]).await.expect("it answers");
    assert_eq!(fill(other, &again, refresh, lasting("late")).await, Filled::Gone);
}

/// Entries of another shape are as good as absent.
async fn shapes(cache: &AnyCache, key: &str) {
    let held = ticket(cache, key).await;
    fill(cache, key, held, lasting("{}")).await;
    let reshaped = Place { shape: 2, ..place(key) };
    assert_eq!(cache.read(reshaped).await, Ok(Lookup::Absent));
    let inspected = cache.inspect(reshaped).await.expect("it answers");
    assert_eq!(inspected.state, "unusable");
    assert_eq!(cache.inspect(place(key)).await.expect("it answers").state, "valid");
}

/// A writer's hold keeps everybody out until its owner or time ends it.
/// What depends on groups is only as good as they are, and so is a fill that began before one was dropped.
async fn groups(cache: &AnyCache, other: &AnyCache, prefix: &str) {
    let (key, group) = (format!("{prefix}grouped"), format!("{prefix}cache-aside:group:x"));
    let groups = [group.clone()];
    let place = Place { groups: &groups, ..place(&key) };
    let lease = async || match cache.lease(&[place], LOCK).await.expect("it answers").remove(0) {
        Lease::Fill { ticket, .. } => ticket,
        other => panic!("{other:?}"),
    };
    let fill = async |ticket| cache.fill(&[(place, ticket, lasting("grouped"))]).await.expect("it answers").remove(0);
    let held = lease().await;
    other.invalidate(&[&group]).await.expect("it answers");
    assert_eq!(fill(held).await, Filled::Fenced, "nobody may share what was loaded before that");
    assert_eq!(cache.read(place).await, Ok(Lookup::Absent));
    let held = lease().await;
    assert_eq!(fill(held).await, Filled::Stored);
    assert!(matches!(cache.read(place).await, Ok(Lookup::Fresh(_))));
    // A writer may hold a group as well.
    let owner = Fence::new().expect("randomness");
    other.hold(&[&group], owner, LOCK).await.expect("it answers");
    assert_eq!(cache.read(place).await, Ok(Lookup::Absent));
    let leased = cache.lease(&[place], LOCK).await;
    assert!(matches!(leased.as_deref(), Ok([Lease::Past]) | Err(_)), "{leased:?}");
    other.invalidate_unless_held(&[&group], Some(owner)).await.expect("it answers");
    assert_eq!(cache.read(place).await, Ok(Lookup::Absent), "what was there is from before");
    let held = lease().await;
    other.invalidate_unless_held(&[&group], None).await.expect("it answers");
    assert_eq!(fill(held).await, Filled::Fenced, "a round drops groups this way too");
}

async fn holds(cache: &AnyCache, other: &AnyCache, key: &str) {
    let (one, two) = (Fence::new().expect("randomness"), Fence::new().expect("randomness"));
    let filling = ticket(cache, key).await;
    other.hold(&[key], one, LOCK).await.expect("it answers");
    assert_eq!(fill(cache, key, filling, lasting("old")).await, Filled::Fenced);
    assert_eq!(read(cache, key).await, Lookup::Absent);
    assert_eq!(lease(cache, key).await, Lease::Past, "nobody fills");
    assert_eq!(cache.inspect(place(key)).await.expect("it answers").state, "held");
    cache.invalidate_unless_held(&[key], None).await.expect("it answers");
    cache.invalidate_unless_held(&[key], Some(two)).await.expect("it answers");
    assert_eq!(lease(cache, key).await, Lease::Past, "others leave it alone");
    cache.hold(&[key], two, LOCK).await.expect("it answers");
    other.invalidate_unless_held(&[key], Some(one)).await.expect("it answers");
    assert_eq!(lease(cache, key).await, Lease::Past, "a later writer's is not the earlier one's to end");
    cache.invalidate_unless_held(&[key], Some(two)).await.expect("it answers");
    let held = ticket(cache, key).await;
    assert_eq!(fill(cache, key, held, lasting("new")).await, Filled::Stored);
    cache.hold(&[key], one, Duration::from_millis(20)).await.expect("it answers");
    while lease(cache, key).await == Lease::Past {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    cache.invalidate_unless_held(&[key], None).await.expect("it answers");
    assert_eq!(read(cache, key).await, Lookup::Absent, "what nobody holds goes");
}

pub fn config(yaml: &str) -> cache_aside::config::Cache {
    let text = format!("database: {{ url: \"sqlite::memory:\" }}\nresources: {{ a: {{}} }}\n{yaml}");
    Config::from_yaml(&text, "test", &Env::default()).expect("it is sound").cache
}

#[tokio::test]
async fn memory_keeps_the_contract() {
    let cache = AnyCache::Memory(MemoryCache::new(1 << 20, 1 << 16, None));
    contract(&cache, &cache.attach(), "").await;
}

#[tokio::test]
async fn memory_is_bounded_in_bytes() {
    let memory = MemoryCache::new(1 << 20, 1 << 16, None);
    let cache = AnyCache::Memory(memory.clone());
    let text: &'static str = Box::leak("x".repeat(10_000).into_boxed_str());
    for index in 0..1_000 {
        let key = format!("k{index}");
        let held = ticket(&cache, &key).await;
        fill(&cache, &key, held, lasting(text)).await;
    }
    assert!(memory.bytes() <= 1 << 20, "{}", memory.bytes());
    let large: &'static str = Box::leak("x".repeat(60_000).into_boxed_str());
    let held = ticket(&cache, "large").await;
    fill(&cache, "large", held, lasting(large)).await;
    assert_eq!(payload(&cache, "large").await.len(), 60_000, "the largest entry still fits");
}

async fn connected(redis: &Redis, prefix: &str) -> AnyCache {
    reached(&format!("url: \"{}\", key_prefix: \"{prefix}\"", redis.url())).await
}

async fn reached(cache: &str) -> AnyCache {
    let yaml = format!("cache: {{ {cache}, timeout: 5s }}");
    let cache = AnyCache::Redis(RedisCache::new(&config(&yaml), None, false).expect("the URL is sound"));
    trusted(&cache).await;
    cache
}

pub async fn trusted(cache: &AnyCache) {
    let started = std::time::Instant::now();
    while cache.health().is_err() {
        assert!(started.elapsed() < PATIENCE, "never connected");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn redis_keeps_the_contract() {
    keeps_the_contract(Kind::Redis).await;
}

pub async fn keeps_the_contract(kind: Kind) {
    let redis = Redis::start_as(kind, &[]).await;
    keeps(&format!("url: \"{}\", key_prefix: \"p:\"", redis.url()), "p:").await;
}

/// The contract for the cache that these lines of `cache:` name.
pub async fn keeps(lines: &str, prefix: &str) {
    let cache = reached(lines).await;
    let other = cache.attach();
    trusted(&other).await;
    contract(&cache, &other, prefix).await;
}

/// What one handle packs, another reads: fresh, past its TTL, and while it is refreshed.
async fn packed(packing: &AnyCache, plain: &AnyCache, key: &str) {
    let text: &'static str = Box::leak("{\"name\":\"apple\"},".repeat(200).into_boxed_str());
    let held = ticket(packing, key).await;
    fill(packing, key, held, value(text, Duration::from_millis(1), Duration::from_mins(1))).await;
    until(plain, key, |lookup| matches!(lookup, Lookup::Soft(entry) if entry.payload == text)).await;
    let size = plain.inspect(place(key)).await.expect("it answers").size;
    assert!(size < text.len() / 4, "{size}");
    let Lease::Fill { ticket: refresh, stale: Some(stale) } = lease_soft(plain, key).await else {
        panic!("it is soft")
    };
    assert_eq!((stale.payload.as_ref(), stale.etag), (text.as_bytes(), entry::etag(text.as_bytes())));
    assert!(matches!(lease(packing, key).await, Lease::Wait { stale: Some(stale) } if stale.payload == text));
    assert!(matches!(read(plain, key).await, Lookup::Soft(entry) if entry.payload == text));
    assert_eq!(fill(plain, key, refresh, lasting(text)).await, Filled::Stored);
    assert!(plain.inspect(place(key)).await.expect("it answers").size > text.len());
    assert_eq!(payload(packing, key).await, text);
    packing.invalidate(&[key]).await.expect("it answers");
    let held = ticket(packing, key).await;
    assert_eq!(fill(packing, key, held, lasting(text)).await, Filled::Stored);
    assert_eq!(payload(plain, key).await, text);
    assert!(matches!(lease(plain, key).await, Lease::Hit(entry) if entry.payload == text));
}

#[tokio::test]
async fn what_is_packed_in_redis_is_read_by_everybody() {
    let redis = Redis::start().await;
    let lines = format!("url: \"{}\", key_prefix: \"p:\"", redis.url());
    let (packing, plain) = (reached(&format!("{lines}, compress_above: 100B")).await, reached(&lines).await);
    packed(&packing, &plain, "p:packed").await;
}

#[tokio::test]
async fn what_is_packed_in_memcached_is_read_by_everybody() {
    let memcached = Memcached::start().await;
    let packing = connected_with(&memcached, "p:", ", compress_above: 100B").await;
    packed(&packing, &connected_to(&memcached, "p:").await, "p:packed").await;
}

#[tokio::test]
async fn redis_forgets_its_scripts_and_its_data_without_harm() {
    forgets(Kind::Redis).await;
}

pub async fn forgets(kind: Kind) {
    let redis = Redis::start_as(kind, &[]).await;
    let cache = connected(&redis, "p:").await;
    let client = redis::Client::open(redis.url()).expect("the URL is sound");
    let mut beside = client.get_multiplexed_async_connection().await.expect("it answers");
    let held = ticket(&cache, "p:a").await;
    redis::cmd("SCRIPT").arg("FLUSH").exec_async(&mut beside).await.expect("it answers");
    assert_eq!(fill(&cache, "p:a", held, lasting("{}")).await, Filled::Stored);
    let held = ticket(&cache, "p:b").await;
    redis::cmd("FLUSHALL").exec_async(&mut beside).await.expect("it answers");
    assert_eq!(fill(&cache, "p:b", held, lasting("{}")).await, Filled::Gone);
    // With the control key gone the generations are unknown: a new epoch, and nothing older counts.
    let started = std::time::Instant::now();
    loop {
        if let Ok(lookup) = cache.read(place("p:a")).await {
            assert_eq!(lookup, Lookup::Absent);
            if cache.health().is_ok()
                && redis::cmd("EXISTS").arg("p:cache-aside:control").query_async(&mut beside).await == Ok(1)
            {
                break;
            }
        }
        assert!(started.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_lease_that_is_sent_again_with_others_is_still_whose_it_is() {
    let redis = Redis::start().await;
    let mut client = redis.client().await;
    let script = redis::Script::new(include_str!("../../src/cache/redis/lease.lua"));
    let fence = || Fence::new().expect("there is some randomness");
    let (one, other) = (fence(), fence());
    for key in ["absent", "soft"] {
        if key == "soft" {
            let fill = value("{}", Duration::from_millis(1), Duration::from_hours(1));
            let soft = entry::valid(key, 1, 1, &fill, 1_000, None);
            redis::cmd("SET").arg(key).arg(&soft[..]).exec_async(&mut client).await.expect("it answers");
        }
        for (fence, verdict) in [(one, "fill"), (one, "fill"), (other, "wait")] {
            let mut lease = script.key(key);
            lease.arg(entry::pending(key, fence, 1, 1)).arg(60_000).arg(0);
            let said: Vec<Vec<u8>> = lease.invoke_async(&mut client).await.expect("it answers");
            assert_eq!(said.first().map(Vec::as_slice), Some(verdict.as_bytes()), "{key}");
        }
    }
}

#[tokio::test]
async fn a_control_key_that_says_nothing_is_made_anew() {
    let redis = Redis::start().await;
    let cache = connected(&redis, "").await;
    let held = ticket(&cache, "a").await;
    fill(&cache, "a", held, lasting("{}")).await;
    let client = redis::Client::open(redis.url()).expect("the URL is sound");
    let mut beside = client.get_multiplexed_async_connection().await.expect("it answers");
    let mut spoil = redis::cmd("HSET");
    spoil.arg("cache-aside:control").arg("epoch").arg("no number").exec_async(&mut beside).await.expect("it answers");
    let started = std::time::Instant::now();
    while cache.read(place("a")).await != Ok(Lookup::Absent) {
        assert!(started.elapsed() < PATIENCE, "nothing older may count, and what is new must");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let held = ticket(&cache, "b").await;
    assert_eq!(fill(&cache, "b", held, lasting("{}")).await, Filled::Stored);
    assert_eq!(payload(&cache, "b").await, "{}");
}

#[tokio::test]
async fn foreign_bytes_under_a_key_are_absent_and_replaced() {
    foreign_bytes(Kind::Redis).await;
}

pub async fn foreign_bytes(kind: Kind) {
    let redis = Redis::start_as(kind, &[]).await;
    let cache = connected(&redis, "").await;
    let client = redis::Client::open(redis.url()).expect("the URL is sound");
    let mut beside = client.get_multiplexed_async_connection().await.expect("it answers");
    let held = ticket(&cache, "mine").await;
    fill(&cache, "mine", held, lasting("mine")).await;
    for (key, bytes) in [("empty", vec![]), ("text", b"{\"id\":1}".to_vec()), ("noise", vec![0xC3; 200])] {
        redis::cmd("SET").arg(key).arg(bytes).exec_async(&mut beside).await.expect("it answers");
    }
    // A whole entry, but another key's: what a reply that went astray would look like.
    redis::cmd("COPY").arg("mine").arg("theirs").exec_async(&mut beside).await.expect("it answers");
    for key in ["empty", "text", "noise", "theirs"] {
        assert_eq!(read(&cache, key).await, Lookup::Absent, "{key}");
        let held = ticket(&cache, key).await;
        assert_eq!(fill(&cache, key, held, lasting("{}")).await, Filled::Stored, "{key}");
    }
    redis::cmd("RPUSH").arg("list").arg("x").exec_async(&mut beside).await.expect("it answers");
    assert_eq!(cache.read(place("list")).await, Err(CacheError::Refused), "no string at all");
    cache.invalidate(&["list"]).await.expect("it answers");
    assert_eq!(read(&cache, "list").await, Lookup::Absent);
}

#[tokio::test]
async fn a_redis_that_is_full_refuses_fills_and_takes_invalidations() {
    full(Kind::Redis).await;
}

pub async fn full(kind: Kind) {
    let redis = Redis::start_as(kind, &["--maxmemory", "4mb", "--maxmemory-policy", "noeviction"]).await;
    let cache = connected(&redis, "").await;
    let held = ticket(&cache, "a").await;
    fill(&cache, "a", held, lasting("{}")).await;
    let late = ticket(&cache, "late").await;
    let client = redis::Client::open(redis.url()).expect("the URL is sound");
    let mut beside = client.get_multiplexed_async_connection().await.expect("it answers");
    // Full is not a line but a shore: the server's own buffers come and go.
    let mut index = 0;
    while cache.lease(&[place(&format!("b{index}"))], LOCK).await != Err(CacheError::Refused) {
        let mut set = redis::cmd("SET");
        // It fails once the server is full, which is what is wanted.
        let _ = set.arg(format!("ballast{index}")).arg(vec![0_u8; 4096]).exec_async(&mut beside).await;
        index += 1;
        assert!(index < 20_000, "it never filled up");
    }
    let large: &'static str = Box::leak("x".repeat(100_000).into_boxed_str());
    assert_eq!(cache.fill(&[(place("late"), late, lasting(large))]).await, Err(CacheError::Refused));
    cache.invalidate(&["a"]).await.expect("deleting needs no memory");
    assert_eq!(read(&cache, "a").await, Lookup::Absent);
}

#[tokio::test]
async fn a_lease_on_what_is_absent_needs_no_script() {
    no_script(Kind::Redis).await;
}

pub async fn no_script(kind: Kind) {
    let redis = Redis::start_as(kind, &[]).await;
    let cache = connected(&redis, "").await;
    let mut beside = redis.client().await;
    let stats = async |of: &str, conn: &mut redis::aio::MultiplexedConnection| {
        let info: String = redis::cmd("INFO").arg("commandstats").query_async(conn).await.expect("it answers");
        let line = info.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{of}:calls="))).unwrap_or("0");
        line.split(',').next().and_then(|count| count.parse::<u32>().ok()).expect("a number")
    };
    let before = (stats("set", &mut beside).await, stats("evalsha", &mut beside).await);
    ticket(&cache, "a").await;
    assert_eq!(stats("set", &mut beside).await, before.0 + 1);
    assert_eq!(stats("evalsha", &mut beside).await, before.1, "SET NX GET does it alone");
}

async fn connected_to(memcached: &Memcached, prefix: &str) -> AnyCache {
    connected_with(memcached, prefix, "").await
}

async fn connected_with(memcached: &Memcached, prefix: &str, more: &str) -> AnyCache {
    let yaml = format!("cache: {{ url: \"{}\", key_prefix: \"{prefix}\", timeout: 5s{more} }}", memcached.url());
    let cache = AnyCache::Memcached(MemcachedCache::new(&config(&yaml), None).expect("the URL is sound"));
    trusted(&cache).await;
    cache
}

#[tokio::test]
async fn memcached_keeps_the_contract() {
    let memcached = Memcached::start().await;
    let cache = connected_to(&memcached, "p:").await;
    let other = cache.attach();
    trusted(&other).await;
    contract(&cache, &other, "p:").await;
}
