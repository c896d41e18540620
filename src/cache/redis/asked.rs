//! Leases that were asked for, until whoever asked has them.

use std::sync::Arc;

use redis::Pipeline;

use super::lane::Live;
use super::shared::Shared;
use crate::cache::entry::Fence;
use crate::cache::lane::PATIENCE;

/// Leases that the server may have given. Dropped before they are known to be somebody's, they are given back.
pub(super) struct Asked<'a> {
    shared: &'a Arc<Shared>,
    live: &'a Live,
    fences: Vec<(&'a str, Fence)>,
}

impl<'a> Asked<'a> {
    pub(super) fn new(shared: &'a Arc<Shared>, live: &'a Live) -> Self {
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
        let mut pipe = Pipeline::with_capacity(self.fences.len());
        for (key, fence) in &self.fences {
            pipe.add_command(self.shared.scripts.release(key, &fence.0));
        }
        let mut conn = self.live.conn.clone();
        // What nobody waits for may never be sent.
        conn.set_response_timeout(PATIENCE);
        self.shared.returns.begin(async move {
            let count = pipe.len();
            if let Err(error) = conn.send_packed_commands(&pipe, 0, count).await {
                tracing::debug!(%error, count, "leases that nobody has could not be given back");
            }
        });
    }
}
