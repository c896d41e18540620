//! How many of all loads may be tried again, and when.
//!
//! A retry helps against a connection that died; a herd of them keeps a struggling database down. So every load pays a tenth
//! of a token into a small bucket and every retry takes a whole one out: retries add no more than a tenth to the load. The
//! rule is that of gRPC (A6, "Throttling Retry Attempts") and of Finagle's `RetryBudget`; the tenth and the few attempts are
//! those of "Site Reliability Engineering" (2016), chapter 21. Pauses are drawn evenly from zero to a limit that doubles
//! ("full jitter": M. Brooker, "Exponential Backoff and Jitter", 2015), so that those who failed together don't come back
//! together. A crate that does that much would have to be told of the budget and the deadline all the same.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// A load is tried so many times at most.
pub const ATTEMPTS: u32 = 3;
/// The longest pause before the first retry; twice that before the second.
const PAUSE: Duration = Duration::from_millis(50);
/// What a retry costs, in what a load pays in.
const COST: u32 = 10;
/// The most that is kept: ten retries at once, when all connections die together.
const MOST: u32 = 10 * COST;

/// The pause before a retry: `failed` attempts came before it.
#[must_use]
pub fn pause(failed: u32) -> Duration {
    PAUSE.saturating_mul(1 << failed.saturating_sub(1).min(10)).mul_f64(fastrand::f64())
}

/// Retries that may still be made; full at the start.
#[derive(Debug)]
pub struct Budget(AtomicU32);

impl Default for Budget {
    fn default() -> Self {
        Self(AtomicU32::new(MOST))
    }
}

impl Budget {
    /// A load was begun.
    pub fn pay(&self) {
        let paid = |tokens: u32| (tokens < MOST).then_some(tokens + 1);
        // It fails where it is full.
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, paid);
    }

    /// Takes one retry out; false where there is none left.
    pub fn take(&self) -> bool {
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |tokens| tokens.checked_sub(COST)).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Budget, COST, MOST, pause};

    proptest! {
        #[test]
        fn retries_are_a_tenth_of_all_loads_and_ten(loads in 0_u32..2_000, greed in 1_u32..5) {
            let budget = Budget::default();
            let mut retries = 0;
            for _ in 0..loads {
                budget.pay();
                retries += (0..greed).filter(|_| budget.take()).count();
            }
            let retries = u32::try_from(retries).unwrap();
            prop_assert!(retries <= loads / COST + MOST / COST + 1, "{retries} of {loads}");
            // And no fewer, when they are wanted.
            prop_assert!(retries >= (loads / COST).min(loads), "{retries} of {loads}");
        }

        #[test]
        fn pauses_double_and_are_never_longer(failed in 0_u32..40) {
            prop_assert!(pause(failed).as_millis() <= 50 << failed.saturating_sub(1).min(10));
        }
    }
}
