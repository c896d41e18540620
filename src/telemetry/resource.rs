//! What is counted of one resource, found once and then only incremented.

use std::sync::Mutex;
use std::time::Instant;

use prometheus::{Histogram, IntCounter};

use super::metrics::Metrics;
use super::ratio::{Counts, Window};
use crate::cache::Filled;

/// How a read of one entry ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Fresh, from a cache.
    Hit,
    /// Past its TTL, from a cache.
    Stale,
    /// From the database.
    Miss,
    /// "Not found", from a cache.
    Negative,
    /// From the database, because the client insisted.
    Refresh,
    /// From the database, past a cache that can't be used.
    Bypass,
    /// Not answered.
    Error,
    /// Fresh, from the tier in this process.
    LocalHit,
    /// "Not found", from the tier in this process.
    LocalNegative,
}

const OUTCOMES: [(Outcome, &str); 9] = [
    (Outcome::Hit, "hit"),
    (Outcome::Stale, "stale"),
    (Outcome::Miss, "miss"),
    (Outcome::Negative, "negative"),
    (Outcome::Refresh, "refresh"),
    (Outcome::Bypass, "bypass"),
    (Outcome::Error, "error"),
    (Outcome::LocalHit, "hit"),
    (Outcome::LocalNegative, "negative"),
];

impl Outcome {
    /// Which memory answered.
    fn tier(self) -> &'static str {
        match self {
            Self::LocalHit | Self::LocalNegative => "local",
            Self::Hit | Self::Stale | Self::Negative => "shared",
            Self::Miss | Self::Refresh | Self::Bypass | Self::Error => "database",
        }
    }
}

/// Counters of one resource.
#[derive(Debug)]
pub struct ResourceMetrics {
    requests: [IntCounter; 9],
    durations: [Histogram; 9],
    fills: [IntCounter; 5],
    /// Requests that were answered by another's load.
    pub coalesced: IntCounter,
    refreshes: [IntCounter; 2],
    invalidations: [IntCounter; 3],
    pub(super) window: Mutex<Window>,
}

impl ResourceMetrics {
    pub(super) fn new(name: &str, all: &Metrics) -> Self {
        Self {
            requests: OUTCOMES.map(|(outcome, label)| all.requests.with_label_values(&[name, outcome.tier(), label])),
            durations: OUTCOMES.map(|(_, label)| all.durations.with_label_values(&[name, label])),
            fills: ["stored", "fenced", "gone", "too_big", "error"]
                .map(|outcome| all.fills.with_label_values(&[name, outcome])),
            coalesced: all.coalesced.with_label_values(&[name]),
            refreshes: ["ahead", "stale"].map(|kind| all.refreshes.with_label_values(&[name, kind])),
            invalidations: ["write", "admin", "round"].map(|path| all.invalidations.with_label_values(&[name, path])),
            window: Mutex::default(),
        }
    }

    /// Counts one read that began at `started`.
    pub fn read(&self, outcome: Outcome, started: Instant) {
        self.reads(outcome, 1);
        self.durations[outcome as usize].observe(started.elapsed().as_secs_f64());
    }

    /// How many reads were counted, however they ended.
    pub(super) fn all_reads(&self) -> u64 {
        self.requests.iter().map(IntCounter::get).sum()
    }

    /// Counts reads of a batch, whose duration is counted once by [`Self::read`]'s histogram.
    pub fn reads(&self, outcome: Outcome, count: u64) {
        self.requests[outcome as usize].inc_by(count);
    }

    /// Observes the duration of a batch.
    pub fn batch(&self, outcome: Outcome, started: Instant) {
        self.durations[outcome as usize].observe(started.elapsed().as_secs_f64());
    }

    /// Counts what became of a fill.
    pub fn fill(&self, filled: Filled) {
        let index = match filled {
            Filled::Stored => 0,
            Filled::Fenced => 1,
            Filled::Gone => 2,
            Filled::TooBig => 3,
        };
        self.fills[index].inc();
    }

    /// Counts an entry that was too large to be cached.
    pub fn too_big(&self) {
        self.fills[3].inc();
    }

    /// Counts a fill that the cache did not answer.
    pub fn fill_failed(&self) {
        self.fills[4].inc();
    }

    /// Counts entries that are loaded again while they are fresh.
    pub fn refreshed_ahead(&self, entries: u64) {
        self.refreshes[0].inc_by(entries);
    }

    /// Counts an entry that is loaded again while what is stale is served.
    pub fn revalidated(&self) {
        self.refreshes[1].inc();
    }

    /// Counts entries that a write of ours invalidated.
    pub fn invalidated_by_write(&self, entries: u64) {
        self.invalidations[0].inc_by(entries);
    }

    /// Counts an invalidation that somebody asked for.
    pub fn invalidated_by_admin(&self) {
        self.invalidations[1].inc();
    }

    /// Counts entries that a round invalidated.
    pub(super) fn invalidated_by_round(&self, entries: u64) {
        self.invalidations[2].inc_by(entries);
    }

    /// Hits and misses since the start.
    pub(super) fn counts(&self) -> Counts {
        let sum = |outcomes: &[Outcome]| outcomes.iter().map(|outcome| self.requests[*outcome as usize].get()).sum();
        Counts {
            hits: sum(&[Outcome::Hit, Outcome::Stale, Outcome::Negative, Outcome::LocalHit, Outcome::LocalNegative]),
            misses: sum(&[Outcome::Miss, Outcome::Refresh, Outcome::Bypass]),
        }
    }
}
