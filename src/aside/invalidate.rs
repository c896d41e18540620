//! What an operator may do with entries: drop them, and look at them.

use super::Aside;
use crate::cache::{Cache, CacheError, Inspection};
use crate::catalog::{Resource, Target};
use crate::store::Store;

impl<C: Cache + Clone + 'static, S: Store + 'static> Aside<C, S> {
    /// Drops one entry, and the fills that are under way for it.
    ///
    /// # Errors
    ///
    /// [`CacheError`] where the cache did not take it; it is owed then.
    pub async fn drop_entry(&self, target: &Target) -> Result<(), CacheError> {
        self.core.metrics.resource(&target.resource().name).invalidated_by_admin();
        if target.resource().hold {
            return self.dropped(&[target]).await;
        }
        self.core.asked("invalidate", self.cache.invalidate_everywhere(&[target.entry()])).await
    }

    /// Drops everything of a resource.
    ///
    /// # Errors
    ///
    /// [`CacheError`] where the cache did not take it.
    pub async fn drop_resource(&self, resource: &Resource) -> Result<(), CacheError> {
        self.core.metrics.resource(&resource.name).invalidated_by_admin();
        self.core.asked("purge", self.cache.purge(&resource.name)).await
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
