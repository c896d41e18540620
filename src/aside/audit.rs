//! The auditor: compares a share of what is cached with the database, in production, and counts what it finds.
//!
//! What it reads may change while it looks, so a difference counts only if the cache still holds the same bytes after the
//! longest time for which it may be behind, and the database still doesn't.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use super::Core;
use crate::cache::entry::Entry;
use crate::cache::{Cache, Lookup};
use crate::catalog::Target;
use crate::store::Load;

/// Checks that may be under way; more are left out.
const AT_ONCE: usize = 2;

/// How much is audited.
#[derive(Debug)]
pub(super) struct Audit {
    ratio: f64,
    /// How far behind an entry may be.
    patience: Duration,
    permits: Arc<Semaphore>,
}

impl Audit {
    pub(super) fn new(ratio: f64, patience: Duration) -> Self {
        Self { ratio, patience, permits: Arc::new(Semaphore::new(AT_ONCE)) }
    }

    fn hits(&self) -> bool {
        self.ratio > 0.0 && fastrand::f64() < self.ratio
    }
}

impl<C: Cache + Clone + 'static, S: Load + 'static> Core<C, S> {
    /// Checks an entry that was a hit, if it is one of those that are audited.
    pub(super) fn audit_hit(self: &Arc<Self>, target: &Target) {
        if self.audit.hits() {
            self.audit(target.clone());
        }
    }

    /// Checks an entry that was written, if anything is audited.
    pub(super) fn audit_write(self: &Arc<Self>, target: &Target) {
        if self.audit.ratio > 0.0 {
            self.audit(target.clone());
        }
    }

    fn audit(self: &Arc<Self>, target: Target) {
        let Ok(permit) = Arc::clone(&self.audit.permits).try_acquire_owned() else { return };
        let core = Arc::clone(self);
        self.runtime.spawn(async move {
            if let Some(result) = core.compare(&target).await {
                core.metrics.consistency_check(&target.resource().name, result);
                if result == "stale" {
                    // No key: logs are read by many.
                    tracing::error!(resource = %target.resource().name, "the cache holds what the database does not");
                }
            }
            drop(permit);
        });
    }

    /// What became of the comparison; `None` where one side could not be asked.
    async fn compare(&self, target: &Target) -> Option<&'static str> {
        tokio::time::sleep(self.audit.patience).await;
        let Some(before) = self.cached(target).await? else { return Some("absent") };
        if self.same(target, &before).await? {
            return Some("equal");
        }
        tokio::time::sleep(self.audit.patience).await;
        let Some(after) = self.cached(target).await? else { return Some("absent") };
        let stale = after.etag == before.etag && !self.same(target, &after).await?;
        Some(if stale { "stale" } else { "equal" })
    }

    async fn cached(&self, target: &Target) -> Option<Option<Entry>> {
        match self.cache.read(self.place(target, Instant::now())).await.ok()? {
            Lookup::Fresh(entry) if entry.verified => Some(Some(entry)),
            _ => Some(None),
        }
    }

    async fn same(&self, target: &Target, entry: &Entry) -> Option<bool> {
        let loaded = self.load_one(target).await.ok()?;
        Some(loaded.payload == entry.payload && loaded.negative == entry.negative)
    }
}
