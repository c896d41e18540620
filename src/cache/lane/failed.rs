//! What a look that failed says of its connection.

use super::Wait;

/// So many looks in a row may fail before the connection is given up.
const STRIKES: u32 = 3;
/// The same, where this process stood still during some of them: a connection that is dead is found out in the end.
const FAILURES: u32 = 12;

/// Why a look came to nothing.
#[derive(Debug, thiserror::Error)]
pub(in crate::cache) enum Failed {
    /// No answer in time.
    #[error("no answer in time")]
    TimedOut,
    /// No answer, and this process stood still meanwhile.
    #[error("no answer, but this process stood still")]
    StoodStill,
    /// The connection may be of use yet.
    #[error(transparent)]
    Refused(anyhow::Error),
    /// It is of no use any more, for this reason.
    #[error("{error}")]
    Over {
        /// In words.
        reason: &'static str,
        /// What was found.
        error: anyhow::Error,
    },
}

impl Failed {
    /// The same, unless this process stood still while it waited.
    pub(in crate::cache) fn unless(self, wait: Wait) -> Self {
        if matches!(self, Self::TimedOut) && wait.stood_still() { Self::StoodStill } else { self }
    }
}

/// Counts the looks in a row that failed.
#[derive(Debug, Default)]
pub(in crate::cache) struct Strikes {
    strikes: u32,
    failures: u32,
}

impl Strikes {
    /// One more has failed; the reason to give the connection up, if that is enough.
    pub(in crate::cache) fn add(&mut self, failed: &Failed) -> Option<&'static str> {
        self.failures += 1;
        match failed {
            Failed::Over { reason, .. } => return Some(reason),
            Failed::StoodStill => {}
            Failed::TimedOut | Failed::Refused(_) => self.strikes += 1,
        }
        (self.strikes >= STRIKES || self.failures >= FAILURES)
            .then_some("it does not answer, or its control key can't be kept")
    }
}

#[cfg(test)]
mod tests {
    use super::{FAILURES, Failed, STRIKES, Strikes};

    #[test]
    fn a_process_that_stood_still_gives_a_connection_up_later_and_not_never() {
        let until = |failed: Failed| {
            let mut strikes = Strikes::default();
            1 + (0..100).take_while(|_| strikes.add(&failed).is_none()).count()
        };
        assert_eq!(until(Failed::TimedOut), STRIKES as usize);
        assert_eq!(until(Failed::StoodStill), FAILURES as usize);
        assert_eq!(until(Failed::Over { reason: "", error: anyhow::anyhow!("") }), 1);
    }
}
