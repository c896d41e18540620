//! Writes that must end, whoever waits for them.

use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

use crate::cache::AnyCache;

/// Writes under way, and invalidations that follow a write. Clones share everything.
#[derive(Clone, Debug, Default)]
pub struct Writes(TaskTracker);

impl Writes {
    /// Runs a write to its end, whether or not anybody waits for it.
    pub(super) fn run<T: Send + 'static>(
        &self,
        runtime: &Handle,
        work: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<T> {
        self.0.spawn_on(work, runtime)
    }

    /// Waits until all of them have ended and the cache was told, for `patience` at most; whether that was so.
    pub async fn settle(&self, cache: &AnyCache, patience: Duration) -> bool {
        self.0.close();
        let settled = async {
            self.0.wait().await;
            while cache.owes() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let settled = tokio::time::timeout(patience, settled).await.is_ok();
        if !settled {
            tracing::error!(
                "stopping although the cache was not told of every write: entries may be stale until their TTL ends"
            );
        }
        settled
    }
}
