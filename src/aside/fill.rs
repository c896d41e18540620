//! The work of a flight from its load on: load under the lease, fill, and land.

use std::time::Duration;

use tokio::time::Instant;

use super::answer::{Forward, Source};
use super::flight::{Landed, Landing, Pilot};
use super::load::{Job, Loaded};
use super::{Core, LOCK};
use crate::cache::entry::Entry;
use crate::cache::{Cache, Filled, Lookup, Place, Ticket};
use crate::store::{Load, StoreError, Waiters};

/// A flight at work.
pub(super) struct Flight<'a, C, S> {
    pub(super) core: &'a Core<C, S>,
    pub(super) began: Instant,
}

impl<C: Cache + Clone + 'static, S: Load + 'static> Flight<'_, C, S> {
    /// Loads all jobs with one statement, fills what may be stored, and lands.
    pub(super) async fn load(&self, mut jobs: Vec<Job>) {
        let Some(first) = jobs.first() else { return };
        let metrics = self.core.metrics.resource(&first.target.resource().name);
        let mut covers: Vec<u32> = jobs.iter().map(Job::advance).collect();
        let started = Instant::now();
        let waiters = Waiters::default();
        let loaded = self.renewing(&jobs, &waiters).await;
        let database = started.elapsed();
        // Not what the queue took: the fuller it is, the more would be refreshed, and the sooner.
        let cost = waiters.admitted().unwrap_or(started).elapsed();
        let loaded = match loaded {
            Ok(loaded) => loaded,
            // One value that the database can't read must not cost the others their answer.
            Err(StoreError::BadValue(_)) if jobs.len() > 1 => {
                let rest = jobs.split_off(jobs.len() / 2);
                Box::pin(self.load(jobs)).await;
                Box::pin(self.load(rest)).await;
                return;
            }
            Err(StoreError::Abandoned) => {
                // Nobody is on board. Whoever boards just now has come too late, and asks again.
                for pilot in jobs.iter_mut().filter_map(|job| job.pilot.take()) {
                    self.land(pilot, Err(StoreError::Abandoned), 0, database);
                }
                self.give_back(&jobs, &StoreError::Abandoned).await;
                return;
            }
            Err(error) => {
                self.give_back(&jobs, &error).await;
                self.failed(jobs, &error, database).await;
                return;
            }
        };
        let mut fills = Vec::new();
        let mut unused = Vec::new();
        let mut over = Vec::new();
        let mut entries = Vec::with_capacity(jobs.len());
        for (index, (job, loaded)) in jobs.iter().zip(loaded).enumerate() {
            let fill = loaded.fill(&job.target, cost);
            entries.push(fill.entry());
            self.core.top.loaded(&job.target, fill.payload.len(), started.into_std());
            let Some(ticket) = job.ticket else { continue };
            let too_big = fill.payload.len() > self.core.limits.max_entry;
            if too_big {
                metrics.too_big();
            }
            if !too_big && loaded.storable(&job.target) {
                fills.push((index, (job.target.place(), ticket, fill)));
            } else if job.pilot.is_some() {
                unused.push((job.target.place(), ticket));
            } else {
                // What was refreshed is known not to be so any more.
                over.push(job.target.entry());
            }
        }
        if !unused.is_empty() {
            // Where it fails, the locks end by themselves.
            let _ = self.core.asked("release", self.core.cache.release(&unused)).await;
        }
        if !over.is_empty() {
            // Where it fails, their TTL ends them.
            let _ = self.core.asked("invalidate", self.core.cache.invalidate_unless_held(&over, None)).await;
        }
        let mut stored = vec![false; jobs.len()];
        if !fills.is_empty() {
            let (indexes, fills): (Vec<usize>, Vec<_>) = fills.into_iter().unzip();
            let sent: Vec<u32> = indexes.iter().map(|index| jobs[*index].advance()).collect();
            if let Ok(verdicts) = self.core.asked("fill", self.core.cache.fill(&fills)).await {
                for ((index, sent), verdict) in indexes.into_iter().zip(sent).zip(verdicts) {
                    metrics.fill(verdict);
                    if let Filled::Fenced | Filled::Gone = verdict {
                        self.core.top.refused(&jobs[index].target, started.into_std());
                    }
                    if verdict == Filled::Stored {
                        // Nothing was invalidated between the load and this fill, so whoever came before it may share it.
                        stored[index] = true;
                        covers[index] = sent;
                    }
                }
            } else {
                for _ in indexes {
                    metrics.fill_failed();
                }
            }
        }
        for (((job, entry), stored), covers) in jobs.drain(..).zip(entries).zip(stored).zip(covers) {
            if let Some(pilot) = job.pilot {
                let landed =
                    Landed { entry, source: Source::Database, forward: Some(job.forward), stored, collapsed: false };
                self.land(pilot, Ok(landed), covers, database);
            }
        }
    }

    /// Loads, keeps the locks alive meanwhile, and says when nobody waits for it any more.
    async fn renewing(&self, jobs: &[Job], waiters: &Waiters) -> Result<Vec<Loaded>, StoreError> {
        let held = held(jobs.iter());
        let (load, deserted) = (self.core.load(jobs, waiters), deserted(jobs));
        tokio::pin!(load, deserted);
        let mut left = false;
        loop {
            tokio::select! {
                loaded = &mut load => return loaded,
                () = &mut deserted, if !left => {
                    left = true;
                    waiters.leave();
                }
                () = tokio::time::sleep(LOCK / 3), if !held.is_empty() => {
                    // A renewal that fails only means that the fill may be refused.
                    let _ = self.core.asked("renew", self.core.cache.renew(&held, LOCK)).await;
                }
            }
        }
    }

    /// Gives up leases under which nothing was loaded. Where the store is in trouble, the refresh of what is served stale
    /// keeps its lease, which ends by itself: until then no process of the fleet tries again, and nobody waits.
    async fn give_back(&self, jobs: &[Job], error: &StoreError) {
        let keeps = |job: &&Job| error.is_outage() && job.pilot.is_none() && job.forward == Forward::Stale;
        let held: Vec<_> = held(jobs.iter().filter(|job| !keeps(job)));
        if !held.is_empty() {
            // Where it fails, the locks end by themselves.
            let _ = self.core.asked("release", self.core.cache.release(&held)).await;
        }
    }

    /// Lands with what is stale where that is allowed, else with the error.
    ///
    /// The cache is asked again: what was found before the load may have been invalidated since, and must not come back.
    async fn failed(&self, jobs: Vec<Job>, error: &StoreError, database: Duration) {
        let asked: Vec<Place<'_>> =
            jobs.iter().filter(|job| job.stale.is_some()).map(|job| job.target.place()).collect();
        let found = if asked.is_empty() || !error.is_outage() {
            Vec::new()
        } else {
            self.core.asked("get_many", self.core.cache.read_many(&asked)).await.unwrap_or_default()
        };
        let mut found = found.into_iter();
        let mut landings = Vec::with_capacity(jobs.len());
        for job in jobs {
            let still = job.stale.as_ref().and_then(|stale| Some((found.next()?, stale.covers)));
            let grace = job.target.policy().stale_if_error;
            let Some(pilot) = job.pilot else { continue };
            landings.push(match still {
                // Whoever came later may have come after a write that took it away: they ask again.
                Some((Lookup::Soft(entry), covers)) if within(&entry, grace) => (pilot, Ok(stale(entry)), covers),
                // An error is good for everybody: it is older for none.
                _ => (pilot, Err(error.clone()), u32::MAX),
            });
        }
        for (pilot, result, covers) in landings {
            self.land(pilot, result, covers, database);
        }
    }

    pub(super) fn land(&self, pilot: Pilot, result: Result<Landed, StoreError>, covers: u32, database: Duration) {
        let cache = self.began.elapsed().saturating_sub(database);
        pilot.land(Landing { result, covers, cache, database });
    }
}

/// Resolves when nobody waits for any of them. What is loaded for the next reader is waited for by him.
async fn deserted(jobs: &[Job]) {
    loop {
        for job in jobs {
            match &job.pilot {
                Some(pilot) => pilot.deserted().await,
                None => std::future::pending().await,
            }
        }
        // Somebody may have boarded one of them while the others were waited for.
        if jobs.iter().all(|job| job.pilot.as_ref().is_some_and(Pilot::is_deserted)) {
            return;
        }
    }
}

fn held<'a>(jobs: impl Iterator<Item = &'a Job>) -> Vec<(Place<'a>, Ticket)> {
    jobs.filter_map(|job| Some((job.target.place(), job.ticket?))).collect()
}

/// The landing of a flight that brings what is past its TTL.
pub(super) fn stale(entry: Entry) -> Landed {
    Landed { entry, source: Source::Cache, forward: Some(Forward::Stale), stored: false, collapsed: false }
}

/// Whether an entry is past its TTL by no more than `grace`. "Not found" has none.
pub(super) fn within(entry: &Entry, grace: Duration) -> bool {
    !entry.negative && u128::from(entry.ttl_ms.min(0).unsigned_abs()) < grace.as_millis()
}
