//! Leases that were asked for, until whoever asked has them.

use std::sync::Arc;

use super::lane::Live;
use super::shared::Shared;
use super::steps;
use crate::cache::entry::Fence;
use crate::cache::lane::PATIENCE;

/// Leases that the server may have given. Dropped before they are known to be somebody's, they are given back: what they
/// wrote has a number that nobody knows, so it is looked at once more.
pub(super) struct Asked<'a> {
    shared: &'a Arc<Shared>,
    live: &'a Arc<Live>,
    fences: Vec<(&'a str, Fence)>,
}

impl<'a> Asked<'a> {
    pub(super) fn new(shared: &'a Arc<Shared>, live: &'a Arc<Live>) -> Self {
        Self { shared, live, fences: Vec::new() }
    }

    /// This fence is about to be sent.
    pub(super) fn note(&mut self, key: &'a str, fence: Fence) {
        self.fences.push((key, fence));
    }

    /// Whoever asked knows what was given.
    pub(super) fn settled(mut self) {
        self.fences.clear();
    }
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        if self.fences.is_empty() {
            return;
        }
        let fences: Vec<(String, Fence)> = self.fences.iter().map(|(key, fence)| ((*key).to_owned(), *fence)).collect();
        let (shared, live) = (Arc::clone(self.shared), Arc::clone(self.live));
        self.shared.returns.begin(async move {
            let held: Vec<(&str, Fence)> = fences.iter().map(|(key, fence)| (key.as_str(), *fence)).collect();
            if let Err(error) = steps::give_back(&shared, &live, &held, PATIENCE).await {
                tracing::debug!(%error, count = held.len(), "leases that nobody has could not be given back");
            }
        });
    }
}
