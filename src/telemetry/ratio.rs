//! Hit and miss ratios over the last five minutes, from samples of the counters.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The window.
const WINDOW: Duration = Duration::from_mins(5);
/// Between two samples.
pub(super) const SAMPLE: Duration = Duration::from_secs(10);

/// Requests that were answered from a cache, and those that were not, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) hits: u64,
    pub(super) misses: u64,
}

/// Samples of one resource's counts.
#[derive(Debug, Default)]
pub(super) struct Window {
    samples: VecDeque<(Instant, Counts)>,
}

impl Window {
    /// Keeps a sample, and forgets what is older than the window.
    pub(super) fn sample(&mut self, now: Instant, counts: Counts) {
        while self.samples.get(1).is_some_and(|(taken, _)| now.duration_since(*taken) >= WINDOW) {
            self.samples.pop_front();
        }
        self.samples.push_back((now, counts));
    }

    /// The share of hits between the start of the window and `counts`; `None` without a request in it.
    pub(super) fn hit_ratio(&self, now: Instant, counts: Counts) -> Option<f64> {
        let start = self.samples.iter().rev().find(|(taken, _)| now.duration_since(*taken) >= WINDOW);
        let before = start.map(|(_, counts)| *counts).unwrap_or_default();
        let (hits, misses) = (counts.hits - before.hits, counts.misses - before.misses);
        #[expect(clippy::cast_precision_loss, reason = "a ratio needs no more than 53 bits")]
        (hits + misses > 0).then(|| hits as f64 / (hits + misses) as f64)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{Counts, Window};

    #[test]
    fn only_the_last_five_minutes_count() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let counts = |hits, misses| Counts { hits, misses };
        let mut window = Window::default();
        assert_eq!(window.hit_ratio(at(0), counts(0, 0)), None);
        assert_eq!(window.hit_ratio(at(1), counts(3, 1)), Some(0.75));
        for tick in 0..60_u64 {
            window.sample(at(tick * 10), counts(100, 100));
        }
        assert_eq!(window.hit_ratio(at(601), counts(100, 100)), None, "nothing happened for five minutes");
        assert_eq!(window.hit_ratio(at(601), counts(101, 103)), Some(0.25));
    }
}
