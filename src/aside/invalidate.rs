//! What an operator may do with entries: drop them, and look at them.

use std::time::Duration;

use super::Aside;
use crate::cache::{Cache, CacheError, Inspection};
use crate::catalog::{Resource, Target};
use crate::store::{Store, StoreError};

/// The most that telling the database may take: the drop itself is done meanwhile.
const ANNOUNCE: Duration = Duration::from_secs(1);

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

    /// What the cache holds.
    ///
    /// # Errors
    ///
    /// [`CacheError`] where it did not say.
    pub async fn inspect(&self, target: &Target) -> Result<Inspection, CacheError> {
        self.core.asked("inspect", self.cache.inspect(target.place())).await
    }
}
