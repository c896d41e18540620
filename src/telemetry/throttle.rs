//! Warnings that come by the thousand while something is down, let through one by one.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Between two warnings about the same thing.
const INTERVAL: Duration = Duration::from_secs(5);

/// Lets one warning per kind and interval through, and counts the rest.
#[derive(Debug, Default)]
pub struct Throttle {
    said: Mutex<HashMap<Kind, Said>>,
}

/// What is warned about, and of which kind.
type Kind = (&'static str, &'static str);
/// When the last warning passed, and how many were kept back since.
type Said = (Instant, u64);

impl Throttle {
    /// Whether to say it now: `Some` with the number of those kept back since the last one.
    #[must_use]
    pub fn pass(&self, what: &'static str, kind: &'static str) -> Option<u64> {
        self.pass_at(what, kind, Instant::now())
    }

    fn pass_at(&self, what: &'static str, kind: &'static str, now: Instant) -> Option<u64> {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        match said.get_mut(&(what, kind)) {
            Some((last, kept)) if now.duration_since(*last) < INTERVAL => {
                *kept += 1;
                None
            }
            Some((last, kept)) => {
                *last = now;
                Some(std::mem::take(kept))
            }
            None => {
                said.insert((what, kind), (now, 0));
                Some(0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::Throttle;

    #[test]
    fn one_of_each_kind_passes_and_the_rest_is_counted() {
        let (throttle, start) = (Throttle::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(throttle.pass_at("get", "timeout", at(0)), Some(0));
        assert_eq!(throttle.pass_at("get", "timeout", at(1)), None);
        assert_eq!(throttle.pass_at("get", "timeout", at(4)), None);
        assert_eq!(throttle.pass_at("get", "refused", at(4)), Some(0));
        assert_eq!(throttle.pass_at("get", "timeout", at(5)), Some(2));
        assert_eq!(throttle.pass_at("get", "timeout", at(11)), Some(0));
    }
}
