//! What is on its way to the cache, and what is thought of a cache that does not answer in time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cache_aside::cache::memcached::MemcachedCache;
use cache_aside::cache::redis::RedisCache;
use cache_aside::cache::{AnyCache, Cache, CacheError, Filled, Lease, Lookup, Ticket};
use cache_aside::shield::State;

use crate::app::PATIENCE;
use crate::cache_suite::{config, fill, lasting, lease, place, ticket, trusted};
use crate::faults::Proxy;
use crate::servers::{Memcached, Redis};

/// A lock that nobody can wait for.
const LOCK: Duration = Duration::from_hours(1);
/// What the handles that are under fire wait for.
const TIMEOUT: Duration = Duration::from_millis(200);

/// A server, and how often it was told to store something.
enum Server {
    Redis(Redis),
    Memcached(Memcached),
}

impl Server {
    fn port(&self) -> u16 {
        match self {
            Self::Redis(redis) => redis.port(),
            Self::Memcached(memcached) => memcached.port(),
        }
    }

    fn pause(&self) {
        match self {
            Self::Redis(redis) => redis.pause(),
            Self::Memcached(memcached) => memcached.pause(),
        }
    }

    fn resume(&self) {
        match self {
            Self::Redis(redis) => redis.resume(),
            Self::Memcached(memcached) => memcached.resume(),
        }
    }

    /// A handle that reaches it at this port, and waits for so long.
    async fn at(&self, port: u16, timeout: Duration) -> AnyCache {
        let yaml = |scheme: &str| format!("cache: {{ url: \"{scheme}://127.0.0.1:{port}\", timeout: {timeout:?} }}");
        let cache = match self {
            Self::Redis(_) => AnyCache::Redis(RedisCache::new(&config(&yaml("redis")), None, false).expect("sound")),
            Self::Memcached(_) => {
                AnyCache::Memcached(MemcachedCache::new(&config(&yaml("memcached")), None).expect("sound"))
            }
        };
        trusted(&cache).await;
        cache
    }

    /// How often something was to be stored, control keys aside.
    async fn stores(&self) -> u64 {
        let (said, start) = match self {
            Self::Redis(redis) => {
                let info: String = redis::cmd("INFO")
                    .arg("commandstats")
                    .query_async(&mut redis.client().await)
                    .await
                    .expect("it answers");
                (info, "cmdstat_set:calls=")
            }
            Self::Memcached(memcached) => (memcached.say(b"stats\r\n", "END").await, "STAT cmd_set "),
        };
        let count = said.lines().find_map(|line| line.strip_prefix(start)).unwrap_or("0");
        count.split(',').next().and_then(|count| count.trim().parse().ok()).expect("a number")
    }
}

