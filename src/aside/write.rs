//! One write: to the store, and then, before anybody is told, out of the cache.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Aside, Core};
use crate::cache::Cache;
use crate::catalog::{Key, Resource};
use crate::invalidation::plan;
use crate::store::{Store, StoreError, Write, WriteError, Written};

/// Keys that one command drops.
const CHUNK: usize = 1_000;

/// A write that was committed.
#[derive(Clone, Debug, PartialEq)]
pub struct Wrote {
    /// What it did.
    pub written: Written,
    /// The cache could not be told yet; it will be before this process reads from it again.
    pub invalidation_pending: bool,
}

impl<C: Cache + Clone + 'static, S: Store + 'static> Aside<C, S> {
    /// Writes, and invalidates the row and the lists it was or is in. Once begun, it ends whether or not anybody waits:
    /// a client that hangs up between the commit and the invalidation must leave nothing stale behind.
    ///
    /// # Errors
    ///
    /// [`WriteError`]; a cache that can't be reached is none.
    pub async fn write(&self, resource: &Arc<Resource>, write: Write) -> Result<Wrote, WriteError> {
        let (core, resource) = (Arc::clone(&self.core), Arc::clone(resource));
        let work = async move { core.write(&resource, write).await };
        let task = self.core.writes.spawn_on(work, &self.core.runtime);
        match task.await {
            Ok(outcome) => outcome,
            Err(ended) => {
                tracing::error!(error = %ended, "a write ended unexpectedly");
                self.core.metrics.error("aside", "panic");
                Err(StoreError::Unavailable("the write ended unexpectedly".into()).into())
            }
        }
    }
}

impl<C: Cache + Clone + 'static, S: Store + 'static> Core<C, S> {
    async fn write(self: &Arc<Self>, resource: &Arc<Resource>, write: Write) -> Result<Wrote, WriteError> {
        let (operation, asked) = match &write {
            Write::Create { .. } => ("create", None),
            Write::Replace { key, .. } => ("replace", Some(key.clone())),
            Write::Merge { key, .. } => ("merge", Some(key.clone())),
            Write::Delete { key, .. } => ("delete", Some(key.clone())),
        };
        let started = Instant::now();
        let outcome = self.store.write(resource, write).await;
        self.metrics.store_query(&resource.name, operation, started.elapsed());
        match outcome {
            Ok(written) => {
                let invalidation_pending = !self.forget(resource, asked, &written).await;
                Ok(Wrote { written, invalidation_pending })
            }
            Err(WriteError::Unknown(written)) => {
                self.metrics.error("store", "commit_unknown");
                self.forget(resource, asked.clone(), &written).await;
                self.forget_again(resource, asked, &written);
                Err(WriteError::Unknown(written))
            }
            Err(WriteError::Store(error)) => {
                self.metrics.error("store", error.kind());
                Err(error.into())
            }
            Err(refused) => Err(refused),
        }
    }

    /// A commit without an answer may become visible after its invalidation (it waits for a standby, say), and be read
    /// too early by a fill in between: so the invalidation is repeated for a while.
    fn forget_again(self: &Arc<Self>, resource: &Arc<Resource>, asked: Option<Key>, written: &Written) {
        let (core, resource, written) = (Arc::clone(self), Arc::clone(resource), written.clone());
        self.runtime.spawn(async move {
            for pause in [1, 4, 25] {
                tokio::time::sleep(Duration::from_secs(pause)).await;
                core.forget(&resource, asked.clone(), &written).await;
            }
        });
    }

    /// Invalidates what a write touched; whether the cache took all of it, and it is known what that was.
    async fn forget(&self, resource: &Arc<Resource>, asked: Option<Key>, written: &Written) -> bool {
        let mut targets = vec![resource.row_of(written.key.clone())];
        targets.extend(asked.filter(|key| *key != written.key).map(|key| resource.row_of(key)));
        targets.extend(written.lists.iter().map(|(index, value)| resource.list_of(*index, value.clone())));
        let mut plan = plan(self.mappings.load().iter(), &written.changes);
        let own = plan.drop.entry(resource.name.to_string()).or_default();
        own.extend(targets.iter().map(|target| target.entry().to_owned()));
        let mut told = true;
        for (name, keys) in plan.drop {
            self.metrics.resource(&name).invalidated_by_write(keys.len() as u64);
            let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
            for some in keys.chunks(CHUNK) {
                told &= self.asked("invalidate", self.cache.invalidate(some)).await.is_ok();
            }
        }
        for name in plan.renew {
            // Other replicas learn of a new generation at their next look: until then they may answer with what was.
            told = false;
            self.metrics.resource(&name).invalidated_by_write(1);
            // Where it fails, the next round does it.
            let _ = self.asked("purge", self.cache.purge(&name)).await;
        }
        told
    }
}
