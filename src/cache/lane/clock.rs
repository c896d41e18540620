//! The clock that lanes go by, and who was late: the other side, or this process.
//!
//! A process that stood still (it was stopped, its machine had no time for it) wakes up with all its timers overdue. What did
//! not come by then says nothing of the other side: it may have been there all the time, unread.

use std::pin::Pin;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// A timer that fires so much later than it was due did so because this process stood still. What was waited for has as long
/// again then: whoever is to read it must have his turn first.
const STILL: Duration = Duration::from_millis(50);

/// Milliseconds of a clock that is never set and that runs on while the machine sleeps.
pub(in crate::cache) fn now_ms() -> u64 {
    #[cfg(target_os = "linux")]
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    #[cfg(not(target_os = "linux"))]
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1000 + now.tv_nsec.unsigned_abs() / 1_000_000
}

/// When somebody began to wait for an answer, and for how long he does.
#[derive(Clone, Copy, Debug)]
pub(in crate::cache) struct Wait {
    began: Instant,
    patience: Duration,
}

impl Wait {
    /// Begins to wait.
    pub(in crate::cache) fn new(patience: Duration) -> Self {
        Self { began: Instant::now(), patience }
    }

    /// Whether what has not come by now was not missed by the other side: this process stood still meanwhile.
    pub(in crate::cache) fn stood_still(self) -> bool {
        self.began.elapsed() >= self.patience.saturating_add(STILL)
    }

    /// What comes in time, or was there when this process went on; `None`: nothing.
    pub(in crate::cache) async fn until<T>(self, mut coming: Pin<&mut impl Future<Output = T>>) -> Option<T> {
        let due = self.began + self.patience;
        tokio::select! {
            biased;
            come = coming.as_mut() => return Some(come),
            () = sleep_until(due) => {}
        }
        if !self.stood_still() {
            return None;
        }
        tokio::time::timeout(STILL, coming).await.ok()
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::pin::pin;
    use std::time::Duration;

    use tokio::sync::oneshot;

    use super::{STILL, Wait};

    const PATIENCE: Duration = Duration::from_millis(100);

    #[tokio::test(start_paused = true)]
    async fn what_does_not_come_in_time_is_not_waited_for_and_it_was_not_us() {
        let wait = Wait::new(PATIENCE);
        assert_eq!(wait.until(pin!(pending::<()>())).await, None);
        assert!(!wait.stood_still());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_there_when_a_process_that_stood_still_goes_on_counts() {
        let (there, read) = oneshot::channel();
        let wait = Wait::new(PATIENCE);
        let waiting = tokio::spawn(async move { wait.until(pin!(read)).await });
        tokio::task::yield_now().await;
        tokio::time::advance(PATIENCE + STILL).await;
        // Who waits has found out that his time is over.
        for _ in 0..3 {
            tokio::task::yield_now().await;
        }
        there.send(()).unwrap();
        assert_eq!(waiting.await.unwrap(), Some(Ok(())));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_there_then_either_is_missing_through_no_fault_of_the_other_side() {
        let wait = Wait::new(PATIENCE);
        let waiting = tokio::spawn(async move { wait.until(pin!(pending::<()>())).await });
        tokio::task::yield_now().await;
        tokio::time::advance(PATIENCE + STILL).await;
        assert_eq!(waiting.await.unwrap(), None);
        assert!(wait.stood_still());
    }
}
