//! Who waits for what a store is asked to do, and the places in the queue before it.
//!
//! A deadline travels as a fact rather than as a time: every passenger of a flight leaves at his own deadline, or when his
//! client hangs up, and the last one to leave says so here. Until a statement is sent, a store gives up what nobody waits for:
//! its place in the queue, and the connection that it was making. A statement that runs goes on to its end, or to its own
//! timeout: what it finds is stored for the next reader, and what it writes is told to the cache.

#[cfg(any(feature = "postgres", feature = "sqlite"))]
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::StoreError;

/// Whoever waits for one load or write. By default somebody does, to the end. Clones share everything.
#[derive(Clone, Debug, Default)]
pub struct Waiters {
    left: CancellationToken,
    admitted: Arc<Mutex<Option<Instant>>>,
}

impl Waiters {
    /// Says that nobody waits any more.
    pub fn leave(&self) {
        self.left.cancel();
    }

    /// Says so when what this gives is dropped.
    #[must_use]
    pub fn until_dropped(&self) -> impl Drop + use<> {
        self.left.clone().drop_guard()
    }

    /// Resolves once nobody waits any more.
    pub async fn gone(&self) {
        self.left.cancelled().await;
    }

    /// When the last of what had to be waited for was there: from then on the store works. `None` where nothing had to be.
    #[must_use]
    pub fn admitted(&self) -> Option<Instant> {
        *self.admitted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The outcome of `work`, which comes before the store's own, while anybody waits for it. It must be safe to drop at any
    /// moment.
    ///
    /// # Errors
    ///
    /// [`StoreError::Abandoned`], and those of `work`.
    pub async fn or<T>(&self, work: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        let outcome = tokio::select! {
            biased;
            done = work => done,
            () = self.gone() => Err(StoreError::Abandoned),
        };
        *self.admitted.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        outcome
    }
}

/// A place in a bounded queue; it is left when dropped.
#[cfg(any(feature = "postgres", feature = "sqlite"))]
pub(super) struct Place<'a>(&'a AtomicUsize);

#[cfg(any(feature = "postgres", feature = "sqlite"))]
impl<'a> Place<'a> {
    /// `None` where `most` wait already.
    pub(super) fn take(waiting: &'a AtomicUsize, most: usize) -> Option<Self> {
        let next = |taken| (taken < most).then_some(taken + 1);
        waiting.fetch_update(Ordering::SeqCst, Ordering::SeqCst, next).ok().map(|_| Self(waiting))
    }
}

#[cfg(any(feature = "postgres", feature = "sqlite"))]
impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}
