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
/// No lot is drawn earlier than so many times the load: the natural logarithm of no smaller number can be drawn.
const FARTHEST: f64 = 37.0;

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

    /// Leaves out what is under way already.
    fn begin(&self, due: &mut Vec<(Target, Entry)>) -> UnderWay {
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        due.retain(|(target, _)| under_way.insert(target.entry().to_owned()));
        let keys = due.iter().map(|(target, _)| target.entry().to_owned()).collect();
        UnderWay { keys, all: Arc::clone(&self.under_way) }
    }
}

/// Nobody here refreshes these until it is dropped.
struct UnderWay {
    keys: Vec<String>,
    all: Arc<Mutex<HashSet<String>>>,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        for key in &self.keys {
            all.remove(key);
        }
    }
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

/// An entry that has more than this left is another than the one that was seen: it was refreshed meanwhile. Halfway between
/// what was left of that and its whole life, for the clock by which it was read is an estimate.
fn early(entry: &Entry) -> Duration {
    let left = entry.ttl_ms.unsigned_abs();
    Duration::from_millis(left.saturating_add(entry.age_ms / 2))
}

impl<C: Cache + Clone + 'static, S: Load + 'static> Core<C, S> {
    /// Refreshes fresh entries of one resource while they are served. Where too much is refreshed already, they are left to
    /// the next hit, or to their end.
    pub(super) fn refresh_ahead(self: &Arc<Self>, mut due: Vec<(Target, Entry)>) {
        if due.is_empty() {
            return;
        }
        let Ok(permit) = Arc::clone(&self.refreshes.statements).try_acquire_owned() else { return };
        let under_way = self.refreshes.begin(&mut due);
        if due.is_empty() {
            return;
        }
        let core = Arc::clone(self);
        self.runtime.spawn(async move {
            let began = Instant::now();
            let left =
                Duration::from_millis(due.iter().map(|(_, entry)| entry.ttl_ms.unsigned_abs()).max().unwrap_or(0));
            core.refresh(due).await;
            drop(permit);
            // If it was another who got the lease, or the load failed, that is not tried again at once.
            tokio::time::sleep(left.min(LOCK).saturating_sub(began.elapsed())).await;
            drop(under_way);
        });
    }

    async fn refresh(&self, due: Vec<(Target, Entry)>) {
        let early = due.iter().map(|(_, entry)| early(entry)).max().unwrap_or_default();
        let places: Vec<Place<'_>> = due.iter().map(|(target, _)| target.place()).collect();
        let Ok(leases) = self.asked("lease", self.cache.lease(&places, LOCK, early)).await else { return };
        let leased = due.iter().zip(leases).filter_map(|((target, _), lease)| match lease {
            Lease::Fill { ticket, .. } => Some(Job::unwaited(target.clone(), ticket, Forward::Miss)),
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
    use proptest::prelude::*;

    use super::FARTHEST;

    proptest! {
        #[test]
        fn no_lot_is_drawn_farther(seed: u64) {
            let mut lots = fastrand::Rng::with_seed(seed);
            let lot = lots.f64();
            prop_assert!(lot == 0.0 || -lot.ln() < FARTHEST);
        }
    }
}
