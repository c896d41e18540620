//! The work of a flight: get the lease, load under it, fill; or wait for whoever has it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::answer::{Forward, Source};
use super::flight::{Landed, Landing, Pilot};
use super::{Core, LOCK};
use crate::cache::entry::{self, Entry};
use crate::cache::{Cache, CacheError, Fill, Filled, Lease, Lookup, Place, Ticket};
use crate::catalog::{Key, Target, What};
use crate::shield::{self, ATTEMPTS};
use crate::store::{Load, Row, StoreError, Waiters};

/// The first pause between two looks at an entry that another process fills; each next one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// No entry lives longer: a century.
const LONGEST: Duration = Duration::from_hours(24 * 36_525);
const LONGEST_PAUSE: Duration = Duration::from_millis(80);

/// A target whose flight is led here.
pub(super) struct Led {
    pub(super) target: Target,
    pub(super) pilot: Pilot,
}

/// A target that is to be loaded.
pub(super) struct Job {
    pub(super) target: Target,
    /// `None` once the flight has landed with what is stale: then the load is for the next reader.
    pilot: Option<Pilot>,
    /// `None`: nothing will be stored.
    pub(super) ticket: Option<Ticket>,
    stale: Option<Stale>,
    forward: Forward,
}

/// There was an entry past its TTL, and who may have it: those who came before the command that found it was sent.
struct Stale {
    covers: u32,
}

/// What the leases say is to be done.
#[derive(Default)]
struct Sorted {
    load: Vec<Job>,
    wait: Vec<(Led, Option<Stale>)>,
}

/// Which way a flight goes.
pub(super) enum Way {
    /// Through the cache; with a permit where nobody knows whether it answers.
    Through(Option<OwnedSemaphorePermit>),
    /// Past it.
    Past,
}

/// Flies all of `led`, which are rows of one resource or a single list.
pub(super) async fn run<C, S>(core: Arc<Core<C, S>>, led: Vec<Led>, way: Way)
where
    C: Cache + Clone + 'static,
    S: Load + 'static,
{
    let began = Instant::now();
    let flight = Flight { core: &core, began };
    let Way::Through(probe) = way else {
        flight.load(led.into_iter().map(|led| led.unstored(Forward::Bypass)).collect()).await;
        return;
    };
    let sorted = flight.lease(led).await;
    drop(probe);
    tokio::join!(flight.load(sorted.load), flight.wait(sorted.wait));
}

impl Led {
    fn unstored(self, forward: Forward) -> Job {
        Job { target: self.target, pilot: Some(self.pilot), ticket: None, stale: None, forward }
    }
}

pub(super) struct Flight<'a, C, S> {
    pub(super) core: &'a Core<C, S>,
    pub(super) began: Instant,
}

