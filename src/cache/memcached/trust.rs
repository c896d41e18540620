//! How old can what this memory has caught up with be? Told without the server's clock, which it has none of that is fine
//! enough, and without comparing the clocks of two machines.
//!
//! Every write of the control key counts its number up by one, whoever writes it and why, and goes through only if nobody
//! has written since it was read. A round reads it, *then* asks the database for a snapshot S, then writes. So when number r
//! was written by a round, its S was taken after number r − 1 was there.
//!
//! Somebody who looks and sees r − 2, or less, knows that r − 1 was not there yet when his look was sent, or after. So if a
//! later look shows him r, its S is younger than the moment at which that earlier look was *sent*, by his own clock,
//! which is all that is needed: until that moment + `max_staleness`, what was read is as current as was promised.
//!
//! One that saw r − 1 proves nothing: the round may have taken its S long before that look, and written long after. Numbers of another epoch
//! prove nothing either: the control key was lost in between, or counted by others.

use std::collections::VecDeque;

/// More are not remembered: what is forgotten only makes less known.
const MOST: usize = 32;

/// What looks over one connection have shown, in the order in which they were sent.
#[derive(Clone, Debug, Default)]
pub(super) struct Numbers {
    epoch: u64,
    /// Each number, and when the last look was sent that saw it.
    seen: VecDeque<(u64, u64)>,
}

impl Numbers {
    /// A look that was sent at this moment saw this number, and a snapshot that came with the number `round`. The moment
    /// after which that snapshot was certainly taken, where one is known.
    pub(super) fn learn(&mut self, epoch: u64, number: u64, round: u64, sent: u64) -> Option<u64> {
        let went_back = self.seen.back().is_some_and(|(last, _)| number < *last);
        if epoch != self.epoch || went_back {
            self.epoch = epoch;
            self.seen.clear();
        }
        match self.seen.back_mut() {
            Some((last, at)) if *last == number => *at = sent,
            _ => self.seen.push_back((number, sent)),
        }
        let proves = |number: u64| number.checked_add(2).is_some_and(|least| least <= round);
        // Only the last that proves anything is needed from now on: later rounds have higher numbers.
        while self.seen.get(1).is_some_and(|(second, _)| proves(*second)) {
            self.seen.pop_front();
        }
        if self.seen.len() > MOST {
            self.seen.remove(1);
        }
        self.seen.front().filter(|(first, _)| proves(*first)).map(|(_, at)| *at)
    }
}

#[cfg(test)]
mod tests {
    use super::{MOST, Numbers};

    #[test]
    fn a_snapshot_is_younger_than_the_last_look_that_saw_two_numbers_less() {
        let mut numbers = Numbers::default();
        assert_eq!(numbers.learn(1, 10, 10, 100), None, "nobody knows how old that was already");
        assert_eq!(numbers.learn(1, 10, 10, 200), None);
        assert_eq!(numbers.learn(1, 11, 11, 300), None, "its snapshot may be from before the first look");
        assert_eq!(numbers.learn(1, 12, 12, 400), Some(200));
        assert_eq!(numbers.learn(1, 12, 12, 500), Some(200), "the same snapshot grows no younger");
        assert_eq!(numbers.learn(1, 15, 15, 600), Some(500));
    }

    #[test]
    fn what_others_write_counts_and_brings_no_snapshot() {
        let mut numbers = Numbers::default();
        numbers.learn(1, 10, 10, 100);
        // A registration and a purge: the snapshot is the one of number 10 still.
        assert_eq!(numbers.learn(1, 12, 10, 200), None);
        assert_eq!(numbers.learn(1, 13, 13, 300), Some(100));
        assert_eq!(numbers.learn(1, 14, 14, 400), Some(200));
    }

    #[test]
    fn another_epoch_and_a_number_that_went_back_begin_again() {
        let mut numbers = Numbers::default();
        numbers.learn(1, 10, 10, 100);
        assert_eq!(numbers.learn(2, 12, 12, 200), None);
        assert_eq!(numbers.learn(2, 14, 14, 300), Some(200));
        assert_eq!(numbers.learn(2, 5, 5, 400), None);
        assert_eq!(numbers.learn(2, 7, 7, 500), Some(400));
    }

    #[test]
    fn what_is_remembered_is_bounded_and_forgetting_claims_no_more() {
        let mut numbers = Numbers::default();
        for number in 1..1_000 {
            assert_eq!(numbers.learn(1, number, 1, number), None);
        }
        assert!(numbers.seen.len() <= MOST);
        let found = numbers.learn(1, 2_000, 2_000, 5_000);
        assert_eq!(found, Some(999));
        let mut numbers = Numbers::default();
        for number in 1..1_000 {
            numbers.learn(1, number, 1, number);
        }
        assert!(numbers.learn(1, 1_000, 500, 5_000).is_some_and(|at| at <= 498));
    }
}
