//! Leases that may have been given to nobody: the command was sent, and whoever asked never had its reply.
//!
//! Until such a lock ended everybody would wait for a load that is not under way. So it is given back, by its own fence,
//! which nobody else's lease has, and over the connection that it was asked for on: there the one comes after the other.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Semaphore;

/// So many are given back at once; of more, the locks end by themselves.
const AT_ONCE: usize = 64;
/// For how long that is tried: about as long as a lock.
pub(in crate::cache) const PATIENCE: Duration = Duration::from_secs(1);

/// What a process gives back to one server.
#[derive(Debug)]
pub(in crate::cache) struct Returns(Arc<Semaphore>);

impl Default for Returns {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(AT_ONCE)))
    }
}

impl Returns {
    /// Gives back in the background.
    pub(in crate::cache) fn begin(&self, giving: impl Future<Output = ()> + Send + 'static) {
        let (Ok(permit), Ok(runtime)) = (Arc::clone(&self.0).try_acquire_owned(), Handle::try_current()) else {
            return;
        };
        runtime.spawn(async move {
            // Where it fails, the locks end by themselves.
            let _ = tokio::time::timeout(PATIENCE, giving).await;
            drop(permit);
        });
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::{AT_ONCE, Returns};

    #[tokio::test(start_paused = true)]
    async fn no_more_are_given_back_at_once_than_are_counted_and_none_for_ever() {
        let returns = Returns::default();
        for _ in 0..AT_ONCE + 10 {
            returns.begin(pending());
        }
        assert_eq!(returns.0.available_permits(), 0);
        tokio::time::sleep(super::PATIENCE * 2).await;
        assert_eq!(returns.0.available_permits(), AT_ONCE);
    }
}