impl<C: Cache + Clone + 'static, S: Load + 'static> Flight<'_, C, S> {
    /// Asks for the leases, lands what was filled meanwhile, and sorts the rest.
    async fn lease(&self, led: Vec<Led>) -> Sorted {
        let mut sorted = Sorted::default();
        if led.is_empty() {
            return sorted;
        }
        let asked = match self.ask(&led).await {
            // On a busy machine a reply may be late, and loading past the cache would be a query too many. A cache that does
            // not answer at all is soon not asked any more: then this costs nothing. A lease that nobody
            // heard of is given back meanwhile; should it be there still, the second waits for it as for anybody's.
            Err(CacheError::TimedOut) => self.ask(&led).await,
            asked => asked,
        };
        let Ok(leases) = asked else {
            sorted.load = led.into_iter().map(|led| led.unstored(Forward::Bypass)).collect();
            return sorted;
        };
        for (led, (covers, lease)) in led.into_iter().zip(leases) {
            match lease {
                Lease::Hit(entry) => {
                    let landed =
                        Landed { entry, source: Source::Cache, forward: None, stored: false, collapsed: false };
                    self.land(led.pilot, Ok(landed), covers, Duration::ZERO);
                }
                Lease::Past => sorted.load.push(led.unstored(Forward::Bypass)),
                Lease::Wait { stale: Some(entry) } if revalidating(&led.target, &entry) => {
                    self.land(led.pilot, Ok(stale(entry)), covers, Duration::ZERO);
                }
                Lease::Wait { stale } => sorted.wait.push((led, stale.map(|_| Stale { covers }))),
                Lease::Fill { ticket, stale: Some(entry) } if revalidating(&led.target, &entry) => {
                    self.land(led.pilot, Ok(stale(entry)), covers, Duration::ZERO);
                    self.core.metrics.resource(&led.target.resource().name).revalidated();
                    sorted.load.push(Job::unwaited(led.target, ticket, Forward::Stale));
                }
                Lease::Fill { ticket, stale } => {
                    let forward = if stale.is_some() { Forward::Stale } else { Forward::Miss };
                    let (pilot, ticket) = (Some(led.pilot), Some(ticket));
                    let stale = stale.map(|_| Stale { covers });
                    sorted.load.push(Job { target: led.target, pilot, ticket, stale, forward });
                }
            }
        }
        sorted
    }

    /// Asks for leases once; each with whom the reply covers.
    async fn ask(&self, led: &[Led]) -> Result<Vec<(u32, Lease)>, CacheError> {
        let covers: Vec<u32> = led.iter().map(|led| led.pilot.advance()).collect();
        let places: Vec<Place<'_>> = led.iter().map(|led| led.target.place()).collect();
        let leases = self.core.asked("lease", self.core.cache.lease(&places, LOCK)).await?;
        Ok(covers.into_iter().zip(leases).collect())
    }

    /// Waits for other processes' fills; takes over where a lock ends, and goes past those that take too long.
    async fn wait(&self, mut waiting: Vec<(Led, Option<Stale>)>) {
        let mut pause = FIRST_PAUSE;
        while !waiting.is_empty() {
            if self.began.elapsed() > self.core.limits.wait {
                let past = |(led, stale): (Led, Option<Stale>)| Job { stale, ..led.unstored(Forward::Miss) };
                self.load(waiting.into_iter().map(past).collect()).await;
                return;
            }
            tokio::time::sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
            waiting.retain(|(led, _)| !led.pilot.is_deserted());
            if waiting.is_empty() {
                return;
            }
            let covers: Vec<u32> = waiting.iter().map(|(led, _)| led.pilot.advance()).collect();
            let places: Vec<Place<'_>> = waiting.iter().map(|(led, _)| led.target.place()).collect();
            let lookups = match self.core.asked("get_many", self.core.cache.read_many(&places)).await {
                Ok(lookups) => lookups,
                // On a busy machine a reply may be late: whoever fills is at it still. Where none comes at all, there is no
                // connection soon.
                Err(CacheError::TimedOut) => continue,
                Err(_) => {
                    let past = |(led, stale): (Led, Option<Stale>)| Job { stale, ..led.unstored(Forward::Bypass) };
                    self.load(waiting.into_iter().map(past).collect()).await;
                    return;
                }
            };
            let mut again = Vec::new();
            let mut still = Vec::new();
            for (((led, stale), covers), lookup) in waiting.into_iter().zip(covers).zip(lookups) {
                match lookup {
                    Lookup::Fresh(entry) => {
                        let landed = Landed {
                            entry,
                            source: Source::Cache,
                            forward: Some(Forward::Miss),
                            stored: false,
                            collapsed: true,
                        };
                        self.land(led.pilot, Ok(landed), covers, Duration::ZERO);
                    }
                    Lookup::Pending => still.push((led, stale)),
                    // The lock has ended, or the refresh may have: one of those who ask fills, the others wait on.
                    Lookup::Soft(_) | Lookup::Absent => again.push(led),
                }
            }
            waiting = still;
            let sorted = self.lease(again).await;
            waiting.extend(sorted.wait);
            if !sorted.load.is_empty() {
                // Whoever waits for another's fill does not wait for this load too.
                tokio::join!(self.load(sorted.load), Box::pin(self.wait(waiting)));
                return;
            }
        }
    }

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

    fn land(&self, pilot: Pilot, result: Result<Landed, StoreError>, covers: u32, database: Duration) {
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

fn stale(entry: Entry) -> Landed {
    Landed { entry, source: Source::Cache, forward: Some(Forward::Stale), stored: false, collapsed: false }
}

/// Whether an entry is past its TTL by no more than `grace`. "Not found" has none.
fn within(entry: &Entry, grace: Duration) -> bool {
    !entry.negative && u128::from(entry.ttl_ms.min(0).unsigned_abs()) < grace.as_millis()
}

/// Whether a stale entry is served while it is refreshed.
fn revalidating(target: &Target, entry: &Entry) -> bool {
    within(entry, target.policy().stale_while_revalidate)
}

impl Job {
    /// A load that nobody waits for.
    pub(super) fn unwaited(target: Target, ticket: Ticket, forward: Forward) -> Self {
        Self { target, pilot: None, ticket: Some(ticket), stale: None, forward }
    }

    fn advance(&self) -> u32 {
        self.pilot.as_ref().map_or(0, Pilot::advance)
    }
}

/// What the store gave for one target.
struct Loaded {
    /// Which database it was read from.
    origin: u64,
    payload: Option<Bytes>,
    truncated: bool,
    spelled_as_asked: bool,
}

impl Loaded {
    /// Whether the cache may hold it under the target's key.
    fn storable(&self, target: &Target) -> bool {
        match &self.payload {
            Some(_) => self.spelled_as_asked,
            None => target.negative_cacheable(),
        }
    }

    fn fill(&self, target: &Target, cost: Duration) -> Fill {
        let policy = target.policy();
        let negative = self.payload.is_none();
        let payload = self.payload.clone().unwrap_or_default();
        let full = if negative { policy.negative_ttl } else { policy.ttl };
        // A program may say `Duration::MAX` and mean "always".
        let ttl = full.min(LONGEST).mul_f64(1.0 - policy.jitter * fastrand::f64()).max(Duration::from_millis(1));
        let grace = if negative { Duration::ZERO } else { policy.grace() };
        Fill {
            etag: entry::etag(&payload),
            payload,
            negative,
            truncated: self.truncated,
            ttl,
            grace,
            cost,
            origin: self.origin,
        }
    }
}

impl Fill {
    /// The entry that a reader gets who came for the load.
    fn entry(&self) -> Entry {
        Entry {
            payload: self.payload.clone(),
            etag: self.etag,
            negative: self.negative,
            truncated: self.truncated,
            stored_at: 0,
            age_ms: 0,
            ttl_ms: i64::try_from(self.ttl.as_millis()).unwrap_or(i64::MAX),
            cost_us: u32::try_from(self.cost.as_micros()).unwrap_or(u32::MAX),
            verified: true,
            local: false,
        }
    }
}

impl<C, S: Load> Core<C, S> {
    /// What an entry would be if it was filled now.
    pub(super) async fn load_one(&self, target: &Target) -> Result<Fill, StoreError> {
        let job = Job { target: target.clone(), pilot: None, ticket: None, stale: None, forward: Forward::Bypass };
        let loaded = self.load(&[job], &Waiters::default()).await?;
        loaded.first().map(|loaded| loaded.fill(target, Duration::ZERO)).ok_or(StoreError::Busy)
    }

    /// One statement for all jobs, in their order. Where the store can't be reached it is tried again, while there is somebody
    /// who waits and has nothing else to get.
    async fn load(&self, jobs: &[Job], waiters: &Waiters) -> Result<Vec<Loaded>, StoreError> {
        let patient = jobs.iter().all(|job| job.pilot.is_some() && job.stale.is_none());
        self.guard.budget.pay();
        let mut attempts = 0;
        loop {
            self.guard.admit().inspect_err(|_| self.metrics.error("store", "not_asked"))?;
            let outcome = self.load_once(jobs, waiters).await;
            self.guard.learn(outcome.as_ref().err());
            attempts += 1;
            let again = patient && attempts < ATTEMPTS && matches!(outcome, Err(StoreError::Unavailable(_)));
            if !again || !self.guard.budget.take() {
                return outcome;
            }
            if let Some(job) = jobs.first() {
                self.metrics.retried(&job.target.resource().name);
            }
            let pause = async {
                tokio::time::sleep(shield::pause(attempts)).await;
                Ok(())
            };
            waiters.or(pause).await?;
        }
    }

    async fn load_once(&self, jobs: &[Job], waiters: &Waiters) -> Result<Vec<Loaded>, StoreError> {
        let Some(first) = jobs.first() else { return Ok(Vec::new()) };
        let resource = first.target.resource();
        let started = Instant::now();
        let (operation, outcome) = match first.target.what() {
            What::List { index, value } => {
                let list = self.store.list(resource, *index, value, waiters).await;
                let loaded = list.map(|rows| {
                    let (payload, truncated, origin) = (Some(rows.json), rows.truncated, rows.origin);
                    vec![Loaded { origin, payload, truncated, spelled_as_asked: true }]
                });
                ("list", loaded)
            }
            What::Result(params) => {
                let rows = self.store.query(resource, params, waiters).await;
                let loaded = rows.map(|rows| {
                    let (payload, truncated, origin) = (Some(rows.json), rows.truncated, rows.origin);
                    vec![Loaded { origin, payload, truncated, spelled_as_asked: true }]
                });
                ("query", loaded)
            }
            What::Row(_) => {
                let keys: Vec<&Key> = jobs
                    .iter()
                    .filter_map(|job| match job.target.what() {
                        What::Row(key) => Some(key),
                        What::List { .. } | What::Result(_) => None,
                    })
                    .collect();
                let operation = if keys.len() == 1 { "row" } else { "rows" };
                let loaded = self.store.rows(resource, &keys, waiters).await.map(|batch| {
                    let origin = batch.origin;
                    let one = |row: Option<Row>| {
                        let spelled_as_asked = row.as_ref().is_none_or(|row| row.spelled_as_asked);
                        Loaded { origin, payload: row.map(|row| row.json), truncated: false, spelled_as_asked }
                    };
                    batch.rows.into_iter().map(one).collect()
                });
                (operation, loaded)
            }
        };
        self.metrics.store_query(&resource.name, operation, started.elapsed());
        if let Err(error) = &outcome {
            self.metrics.error("store", error.kind());
            tracing::debug!(resource = %resource.name, %error, "a load failed");
        }
        outcome
    }
}
