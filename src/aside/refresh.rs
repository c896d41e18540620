//! Refresh ahead: what is read often is loaded again before its TTL ends, so that nobody waits for it.
//!
//! A hit whose entry ends soon asks the cache for a lease on it though it is still fresh, and one process of the fleet gets
//! it. The entry stays a hit until the fill takes its place. Whatever drops the entry destroys the lease with it: nothing
//! dropped comes back.
//!
//! How soon is reckoned from what the last load cost, as in `XFetch` (Vattani, Chierichetti and Lowenstein, "Optimal
//! Probabilistic Cache Stampede Prevention", VLDB 2015). There each hit draws a lot, because nothing else keeps a herd from
//! going at once; so the more is read, the earlier somebody is drawn: by the cost times the logarithm of reads per cost,
//! which at 20,000 reads a second halved the life of an entry. Here the lease sends one, so it is the entry that has a lot,
//! the same for all who read it: entries that were stored together don't go together, and none goes earlier for being read
//! more.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::answer::Forward;
use super::fill::Flight;
use super::load::Job;
use super::{Core, LOCK};
use crate::cache::entry::Entry;
use crate::cache::{Cache, Lease, Place};
use crate::catalog::Target;
use crate::store::Load;

/// Added to what a load takes: the lease and the fill are on their way for a while, busy processes wait for their turn, and
/// the fleet's clocks differ a little.
const MARGIN: Duration = Duration::from_millis(50);
/// An entry's lot is one of so many.
const LOTS: u32 = 1024;

/// What this process refreshes ahead.
#[derive(Debug)]
pub(super) struct Refreshes {
    under_way: Arc<Mutex<HashSet<String>>>,
    statements: Arc<Semaphore>,
}

impl Refreshes {
    pub(super) fn new(at_once: usize) -> Self {
        Self { under_way: Arc::default(), statements: Arc::new(Semaphore::new(at_once)) }
    }

    /// The entry as one that is refreshed from now on; `None` where it is already.
    fn begin(&self, key: &str) -> Option<UnderWay> {
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        if under_way.contains(key) {
            return None;
        }
        under_way.insert(key.to_owned());
        Some(UnderWay { key: key.to_owned(), all: Arc::clone(&self.under_way) })
    }
}

/// Nobody here refreshes it until this is dropped.
struct UnderWay {
    key: String,
    all: Arc<Mutex<HashSet<String>>>,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

/// An entry that is to be refreshed, and when what was seen of it was stored: another one was refreshed meanwhile.
struct Due {
    _under_way: UnderWay,
    target: Target,
    seen: u64,
}

/// Whether a hit is to refresh its entry.
pub(super) fn due(target: &Target, entry: &Entry) -> bool {
    is_due(target.policy().refresh_ahead, target.entry(), entry)
}

fn is_due(eagerness: f64, key: &str, entry: &Entry) -> bool {
    // Not in the first half of its life: a load that takes longer than that would run without end.
    let young = entry.ttl_ms.unsigned_abs() > entry.age_ms;
    // Where the database does not answer, there is nothing to refresh from.
    if young || !entry.verified {
        return false;
    }
    let left = Duration::from_millis(entry.ttl_ms.unsigned_abs());
    left.as_secs_f64() <= eagerness * lead(key, entry).as_secs_f64()
}

/// So long before its end an entry is refreshed: twice what its last load took, and up to as much again by its lot, which is
/// another one in each of its lives.
fn lead(key: &str, entry: &Entry) -> Duration {
    let cost = Duration::from_micros(entry.cost_us.into());
    let lot = u32::try_from(xxh3_64_with_seed(key.as_bytes(), entry.stored_at) % u64::from(LOTS)).unwrap_or(0);
    MARGIN + cost * 2 + (MARGIN + cost) * lot / LOTS
}

impl<C: Cache + Clone + 'static, S: Load + 'static> Core<C, S> {
    /// Refreshes fresh entries of one resource while they are served. Where readers wait for a connection to the database, or
    /// too much is refreshed already, they are left to the next hit, or to their end.
    pub(super) fn refresh_ahead(self: &Arc<Self>, due: &[(&Target, &Entry)]) {
        let begin = |(target, entry): &(&Target, &Entry)| {
            Some(Due {
                _under_way: self.refreshes.begin(target.entry())?,
                target: (*target).clone(),
                seen: entry.stored_at,
            })
        };
        let begun: Vec<Due> = due.iter().filter_map(begin).collect();
        if begun.is_empty() || self.store.is_pressed() {
            return;
        }
        let Ok(permit) = Arc::clone(&self.refreshes.statements).try_acquire_owned() else { return };
        let left = due.iter().map(|(_, entry)| entry.ttl_ms.unsigned_abs()).max().unwrap_or(0);
        let core = Arc::clone(self);
        self.runtime.spawn(async move {
            let began = Instant::now();
            core.refresh(&begun).await;
            drop(permit);
            // If it was another who got the lease, or the load failed, that is not tried again at once.
            let pause = Duration::from_millis(left).min(LOCK);
            tokio::time::sleep(pause.saturating_sub(began.elapsed())).await;
            drop(begun);
        });
    }