async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    let started = Instant::now();
    while !condition().await {
        assert!(started.elapsed() < PATIENCE, "never {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Asks for a lease whose answer is lost, though the server has given it; true if somebody else could have it soon after.
async fn lost(server: &Server, proxy: &Proxy, cache: &AnyCache, other: &AnyCache, key: &str) -> bool {
    until("trusted", async || cache.health().is_ok()).await;
    let before = server.stores().await;
    proxy.mute();
    let leased = cache.lease(&[place(key)], LOCK).await;
    if let Ok(leases) = leased {
        // It was this machine that stood still, and the answer came before that.
        assert!(matches!(leases[..], [Lease::Fill { .. }]), "{leases:?}");
        proxy.restore();
        return false;
    }
    if leased != Err(CacheError::TimedOut) {
        proxy.restore();
        return false;
    }
    let given = soon(async || server.stores().await > before).await;
    // Within the time for which it is tried.
    proxy.restore();
    given && soon(async || matches!(lease(other, key).await, Lease::Fill { .. })).await
}

async fn soon(condition: impl AsyncFn() -> bool) -> bool {
    let started = Instant::now();
    while !condition().await {
        if started.elapsed() > Duration::from_secs(3) {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    true
}

/// A lease whose reply is lost is given back, and nobody else's with it.
async fn given_back(server: &Server) {
    let proxy = Proxy::to(([127, 0, 0, 1], server.port()).into()).await;
    let cache = server.at(proxy.addr().port(), TIMEOUT).await;
    let other = server.at(server.port(), Duration::from_secs(5)).await;
    // On a machine that stands still there may be no time left to give it back.
    let attempts = AtomicU64::new(0);
    until("given back, so everybody waits for a lease that nobody has", async || {
        let attempt = attempts.fetch_add(1, Ordering::Relaxed);
        lost(server, &proxy, &cache, &other, &format!("lost{attempt}")).await
    })
    .await;

    // What was on its way meanwhile is another's by now.
    until("trusted", async || cache.health().is_ok()).await;
    proxy.black_hole();
    let late = cache.lease(&[place("taken")], LOCK).await;
    let taken = ticket(&other, "taken").await;
    proxy.restore();
    assert!(late.is_err(), "{late:?}");
    until("used again", async || read_now(&cache, "taken").await == Ok(Lookup::Pending)).await;
    tokio::time::sleep(TIMEOUT).await;
    assert_eq!(fill(&other, "taken", taken, lasting("{}")).await, Filled::Stored);
}

/// A lease that is asked for again when the answer is late is on its way before the first one is given back, and may be given
/// before that. What then comes frees the first alone.
async fn asked_again(server: &Server) {
    let proxy = Proxy::to(([127, 0, 0, 1], server.port()).into()).await;
    let cache = server.at(proxy.addr().port(), TIMEOUT).await;
    let other = server.at(server.port(), Duration::from_secs(5)).await;
    // A machine that stands still may cost the connection, and what was leased over it.
    for attempt in 0..5 {
        let key = format!("again{attempt}");
        let wanted = [place(&key)];
        until("calm", async || cache.memories()[0].breaker == Some(State::Closed)).await;
        let before = server.stores().await;
        proxy.mute();
        let (mut leased, ()) = tokio::join!(cache.lease(&wanted, LOCK), async {
            // Somebody takes away what nobody has heard of yet: the second will be given at once.
            soon(async || server.stores().await > before).await;
            assert_eq!(other.invalidate(&[&key]).await, Ok(()));
        });
        proxy.restore();
        let started = Instant::now();
        while !matches!(leased.as_deref(), Ok([Lease::Fill { .. }])) {
            assert!(started.elapsed() < PATIENCE, "everybody waits for a lease that nobody has: {leased:?}");
            leased = cache.lease(&wanted, LOCK).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let Ok([Lease::Fill { ticket, .. }]) = leased.as_deref() else { continue };
        tokio::time::sleep(TIMEOUT).await;
        if cache.fill(&[(place(&key), *ticket, lasting("{}"))]).await == Ok(vec![Filled::Stored]) {
            return;
        }
    }
    panic!("a lease was lost with the one before it");
}

#[tokio::test]
async fn a_lease_that_is_asked_of_redis_again_is_not_given_back_with_the_first() {
    asked_again(&Server::Redis(Redis::start().await)).await;
}

#[tokio::test]
async fn a_lease_that_is_asked_of_memcached_again_is_not_given_back_with_the_first() {
    asked_again(&Server::Memcached(Memcached::start().await)).await;
}

/// Nobody waits for leases whose connection is gone: they are not renewed, and given back by whoever wanted to fill.
async fn outlived(server: &Server) {
    let proxy = Proxy::to(([127, 0, 0, 1], server.port()).into()).await;
    let cache = server.at(proxy.addr().port(), Duration::from_secs(5)).await;
    let other = server.at(server.port(), Duration::from_secs(5)).await;
    let leased = cache.lease(&[place("renewed")], Duration::from_millis(500)).await;
    let Ok([Lease::Fill { ticket: renewed, .. }]) = leased.as_deref() else { panic!("{leased:?}") };
    let leased = cache.lease(&[place("filled")], LOCK).await;
    let Ok([Lease::Fill { ticket: filled, .. }]) = leased.as_deref() else { panic!("{leased:?}") };
    let before = proxy.accepted();
    proxy.cut();
    proxy.restore();
    until("connected anew", async || proxy.accepted() > before && cache.health().is_ok()).await;
    assert_eq!(cache.renew(&[(place("renewed"), *renewed)], LOCK).await, Ok(()));
    assert_eq!(fill(&cache, "filled", *filled, lasting("{}")).await, Filled::Gone);
    for key in ["filled", "renewed"] {
        until(key, async || matches!(lease(&other, key).await, Lease::Fill { .. })).await;
    }
}

#[tokio::test]
async fn nobody_waits_for_a_lease_of_redis_whose_connection_is_gone() {
    outlived(&Server::Redis(Redis::start().await)).await;
}

#[tokio::test]
async fn nobody_waits_for_a_lease_of_memcached_whose_connection_is_gone() {
    outlived(&Server::Memcached(Memcached::start().await)).await;
}

async fn read_now(cache: &AnyCache, key: &str) -> Result<Lookup, CacheError> {
    cache.read(place(key)).await
}

#[tokio::test]
async fn a_lease_whose_answer_is_lost_on_the_way_from_redis_is_given_back() {
    given_back(&Server::Redis(Redis::start().await)).await;
}

#[tokio::test]
async fn a_lease_whose_answer_is_lost_on_the_way_from_memcached_is_given_back() {
    given_back(&Server::Memcached(Memcached::start().await)).await;
}

#[tokio::test]
async fn leases_of_a_batch_that_failed_are_given_back() {
    let redis = Redis::start().await;
    redis::cmd("RPUSH").arg("list").arg("x").exec_async(&mut redis.client().await).await.expect("it answers");
    let server = Server::Redis(redis);
    let cache = server.at(server.port(), Duration::from_secs(5)).await;
    assert_eq!(cache.lease(&[place("a"), place("list"), place("b")], LOCK).await, Err(CacheError::Refused));
    for key in ["a", "b"] {
        until("given back", async || matches!(lease(&cache, key).await, Lease::Fill { .. })).await;
    }
}

/// Timeouts that are noticed by a process that stood still are no evidence against the cache.
async fn stood_still(server: &Server) {
    let proxy = Proxy::to(([127, 0, 0, 1], server.port()).into()).await;
    let cache = server.at(proxy.addr().port(), TIMEOUT).await;
    let breaker = || cache.memories()[0].breaker;
    until("calm", async || breaker() == Some(State::Closed)).await;
    proxy.black_hole();
    let reads = (0..20).map(|id| {
        let cache = cache.clone();
        tokio::spawn(async move { cache.read(place(&format!("k{id}"))).await })
    });
    let reads: Vec<_> = reads.collect();
    tokio::task::yield_now().await;
    // All that this process does is done by this thread.
    std::thread::sleep(TIMEOUT * 3);
    for read in reads {
        let found = read.await.expect("no reader panics");
        assert!(found.is_err(), "{found:?}");
    }
    assert_eq!(breaker(), Some(State::Closed), "it was not the cache that was late");
    proxy.restore();
    until("used again", async || cache.read(place("k")).await.is_ok()).await;
}

#[tokio::test]
async fn a_process_that_stood_still_goes_on_asking_redis() {
    stood_still(&Server::Redis(Redis::start().await)).await;
}

#[tokio::test]
async fn a_process_that_stood_still_goes_on_asking_memcached() {
    stood_still(&Server::Memcached(Memcached::start().await)).await;
}

/// Where there was nothing to ask, nothing was answered.
async fn nothing(server: &Server) {
    let cache = server.at(server.port(), Duration::from_secs(5)).await;
    let held = ticket(&cache, "held").await;
    server.pause();
    // What it said before that has arrived.
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let moment = Instant::now();
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(cache.renew(&[], LOCK).await, Ok(()));
    assert_eq!(cache.release(&[]).await, Ok(()));
    assert_eq!(cache.invalidate(&[]).await, Ok(()));
    assert_eq!(cache.invalidate_unless_held(&[], None).await, Ok(()));
    assert_eq!(cache.fill(&[]).await, Ok(Vec::new()));
    assert_eq!(cache.read_many(&[]).await, Ok(Vec::new()));
    // Tickets of another connection are not renewed.
    let foreign = Ticket { connection: u64::MAX, ..held };
    assert_eq!(cache.renew(&[(place("held"), foreign)], LOCK).await, Ok(()));
    assert!(!cache.answered_since("held", moment), "it stands still");
    server.resume();
    until("answering", async || cache.answered_since("held", moment)).await;
}

#[tokio::test]
async fn what_is_not_asked_of_redis_is_not_answered() {
    nothing(&Server::Redis(Redis::start().await)).await;
}

#[tokio::test]
async fn what_is_not_asked_of_memcached_is_not_answered() {
    nothing(&Server::Memcached(Memcached::start().await)).await;
}
