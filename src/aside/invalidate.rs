//! Invalidation without a write of ours, by whoever wrote or by an operator; and a look at what is there.

use std::sync::Arc;
use std::time::Duration;

use super::Aside;
use crate::cache::{Cache, CacheError, Inspection};
use crate::catalog::{Resource, Target};
use crate::store::{Load, Store, StoreError};

/// The most that telling the database may take: the drop itself is done meanwhile.
const ANNOUNCE: Duration = Duration::from_secs(1);

/// Keys that one command drops.
const CHUNK: usize = 1_000;

impl<C: Cache + Clone + 'static, S: Load + 'static> Aside<C, S> {
    /// Drops entries after their rows were written by somebody who answers for it, and the fills under way for them. Once
    /// begun it ends, whether or not anybody waits.
    ///
    /// # Errors
    ///
    /// [`CacheError`] where the cache did not take it; it is owed then, and nothing is read from it here before it has.
    pub async fn forget(&self, targets: Vec<Target>) -> Result<(), CacheError> {
        let core = Arc::clone(&self.core);
        let work = async move {
            let mut outcome = Ok(());
            for some in targets.chunks(CHUNK) {
                let Some(first) = some.first() else { continue };
                core.metrics.resource(&first.resource().name).invalidated_by_write(some.len() as u64);
                let keys: Vec<&str> = some.iter().map(Target::entry).collect();
                outcome = outcome.and(core.asked("invalidate", core.cache.invalidate(&keys)).await);
            }
            outcome
        };
        self.core.writes.run(&self.core.runtime, work).await.unwrap_or(Err(CacheError::Refused))
    }

    /// Drops everything of a resource by giving it a new generation: this process knows it before the answer, others that
    /// share the cache at their next look.
    ///
    /// # Errors
    ///
    /// [`CacheError`] where the cache did not take it.
    pub async fn forget_all(&self, resource: &Arc<Resource>) -> Result<(), CacheError> {
        let (core, resource) = (Arc::clone(&self.core), Arc::clone(resource));
        let work = async move {
            core.metrics.resource(&resource.name).invalidated_by_write(1);
            core.asked("purge", core.cache.purge(&resource.name)).await
        };
        self.core.writes.run(&self.core.runtime, work).await.unwrap_or(Err(CacheError::Refused))
    }

    /// What the cache holds.
    ///
    /// # Errors
    ///
    /// [`CacheError`] where it did not say.
    pub async fn inspect(&self, target: &Target) -> Result<Inspection, CacheError> {
        self.core.asked("inspect", self.cache.inspect(target.place())).await
    }
}

impl<C: Cache + Clone + 'static, S: Store + 'static> Aside<C, S> {
    /// Drops one entry, and the fills that are under way for it.
    ///
    /// # Errors
    ///
    /// [`CacheError`] where the cache did not take it; it is owed then.
    pub async fn drop_entry(&self, target: &Target) -> Result<(), CacheError> {
        self.core.metrics.resource(&target.resource().name).invalidated_by_admin();
        let drop = async {
            if target.resource().hold {
                return self.dropped(&[target]).await;
            }
            self.core.asked("invalidate", self.cache.invalidate_everywhere(&[target.entry()])).await
        };
        tokio::join!(drop, self.announce(target.resource(), Some(target.entry()))).0
    }

    /// Drops everything of a resource.
    ///
    /// # Errors
    ///
    /// [`CacheError`] where the cache did not take it.
    pub async fn drop_resource(&self, resource: &Resource) -> Result<(), CacheError> {
        self.core.metrics.resource(&resource.name).invalidated_by_admin();
        let drop = self.core.asked("purge", self.cache.purge(&resource.name));
        tokio::join!(drop, self.announce(resource, None)).0
    }

    /// Tells other caches, and this one in case that it comes back with old data.
    async fn announce(&self, resource: &Resource, entry: Option<&str>) {
        let told = [resource.announcement(entry)];
        let announced = tokio::time::timeout(ANNOUNCE, self.core.store.announce(&told)).await;
        if let Err(error) = announced.unwrap_or(Err(StoreError::TimedOut)) {
            tracing::warn!(%error, resource = %resource.name, "a drop was not announced: a cache that comes back with old data will have missed it");
        }
    }
}
