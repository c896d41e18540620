//! The right to a connection. There are as many seats as there may be connections, and each connection has one, from the
//! moment at which it begins to be made until it has ended: so many are there at most, whatever becomes of whoever made it.
//!
//! Those of the connections that are kept open are offered: whoever needs a connection makes it himself, at once. The others
//! are held back; so are those for which the server gave no connection.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Semaphore, SemaphorePermit};

/// All seats of a pool.
pub(super) struct Seats {
    size: usize,
    kept: usize,
    counts: Mutex<Counts>,
    /// One for each that is offered.
    offered: Semaphore,
}

/// What is neither taken nor offered is held back.
struct Counts {
    taken: usize,
    /// Those among them whose connections are being made beside what is kept.
    beside: usize,
    /// No more than bring the others to the number that is kept.
    offered: usize,
}

impl Counts {
    /// How many more are to be offered of so many seats.
    fn lacking(&self, size: usize, kept: usize) -> usize {
        let counted = self.taken - self.beside + self.offered;
        kept.saturating_sub(counted).min(size - self.taken - self.offered)
    }
}

/// A seat that is taken; it is left when dropped, and offered to others where it is one of those that are kept open.
pub(super) struct Seat {
    seats: Arc<Seats>,
    beside: bool,
    withheld: bool,
}

impl Seats {
    pub(super) fn new(size: usize, kept: usize) -> Arc<Self> {
        let counts = Mutex::new(Counts { taken: 0, beside: 0, offered: kept });
        Arc::new(Self { size, kept, counts, offered: Semaphore::new(kept) })
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn seat(self: &Arc<Self>, beside: bool) -> Seat {
        Seat { seats: Arc::clone(self), beside, withheld: false }
    }

    /// One that is offered, after a wait in line.
    pub(super) async fn offered(self: &Arc<Self>) -> Option<Seat> {
        // The semaphore is never closed.
        self.offered.acquire().await.ok().map(|permit| self.accept(permit))
    }

    /// One that is offered and that nobody waits for.
    pub(super) fn try_offered(self: &Arc<Self>) -> Option<Seat> {
        self.offered.try_acquire().ok().map(|permit| self.accept(permit))
    }

    fn accept(self: &Arc<Self>, permit: SemaphorePermit<'_>) -> Seat {
        permit.forget();
        let mut counts = self.counts();
        counts.offered -= 1;
        counts.taken += 1;
        self.seat(false)
    }

    /// One of those that are held back, unless there are others. Until [`Seat::settle`] those who need a connection may make
    /// one as if this were not there: what is tried here may hang.
    pub(super) fn held_back(self: &Arc<Self>) -> Option<Seat> {
        let mut counts = self.counts();
        (counts.offered == 0 && counts.taken < self.size).then(|| {
            counts.taken += 1;
            counts.beside += 1;
            self.seat(true)
        })
    }

    /// One of a connection that is to be kept open and is not there.
    pub(super) fn missing(self: &Arc<Self>) -> Option<Seat> {
        self.try_offered().or_else(|| {
            let mut counts = self.counts();
            (counts.lacking(self.size, self.kept) > 0).then(|| {
                counts.taken += 1;
                self.seat(false)
            })
        })
    }
}

impl Seat {
    /// The connection is there.
    pub(super) fn settle(mut self) -> Self {
        if self.beside {
            self.beside = false;
            self.seats.counts().beside -= 1;
        }
        self
    }

    /// Leaves it, and offers it to nobody.
    pub(super) fn withhold(mut self) {
        self.withheld = true;
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut counts = self.seats.counts();
        counts.taken -= 1;
        counts.beside -= usize::from(self.beside);
        if !self.withheld && counts.lacking(self.seats.size, self.seats.kept) > 0 {
            counts.offered += 1;
            self.seats.offered.add_permits(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::{Seat, Seats};

    #[test]
    fn as_many_as_are_kept_are_offered_and_never_more_are_taken_than_there_are() {
        let seats = Seats::new(5, 3);
        assert!(seats.held_back().is_none(), "those that are offered come first");
        let mut taken: Vec<Seat> = std::iter::from_fn(|| seats.try_offered()).collect();
        assert_eq!(taken.len(), 3);
        taken.extend(std::iter::from_fn(|| seats.held_back()));
        assert_eq!(taken.len(), 5);
        assert!(seats.missing().is_none());
        // What is left goes back to where it is missing.
        taken.truncate(3);
        assert!(seats.try_offered().is_none());
        taken.truncate(1);
        taken.extend(std::iter::from_fn(|| seats.missing()));
        assert_eq!(taken.len(), 3);
        taken.extend(std::iter::from_fn(|| seats.held_back()));
        assert_eq!(taken.len(), 5);
    }

    #[test]
    fn whoever_waits_for_one_gets_it_and_one_who_leaves_takes_none_along() {
        let seats = Seats::new(1, 1);
        let first = seats.try_offered().expect("one is offered");
        {
            let mut gone = Box::pin(seats.offered());
            let mut next = Box::pin(seats.offered());
            assert!((&mut gone).now_or_never().is_none() && (&mut next).now_or_never().is_none());
            drop(first);
            assert!(seats.try_offered().is_none(), "others were there before");
            // It is his by now, and he does not know.
            drop(gone);
            assert!(next.now_or_never().flatten().is_some());
        }
        assert!(seats.try_offered().is_some());
    }

    #[test]
    fn what_is_tried_beside_takes_nothing_from_those_who_need_one() {
        let seats = Seats::new(4, 2);
        let first: Vec<Seat> = std::iter::from_fn(|| seats.try_offered()).collect();
        let beside = [seats.held_back().expect("two are held back"), seats.held_back().expect("two are held back")];
        drop(first);
        let again: Vec<Seat> = std::iter::from_fn(|| seats.try_offered()).collect();
        assert_eq!(again.len(), 2);
        let there = beside.map(Seat::settle);
        drop(again);
        assert!(seats.try_offered().is_none(), "two are there");
        drop(there);
        assert_eq!(std::iter::from_fn(|| seats.try_offered()).collect::<Vec<_>>().len(), 2);
    }

    #[test]
    fn what_is_withheld_is_offered_to_nobody_until_somebody_leaves() {
        let seats = Seats::new(3, 2);
        let there = seats.try_offered().expect("two are offered");
        seats.try_offered().expect("two are offered").withhold();
        assert!(seats.try_offered().is_none());
        // But by whoever sees to it that some are kept, or makes more for those who wait.
        seats.missing().expect("one is missing").withhold();
        seats.held_back().expect("two are held back").withhold();
        assert!(seats.try_offered().is_none());
        drop(there);
        assert!(seats.try_offered().is_some(), "one who has left makes up for it");
    }
}
