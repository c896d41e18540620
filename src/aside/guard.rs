//! What stands before the store: its breaker, and the budget of retries.
//!
//! Whether a database answers is not judged by loads: one heavy list that times out must not refuse everybody's rows. It is
//! judged by a question that costs nothing, asked beside the queue ([`Store::ping`](crate::store::Store::ping)); a load that
//! can't reach the database only has it asked sooner, and one that is answered outweighs the questions that were not. While the
//! breaker is open nobody waits for a database that does not answer: what is stale is served at once, and all else is
//! refused at once. A store that nobody asks (a program's own loader) never opens it.
//!
//! A database that has no room for one more connection, or does not take our password any more, answers: whoever has a
//! connection is served. That nobody storms it for more is the pool's to see to.

use std::time::Duration;

use tokio::sync::Notify;

use crate::shield::{Breaker, Budget, State};
use crate::store::StoreError;

/// So many questions in a row that are not answered open the breaker. One might be the connection that it went over.
const UNANSWERED: u32 = 2;
/// Between two questions while all is well.
const CALM: Duration = Duration::from_millis(500);
/// Between two questions while it isn't, and after a load has found so.
const SOON: Duration = Duration::from_millis(100);

/// The guard of one store.
#[derive(Debug)]
pub struct Guard {
    breaker: Breaker,
    pub(super) budget: Budget,
    /// Rings when a load could not reach the store.
    doubt: Notify,
}

impl Default for Guard {
    fn default() -> Self {
        Self { breaker: Breaker::closed(UNANSWERED), budget: Budget::default(), doubt: Notify::new() }
    }
}

impl Guard {
    /// How the breaker is.
    #[must_use]
    pub fn state(&self) -> State {
        self.breaker.state()
    }

    /// Whether the store may be asked.
    ///
    /// # Errors
    ///
    /// [`StoreError::Unavailable`] while it is known not to answer.
    pub(super) fn admit(&self) -> Result<(), StoreError> {
        match self.state() {
            State::Open => Err(StoreError::Unavailable("it did not answer lately, and is asked again soon".into())),
            State::Closed | State::HalfOpen => Ok(()),
        }
    }

    /// A load or a write has ended so.
    pub(super) fn learn(&self, failure: Option<&StoreError>) {
        match failure {
            None => self.breaker.answered(),
            Some(StoreError::Unavailable(_)) => self.doubt.notify_one(),
            Some(_) => {}
        }
    }

    /// The store was asked whether it answers. To refuse us is an answer too; that it is busy says nothing.
    pub fn asked(&self, answer: &Result<(), StoreError>) {
        let before = self.state();
        match answer {
            Ok(()) | Err(StoreError::Refused(_)) => self.breaker.probed(),
            Err(StoreError::Unavailable(_) | StoreError::TimedOut) => {
                self.breaker.failed();
            }
            Err(_) => {}
        }
        match (before, self.state()) {
            (State::Open, State::Open) => {}
            (_, State::Open) => tracing::warn!("the database is not asked until it answers"),
            (State::Open, _) => tracing::info!("the database is asked again"),
            _ => {}
        }
    }

    /// Waits until the store is to be asked again after this answer.
    pub async fn pause(&self, answer: &Result<(), StoreError>) {
        match answer {
            // It would have to make a connection each time, and loads that can't have one either don't hasten that.
            Err(StoreError::Refused(_)) => return tokio::time::sleep(CALM).await,
            Ok(()) if self.state() == State::Closed => {}
            _ => return tokio::time::sleep(SOON).await,
        }
        let doubted = async {
            self.doubt.notified().await;
            tokio::time::sleep(SOON).await;
        };
        tokio::select! {
            () = tokio::time::sleep(CALM) => {}
            () = doubted => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{CALM, Guard, State, StoreError};

    #[test]
    fn only_questions_open_it_and_a_load_that_is_answered_outweighs_them() {
        let (guard, away) = (Guard::default(), || StoreError::Unavailable(String::new()));
        for failure in [away(), StoreError::TimedOut, StoreError::Busy] {
            for _ in 0..100 {
                guard.learn(Some(&failure));
            }
        }
        assert_eq!(guard.state(), State::Closed, "loads alone don't");
        guard.asked(&Err(away()));
        guard.learn(None);
        guard.asked(&Err(StoreError::TimedOut));
        assert_eq!(guard.state(), State::Closed, "it answered in between");
        guard.asked(&Err(StoreError::Busy));
        assert_eq!(guard.state(), State::Closed, "a busy one is no dead one");
        guard.asked(&Err(StoreError::TimedOut));
        assert_eq!((guard.state(), guard.admit().is_ok()), (State::Open, false));
        guard.learn(None);
        assert_eq!(guard.state(), State::Open, "that was asked before");
        guard.asked(&Ok(()));
        assert_eq!((guard.state(), guard.admit().is_ok()), (State::HalfOpen, true));
        for failure in [StoreError::TimedOut, away()] {
            guard.learn(Some(&failure));
            assert_eq!(guard.state(), State::HalfOpen, "one slow statement, one connection from before");
        }
        guard.asked(&Err(away()));
        assert_eq!(guard.state(), State::Open);
        guard.asked(&Ok(()));
        guard.learn(None);
        assert_eq!(guard.state(), State::Closed);
    }

    #[test]
    fn one_that_refuses_us_answers_and_is_asked_by_those_who_have_a_connection() {
        let (guard, refused) = (Guard::default(), Err(StoreError::Refused("too many connections".into())));
        for _ in 0..10 {
            guard.asked(&refused);
        }
        assert_eq!(guard.state(), State::Closed);
        for _ in 0..2 {
            guard.asked(&Err(StoreError::TimedOut));
        }
        assert_eq!(guard.state(), State::Open);
        guard.asked(&refused);
        assert!(guard.admit().is_ok(), "{:?}", guard.state());
        guard.asked(&refused);
        assert_eq!(guard.state(), State::Closed);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_refuses_us_is_not_asked_more_often_because_many_fail() {
        let guard = Guard::default();
        guard.learn(Some(&StoreError::Unavailable(String::new())));
        let begun = tokio::time::Instant::now();
        guard.pause(&Err(StoreError::Refused(String::new()))).await;
        assert_eq!(begun.elapsed(), CALM);
    }
}
