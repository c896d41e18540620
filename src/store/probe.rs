//! The connection over which a database is asked whether it answers, outside the pool: a long queue is no dead database.
//!
//! Making it may take longer than a question may (a database far away, TLS). So what is being made goes on between questions, and
//! a later one finds it made: begun anew each time it would never be.

use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::StoreError;

/// What one question may take, and the part of one question in making its connection.
pub(super) const QUESTION: Duration = Duration::from_secs(1);

/// One connection, there or being made.
#[derive(Debug)]
pub(super) struct Probe<C> {
    there: Option<C>,
    making: Option<JoinHandle<Result<C, StoreError>>>,
}

impl<C> Default for Probe<C> {
    fn default() -> Self {
        Self { there: None, making: None }
    }
}

impl<C: Send + 'static> Probe<C> {
    /// The connection to ask over. Whoever was answered gives it back by [`Self::keep`].
    pub(super) fn take(&mut self) -> Option<C> {
        self.there.take()
    }

    pub(super) fn keep(&mut self, connection: C) {
        self.there = Some(connection);
    }

    /// Makes one, or waits for the one that is being made; to have made one is an answer. `making` must end by itself.
    ///
    /// # Errors
    ///
    /// [`StoreError::TimedOut`] where it goes on, and those of `making`.
    pub(super) async fn make(
        &mut self,
        runtime: &Handle,
        making: impl Future<Output = Result<C, StoreError>> + Send + 'static,
    ) -> Result<(), StoreError> {
        let task = self.making.get_or_insert_with(|| runtime.spawn(making));
        let made = tokio::time::timeout(QUESTION, task).await.map_err(|_| StoreError::TimedOut)?;
        self.making = None;
        self.there = Some(made.map_err(|_| StoreError::Unavailable("the service is stopping".into()))??);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use tokio::runtime::Handle;

    use super::{Probe, QUESTION, StoreError};

    #[tokio::test(start_paused = true)]
    async fn what_takes_longer_than_a_question_is_made_once_and_found_by_a_later_one() {
        let (mut probe, begun) = (Probe::default(), Arc::new(AtomicU32::new(0)));
        let mut answers = Vec::new();
        for _ in 0..4 {
            let begun = Arc::clone(&begun);
            let making = async move {
                let number = begun.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(QUESTION * 7 / 2).await;
                Ok(number)
            };
            answers.push(probe.make(&Handle::current(), making).await);
        }
        let silent = Err(StoreError::TimedOut);
        assert_eq!(answers, [silent.clone(), silent.clone(), silent, Ok(())]);
        assert_eq!((probe.take(), begun.load(Ordering::Relaxed)), (Some(0), 1));
    }

    #[tokio::test(start_paused = true)]
    async fn after_one_that_failed_there_is_another_one() {
        let mut probe = Probe::default();
        let refused = StoreError::Refused(String::new());
        let failing = {
            let refused = refused.clone();
            async { Err(refused) }
        };
        assert_eq!(probe.make(&Handle::current(), failing).await, Err(refused));
        assert_eq!(probe.make(&Handle::current(), async { Ok(2) }).await, Ok(()));
        assert_eq!((probe.take(), probe.take()), (Some(2), None));
        probe.keep(3);
        assert_eq!(probe.take(), Some(3));
    }
}