    async fn refresh(&self, due: &[Due]) {
        let places: Vec<Place<'_>> =
            due.iter().map(|due| Place { refreshes: due.seen, ..due.target.place() }).collect();
        let Ok(leases) = self.asked("lease", self.cache.lease(&places, LOCK)).await else { return };
        let leased = due.iter().zip(leases).filter_map(|(due, lease)| match lease {
            Lease::Fill { ticket, .. } => Some(Job::unwaited(due.target.clone(), ticket, Forward::Miss)),
            Lease::Wait { .. } | Lease::Hit(_) | Lease::Past => None,
        });
        let jobs: Vec<Job> = leased.collect();
        if let Some(job) = jobs.first() {
            self.metrics.resource(&job.target.resource().name).refreshed_ahead(jobs.len() as u64);
        }
        Flight { core: self, began: Instant::now() }.load(jobs).await;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use proptest::prelude::*;

    use super::{MARGIN, is_due, lead};
    use crate::cache::entry::Entry;

    /// An entry that was stored `age` milliseconds ago, as a hit has it.
    fn entry(stored_at: u64, ttl: u64, age: u64, cost: Duration) -> Entry {
        Entry {
            payload: Bytes::new(),
            etag: 0,
            negative: false,
            truncated: false,
            stored_at,
            age_ms: age,
            ttl_ms: i64::try_from(ttl - age).expect("it is fresh"),
            cost_us: u32::try_from(cost.as_micros()).expect("it is no hour"),
            verified: true,
            local: false,
        }
    }

    proptest! {
        /// However often it is read: an entry is not refreshed in the first half of its life, nor sooner than what its load
        /// takes is a reason for; and where it is read at least so often, it is refreshed before it ends.
        #[test]
        fn a_refresh_begins_neither_early_nor_too_late(
            stored_at in 1_u64..1 << 42,
            ttl in 4_u64..100_000,
            cost in 0_u64..20_000,
            every in 1_u64..2_000,
            first in 0_u64..2_000,
        ) {
            let cost = Duration::from_millis(cost);
            let reads = (0..).map(|read| first % every + read * every).take_while(|age| *age < ttl);
            let due = reads.map(|age| entry(stored_at, ttl, age, cost)).find(|read| is_due(1.0, "key", read));
            let least = Duration::from_millis(ttl / 2).min(MARGIN + cost * 2);
            if let Some(entry) = due {
                let left = Duration::from_millis(entry.ttl_ms.unsigned_abs());
                prop_assert!(left <= MARGIN * 2 + cost * 3, "{left:?} before its end");
                prop_assert!(entry.age_ms >= ttl / 2, "at {}", entry.age_ms);
            } else {
                prop_assert!(Duration::from_millis(every) > least, "nobody refreshed it");
            }
        }

        #[test]
        fn the_more_eager_the_sooner_and_never_where_nobody_wants_it(eager in 0.0_f64..50.0, age in 500_u64..1_000) {
            let read = entry(7, 1_000, age, Duration::from_millis(5));
            prop_assert!(!is_due(0.0, "key", &read));
            let unverified = Entry { verified: false, ..read.clone() };
            prop_assert!(!is_due(eager, "key", &unverified));
            prop_assert!(!is_due(eager, "key", &read) || is_due(eager * 2.0, "key", &read));
        }
    }

    #[test]
    fn those_that_were_stored_together_are_not_refreshed_together() {
        let read = entry(7, 1_000, 900, Duration::from_millis(5));
        let mut leads: Vec<Duration> = (0..100).map(|key| lead(&format!("item:{key}"), &read)).collect();
        leads.sort_unstable();
        assert!(leads[90] > leads[10] + MARGIN / 2, "{leads:?}");
    }
}
