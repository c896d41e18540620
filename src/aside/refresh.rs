//! Refresh ahead: what is read often is loaded again before its TTL ends, so that nobody waits for it.
//!
//! Each hit draws a lot: the nearer the end is and the longer the load takes, the likelier it refreshes (`XFetch`, from
//! Vattani, Chierichetti and Lowenstein, "Optimal Probabilistic Cache Stampede Prevention", VLDB 2015). Whoever is drawn asks
//! the cache for a lease on the entry that is still fresh, and one process of the fleet gets it. The entry stays a hit until
//! the fill takes its place. Whatever drops the entry destroys the lease with it: nothing dropped comes back.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::answer::Forward;
use super::fill::{Flight, Job};
use super::{Core, LOCK};
use crate::cache::entry::Entry;
use crate::cache::{Cache, Lease, Place};
use crate::catalog::Target;
use crate::store::Load;

/// Added to what a load takes: the lease and the fill are on their way for a while, busy processes wait for their turn, and
/// the fleet's clocks differ a little.
const MARGIN: Duration = Duration::from_millis(20);
/// So many times the spread, and farther from the end no lot is worth drawing: one in ten million million would be drawn.
const FARTHEST: f64 = 30.0;

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

/// Draws the lot of a hit.
pub(super) fn due(target: &Target, entry: &Entry) -> bool {
    let beta = target.policy().refresh_ahead;
    // Not in the first half of its life: a load that takes longer than that would run without end.
    let young = entry.ttl_ms.unsigned_abs() > entry.age_ms;
    // Where the database does not answer, there is nothing to refresh from.
    if beta <= 0.0 || young || !entry.verified {
        return false;
    }
    let left = Duration::from_millis(entry.ttl_ms.unsigned_abs()).as_secs_f64();
    let spread = beta * (Duration::from_micros(entry.cost_us.into()) + MARGIN).as_secs_f64();
    left < spread * FARTHEST && left <= -spread * fastrand::f64().ln()
}

impl<C: Cache + Clone + 'static, S: Load + 'static> Core<C, S> {
    /// Refreshes fresh entries of one resource while they are served. Where too much is refreshed already, they are left to
    /// the next hit, or to their end.
    pub(super) fn refresh_ahead(self: &Arc<Self>, due: &[(&Target, &Entry)]) {
        let begin = |(target, entry): &(&Target, &Entry)| {
            Some(Due {
                _under_way: self.refreshes.begin(target.entry())?,
                target: (*target).clone(),
                seen: entry.stored_at,
            })
        };
        let begun: Vec<Due> = due.iter().filter_map(begin).collect();
        if begun.is_empty() {
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
