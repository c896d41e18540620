//! The adapters against the model's own idea of an entry: whatever is done to one, in any order, they answer alike.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cache_aside::cache::entry::{self, Fence};
use cache_aside::cache::memcached::MemcachedCache;
use cache_aside::cache::memory::MemoryCache;
use cache_aside::cache::redis::RedisCache;
use cache_aside::cache::{AnyCache, Cache, Fill, Filled, Lease, Lookup, Place, Ticket};
use cache_aside::config::{Config, Env};
use proptest::prelude::*;
use proptest::test_runner::{Config as Effort, TestRunner};
use tokio::runtime::{Builder, Runtime};

#[path = "../model/entry.rs"]
#[allow(dead_code, reason = "no adapter can be told to evict")]
mod model;

use crate::servers::{Memcached, Redis};
use model::{Answer, Command, Entry};

/// Nothing ends while a case runs: what ends when is for the contract suite.
const LONG: Duration = Duration::from_mins(5);
const LONG_MS: u64 = 300_000;
const TAG: u64 = 1;

/// What is done; numbers choose among the tickets so far, or the writers.
#[derive(Clone, Debug, PartialEq)]
enum Do {
    Read,
    Lease,
    /// A lease on what is there, though it is fresh.
    Refresh,
    Fill(usize, u8),
    Renew(usize),
    Release(usize),
    Invalidate,
    Hold(usize),
    GiveUp(usize),
}

fn anything() -> impl Strategy<Value = Vec<Do>> {
    let one = prop_oneof![
        3 => Just(Do::Read),
        4 => Just(Do::Lease),
        2 => Just(Do::Refresh),
        4 => (any::<usize>(), any::<u8>()).prop_map(|(ticket, value)| Do::Fill(ticket, value)),
        1 => any::<usize>().prop_map(Do::Renew),
        2 => any::<usize>().prop_map(Do::Release),
        2 => Just(Do::Invalidate),
        1 => (0..2_usize).prop_map(Do::Hold),
        1 => (0..2_usize).prop_map(Do::GiveUp),
    ];
    proptest::collection::vec(one, 1..24)
}

fn number(fence: Fence) -> u128 {
    u128::from_le_bytes(fence.0)
}

fn value(entry: &entry::Entry) -> u8 {
    entry.payload.first().copied().unwrap_or_default()
}

/// A value of one byte.
fn lasting(byte: u8) -> Fill {
    let payload = Bytes::copy_from_slice(&[byte]);
    Fill {
        etag: entry::etag(&payload),
        payload,
        negative: false,
        truncated: false,
        ttl: LONG,
        grace: Duration::ZERO,
        cost: Duration::ZERO,
        origin: 0,
    }
}

fn place(key: &str) -> Place<'_> {
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

