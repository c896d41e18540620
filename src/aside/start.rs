//! What a new replica holds in process before anybody asks it: what is hot at others, out of the cache and from nowhere else.

use std::time::{Duration, Instant};

use super::Aside;
use crate::cache::{AnyCache, Cache, CacheError, Lookup, Place};
use crate::catalog::Target;
use crate::store::Load;

/// Entries that are read at once.
const AT_ONCE: usize = 32;
/// Between two looks whether the tier in process answers.
const AGAIN: Duration = Duration::from_millis(50);

impl<S: Load + 'static> Aside<AnyCache, S> {
    /// Whether this process may hold the entry now: as any, or because it is hot.
    #[must_use]
    pub fn may_hold(&self, target: &Target) -> bool {
        let place = self.core.place(target, Instant::now());
        target.cacheable() && !place.local_ttl.is_zero() && place.groups.is_empty()
    }

    /// Takes these entries to be hot for a moment, and reads them from the cache as any reader would, until those that are
    /// there are answered by the tier in this process. Never reads the database.
    pub async fn hold(&self, targets: &[Target]) {
        self.core.top.expect(targets.iter().map(Target::entry), Instant::now());
        let mut left: Vec<&Target> = targets.iter().filter(|target| self.may_hold(target)).collect();
        while !left.is_empty() {
            let mut again = Vec::new();
            for some in left.chunks(AT_ONCE) {
                let now = Instant::now();
                let places: Vec<Place<'_>> = some.iter().map(|target| self.core.place(target, now)).collect();
                match self.core.asked("get_many", self.core.cache.read_many(&places)).await {
                    // The tier follows the cache by itself, and does not answer before it has caught up.
                    Ok(found) => {
                        let elsewhere = |found: &Lookup| matches!(found, Lookup::Fresh(entry) if !entry.local);
                        let found = some.iter().zip(&found).filter(|(_, found)| elsewhere(found));
                        again.extend(found.map(|(target, _)| *target));
                    }
                    Err(CacheError::Untrusted | CacheError::TimedOut) => again.extend(some),
                    Err(_) => {}
                }
            }
            left = again;
            if !left.is_empty() {
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}
