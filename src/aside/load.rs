//! One load: what the store is asked for all jobs together, how often, and what it gave.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::Core;
use super::answer::Forward;
use super::flight::Pilot;
use crate::cache::entry::{self, Entry};
use crate::cache::{Fill, Ticket};
use crate::catalog::{Key, Target, What};
use crate::shield::{self, ATTEMPTS};
use crate::store::{Load, Row, StoreError, Waiters};

/// No entry lives longer: a century.
const LONGEST: Duration = Duration::from_hours(24 * 36_525);

/// A target that is to be loaded.
pub(super) struct Job {
    pub(super) target: Target,
    /// `None` once the flight has landed with what is stale: then the load is for the next reader.
    pub(super) pilot: Option<Pilot>,
    /// `None`: nothing will be stored.
    pub(super) ticket: Option<Ticket>,
    pub(super) stale: Option<Stale>,
    pub(super) forward: Forward,
}

/// There was an entry past its TTL, and who may have it: those who came before the command that found it was sent.
pub(super) struct Stale {
    pub(super) covers: u32,
}

impl Job {
    /// A load that nobody waits for.
    pub(super) fn unwaited(target: Target, ticket: Ticket, forward: Forward) -> Self {
        Self { target, pilot: None, ticket: Some(ticket), stale: None, forward }
    }

    /// As its pilot does, where it has one.
    pub(super) fn advance(&self) -> u32 {
        self.pilot.as_ref().map_or(0, Pilot::advance)
    }
}

/// What the store gave for one target.
pub(super) struct Loaded {
    /// Which database it was read from.
    origin: u64,
    payload: Option<Bytes>,
    truncated: bool,
    spelled_as_asked: bool,
}

impl Loaded {
    /// Whether the cache may hold it under the target's key.
    pub(super) fn storable(&self, target: &Target) -> bool {
        match &self.payload {
            Some(_) => self.spelled_as_asked,
            None => target.negative_cacheable(),
        }
    }

    /// What is to be stored, and served.
    pub(super) fn fill(&self, target: &Target, cost: Duration) -> Fill {
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
    pub(super) fn entry(&self) -> Entry {
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
    pub(super) async fn load(&self, jobs: &[Job], waiters: &Waiters) -> Result<Vec<Loaded>, StoreError> {
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
