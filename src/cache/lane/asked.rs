//! Leases that were asked for, until whoever asked has them.

use std::sync::Arc;

use super::Engine;
use crate::cache::entry::Fence;

/// Leases that the server may have given. Dropped before they are known to be somebody's, they are given back.
pub(in crate::cache) struct Asked<'a, E: Engine> {
    engine: &'a Arc<E>,
    live: &'a Arc<E::Live>,
    fences: Vec<(&'a str, Fence)>,
}

impl<'a, E: Engine> Asked<'a, E> {
    pub(in crate::cache) fn new(engine: &'a Arc<E>, live: &'a Arc<E::Live>) -> Self {
        Self { engine, live, fences: Vec::new() }
    }

    /// This fence is about to be sent.
    pub(in crate::cache) fn note(&mut self, key: &'a str, fence: Fence) {
        self.fences.push((key, fence));
    }

    /// Whoever asked knows what was given.
    pub(in crate::cache) fn settled(mut self) {
        self.fences.clear();
    }
}

impl<E: Engine> Drop for Asked<'_, E> {
    fn drop(&mut self) {
        if self.fences.is_empty() {
            return;
        }
        let fences: Vec<(String, Fence)> = self.fences.iter().map(|(key, fence)| ((*key).to_owned(), *fence)).collect();
        let (engine, live) = (Arc::clone(self.engine), Arc::clone(self.live));
        self.engine.returns.begin(async move {
            if let Err(error) = engine.give_back(&live, &fences).await {
                tracing::debug!(%error, count = fences.len(), "leases that nobody has could not be given back");
            }
        });
    }
}