/// Runs a case on both sides, and compares every answer.
async fn compare(cache: &AnyCache, key: &str, steps: &[Do]) -> Result<(), TestCaseError> {
    let place = place(key);
    let writers = [Fence::new().expect("randomness"), Fence::new().expect("randomness")];
    let mut tickets: Vec<Ticket> = Vec::new();
    let mut model: Entry<u8> = Entry::Absent;
    let mut step = |command: Command<u8>| {
        let (next, answer) = std::mem::take(&mut model).step(0, command);
        model = next;
        answer
    };
    for (index, what) in steps.iter().enumerate() {
        let chosen = |ticket: &usize| (!tickets.is_empty()).then(|| tickets[ticket % tickets.len().max(1)]);
        let (expected, real) = match what {
            Do::Read => {
                // A held entry is absent to a reader.
                let expected = match step(Command::Read { tag: TAG }) {
                    Answer::Held => Answer::Absent,
                    other => other,
                };
                let real = match cache.read(place).await.expect("it answers") {
                    Lookup::Fresh(entry) => Answer::Fresh(value(&entry)),
                    Lookup::Soft(entry) => Answer::Soft(value(&entry)),
                    Lookup::Pending => Answer::Pending,
                    Lookup::Absent => Answer::Absent,
                };
                (expected, real)
            }
            Do::Lease | Do::Refresh => {
                let seen = match (what, cache.read(place).await.expect("it answers")) {
                    (Do::Refresh, Lookup::Fresh(entry)) => Some(entry.stored_at),
                    _ => None,
                };
                let place = Place { refreshes: seen.unwrap_or(0), ..place };
                let lease = cache.lease(&[place], LONG).await.expect("it answers").remove(0);
                let fence = if let Lease::Fill { ticket, .. } = &lease { number(ticket.fence) } else { 1 };
                let expected = step(Command::Lease {
                    fence,
                    tag: TAG,
                    lock: LONG_MS,
                    spare: 0,
                    // Here everything happens at once.
                    refreshes: seen.map(|_| 0),
                });
                let real = match lease {
                    Lease::Fill { ticket, stale } => {
                        tickets.push(ticket);
                        Answer::Fill { stale: stale.as_ref().map(value) }
                    }
                    Lease::Wait { stale } => Answer::Wait { stale: stale.as_ref().map(value) },
                    Lease::Hit(entry) => Answer::Hit(value(&entry)),
                    Lease::Past => Answer::Past,
                };
                (expected, real)
            }
            Do::Fill(ticket, byte) => {
                let Some(ticket) = chosen(ticket) else { continue };
                let fill = lasting(*byte);
                let real = match cache.fill(&[(place, ticket, fill)]).await.expect("it answers").remove(0) {
                    Filled::Stored => Answer::Stored,
                    Filled::Fenced => Answer::Fenced,
                    Filled::Gone => Answer::Gone,
                    Filled::TooBig => panic!("a byte is too large"),
                };
                let (fence, value) = (number(ticket.fence), *byte);
                (step(Command::Fill { fence, tag: TAG, value, ttl: LONG_MS, grace: 0 }), real)
            }
            Do::Renew(ticket) => {
                let Some(ticket) = chosen(ticket) else { continue };
                cache.renew(&[(place, ticket)], LONG).await.expect("it answers");
                step(Command::Renew { fence: number(ticket.fence), lock: LONG_MS });
                continue;
            }
            Do::Release(ticket) => {
                let Some(ticket) = chosen(ticket) else { continue };
                cache.release(&[(place, ticket)]).await.expect("it answers");
                step(Command::Release { fence: number(ticket.fence) });
                continue;
            }
            Do::Invalidate => {
                cache.invalidate_unless_held(&[key], None).await.expect("it answers");
                step(Command::Invalidate);
                continue;
            }
            Do::Hold(writer) => {
                cache.hold(&[key], writers[*writer], LONG).await.expect("it answers");
                step(Command::Hold { owner: number(writers[*writer]), life: LONG_MS });
                continue;
            }
            Do::GiveUp(writer) => {
                cache.invalidate_unless_held(&[key], Some(writers[*writer])).await.expect("it answers");
                step(Command::ReleaseHold { owner: number(writers[*writer]) });
                continue;
            }
        };
        prop_assert_eq!(expected, real, "at step {} of {:?}", index, steps);
    }
    Ok(())
}

fn explore(runtime: &Runtime, cache: &AnyCache, cases: u32) {
    let mut runner = TestRunner::new(Effort { cases, failure_persistence: None, ..Effort::default() });
    let number = std::cell::Cell::new(0);
    let outcome = runner.run(&anything(), |steps| {
        number.set(number.get() + 1);
        runtime.block_on(compare(cache, &format!("case {}", number.get()), &steps))
    });
    outcome.expect("adapter and model agree");
}

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime should start")
}

#[test]
fn memory_does_what_the_model_does() {
    let cache = AnyCache::Memory(MemoryCache::new(64 << 20, 1 << 16, None));
    explore(&runtime(), &cache, 2_000);
}

#[test]
fn redis_does_what_the_model_does() {
    let runtime = Arc::new(runtime());
    let (_redis, cache) = runtime.block_on(async {
        let redis = Redis::start().await;
        let text = format!(
            "database: {{ url: \"sqlite::memory:\" }}\nresources: {{ a: {{}} }}\ncache: {{ url: \"{}\", timeout: 5s }}\n",
            redis.url()
        );
        let config = Config::from_yaml(&text, "test", &Env::default()).expect("it is sound").cache;
        let cache = AnyCache::Redis(RedisCache::new(&config, None, false).expect("the URL is sound"));
        while cache.health().is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        (redis, cache)
    });
    explore(&runtime, &cache, 400);
}

#[test]
fn memcached_does_what_the_model_does() {
    let runtime = Arc::new(runtime());
    let (_memcached, cache) = runtime.block_on(async {
        let memcached = Memcached::start().await;
        let text = format!(
            "database: {{ url: \"sqlite::memory:\" }}\nresources: {{ a: {{}} }}\ncache: {{ url: \"{}\", timeout: 5s }}\n",
            memcached.url()
        );
        let config = Config::from_yaml(&text, "test", &Env::default()).expect("it is sound").cache;
        let cache = AnyCache::Memcached(MemcachedCache::new(&config, None).expect("the URL is sound"));
        while cache.health().is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        (memcached, cache)
    });
    explore(&runtime, &cache, 400);
}
