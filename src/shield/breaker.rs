//! A breaker: after some failures in a row without a success the other side is not asked any more, until a probe finds that
//! it answers.
//!
//! ```text
//!            so many failures in a row          a probe is answered
//!   closed ───────────────────────────▶ open ──────────────────────▶ half-open
//!     ▲                                  ▲    the next failure            │
//!     │                                  └────────────────────────────────┤
//!     └───────────────────────────────────────────────────────────────────┘
//!                        the next answer, to a probe or to anybody
//! ```
//!
//! It has no clock: whoever looks after the other side sends the probes, at a pace of his own. It refuses nothing by itself
//! either; what an open breaker means is up to whoever asks it. The pattern is M. Nygard's ("Release It!", 2007).

use std::sync::atomic::{AtomicU32, Ordering};

/// How a breaker is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The other side is asked, and answers.
    Closed,
    /// It has answered a probe and is asked again; one failure is enough to open it anew.
    HalfOpen,
    /// It is not asked.
    Open,
}

impl State {
    /// The value of `cache_aside_breaker_state`.
    #[must_use]
    pub fn gauge(self) -> i64 {
        match self {
            Self::Closed => 0,
            Self::HalfOpen => 1,
            Self::Open => 2,
        }
    }
}

/// A breaker, shared by all who ask the same other side.
#[derive(Debug)]
pub struct Breaker {
    /// Failures in a row while it is closed; [`HALF_OPEN`] or [`OPEN`] otherwise.
    state: AtomicU32,
    limit: u32,
}

const HALF_OPEN: u32 = u32::MAX - 1;
const OPEN: u32 = u32::MAX;

impl Breaker {
    /// One that is closed, and opens after so many failures in a row; at least one.
    #[must_use]
    pub fn closed(limit: u32) -> Self {
        Self { state: AtomicU32::new(0), limit }
    }

    /// One that stays open until the first probe is answered.
    #[must_use]
    pub fn open(limit: u32) -> Self {
        Self { state: AtomicU32::new(OPEN), limit }
    }

    /// How it is.
    #[must_use]
    pub fn state(&self) -> State {
        match self.state.load(Ordering::Acquire) {
            OPEN => State::Open,
            HALF_OPEN => State::HalfOpen,
            _ => State::Closed,
        }
    }

    /// Somebody was answered. One relaxed load where all is well. An open one stays open: the answer may be to a question
    /// from before.
    pub fn answered(&self) {
        let state = self.state.load(Ordering::Relaxed);
        if state != 0 && state != OPEN {
            // Whoever was faster knows better.
            let _ = self.state.compare_exchange(state, 0, Ordering::AcqRel, Ordering::Relaxed);
        }
    }

    /// Somebody was not answered; whether this opened it.
    pub fn failed(&self) -> bool {
        let next = |state| match state {
            OPEN => None,
            HALF_OPEN => Some(OPEN),
            failures if failures + 1 >= self.limit => Some(OPEN),
            failures => Some(failures + 1),
        };
        let before = self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
        before.is_ok_and(|before| next(before) == Some(OPEN))
    }

    /// A probe was answered: an open one is half-open now, any other closed.
    pub fn probed(&self) {
        let next = |state| Some(if state == OPEN { HALF_OPEN } else { 0 });
        // It never fails: there always is a next state.
        let _ = self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
    }

    /// There is nobody to ask any more.
    pub fn lost(&self) {
        self.state.store(OPEN, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Breaker, State};

    #[derive(Clone, Copy, Debug)]
    enum Event {
        Answered,
        Failed,
        Probed,
        Lost,
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let one = prop_oneof![
            Just(Event::Answered),
            Just(Event::Failed),
            Just(Event::Failed),
            Just(Event::Probed),
            Just(Event::Lost)
        ];
        prop::collection::vec(one, 0..60)
    }

    proptest! {
        /// The picture at the top of the file, in other words.
        #[test]
        fn it_goes_by_the_book(events in events(), limit in 1_u32..6) {
            let breaker = Breaker::closed(limit);
            let (mut state, mut failures) = (State::Closed, 0);
            for event in events {
                let before = state;
                match (event, state) {
                    (Event::Failed, State::Closed) => {
                        failures += 1;
                        if failures == limit {
                            state = State::Open;
                        }
                    }
                    (Event::Failed | Event::Lost, _) => state = State::Open,
                    (Event::Probed, State::Open) => state = State::HalfOpen,
                    (Event::Answered, State::Open) => {}
                    (Event::Answered | Event::Probed, _) => state = State::Closed,
                }
                if state != State::Closed || !matches!(event, Event::Failed) {
                    failures = 0;
                }
                match event {
                    Event::Answered => breaker.answered(),
                    Event::Probed => breaker.probed(),
                    Event::Lost => breaker.lost(),
                    Event::Failed => {
                        let opened = breaker.failed();
                        prop_assert_eq!(opened, before != State::Open && state == State::Open);
                    }
                }
                prop_assert_eq!(breaker.state(), state);
            }
        }
    }

    #[test]
    fn one_that_never_had_anybody_to_ask_is_open() {
        let breaker = Breaker::open(5);
        assert_eq!(breaker.state(), State::Open);
        breaker.answered();
        assert_eq!(breaker.state(), State::Open, "nobody can have been asked since");
        breaker.probed();
        assert_eq!(breaker.state(), State::HalfOpen);
        breaker.probed();
        assert_eq!(breaker.state(), State::Closed);
    }
}
