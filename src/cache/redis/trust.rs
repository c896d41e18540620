//! How old can what this memory has caught up with be? Told by the server's clock: a round notes the time by it and *then*
//! asks the database for a snapshot, and every look brings the time by it. That is worth something only while the clock runs
//! on, and clocks are set.
//!
//! One that was set forward makes a watermark look older, which only claims less. One that was set back makes it look younger.
//! That shows where less time has passed by it between two looks than by this process's clock; from then on no watermark
//! from before counts. Which are those? What was taken ahead of the clock's new time, and also the next one that appears:
//! whoever took that may have looked before, stood still, and told it long after. The one after it was begun when
//! the former was there, and so later than the look.

/// Two clocks that run alike may differ by this much between two looks, in milliseconds.
const DRIFT: u64 = 5;
/// So many watermarks must have come since a clock was found set back, until one counts.
const MOVES: u8 = 2;

/// What one look says of time, all in milliseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    /// When it was sent, and when its reply was there, by this process's clock.
    pub(super) sent: u64,
    pub(super) came: u64,
    /// The reply lay unread for a while.
    pub(super) is_late: bool,
    /// The server's time.
    pub(super) now: u64,
    /// When the watermark that it found was taken, by the server's clock.
    pub(super) taken: u64,
}

/// What looks over one connection have shown, in the order in which they were sent.
#[derive(Debug, Default)]
pub(super) struct Clocks {
    /// The server's time at the last look that was in time, and this process's when its reply was there.
    last: Option<(u64, u64)>,
    /// Only a watermark that was taken later counts: the server's time at the first look, or at the last one that found its
    /// clock set back.
    believed: u64,
    /// So many watermarks more do not count.
    doubted: u8,
}

impl Clocks {
    /// How old the watermark was at most when this look was sent; `None`: nobody knows. `moved`: the look before found
    /// another one.
    pub(super) fn learn(&mut self, look: Look, moved: bool) -> Option<u64> {
        let Look { sent, came, is_late, now, taken } = look;
        self.doubted = self.doubted.saturating_sub(u8::from(moved));
        match self.last {
            // What was taken before this connection's first look says nothing of its age.
            None => self.believed = now,
            Some((last, at)) if now + DRIFT < last + sent.saturating_sub(at) => {
                (self.believed, self.doubted) = (now, MOVES);
            }
            Some(_) => {}
        }
        // Between the server's time of a late reply and ours there may be all that this process missed: a step back as
        // long as that would not be seen.
        if !is_late {
            self.last = Some((now, came));
        }
        let counts = self.doubted == 0 && taken > self.believed && taken <= now;
        counts.then(|| now - taken)
    }
}

#[cfg(test)]
mod tests {
    use super::{Clocks, Look};

    /// A server whose clock is this far ahead of ours, and a look that takes two milliseconds.
    fn look(sent: u64, ahead: u64, taken: u64) -> Look {
        Look { sent, came: sent + 2, is_late: false, now: sent + 1 + ahead, taken }
    }

    /// Trusted: what was taken at 1100 by our clock, with the server's a minute ahead, was seen at 1200.
    fn calm() -> Clocks {
        let mut clocks = Clocks::default();
        assert_eq!(clocks.learn(look(1_000, 60_000, 60_950), true), None, "nobody knows how old that was already");
        assert_eq!(clocks.learn(look(1_100, 60_000, 60_950), false), None);
        assert_eq!(clocks.learn(look(1_200, 60_000, 61_100), true), Some(101));
        clocks
    }

    #[test]
    fn a_watermark_is_as_old_as_the_servers_clock_says() {
        let mut clocks = calm();
        assert_eq!(clocks.learn(look(1_300, 60_000, 61_100), false), Some(201), "the same one grows older");
        assert_eq!(clocks.learn(look(1_400, 60_000, 61_401), true), Some(0));
        assert_eq!(clocks.learn(look(1_500, 60_000, 61_502), true), None, "ahead of the clock");
    }

    #[test]
    fn a_clock_that_was_set_forward_makes_it_older() {
        assert_eq!(calm().learn(look(1_300, 90_000, 61_100), false), Some(30_201));
    }

    #[test]
    fn what_was_taken_before_the_clock_was_set_back_is_never_young() {
        let mut clocks = calm();
        assert_eq!(clocks.learn(look(1_300, 59_000, 61_100), false), None);
        // Ahead of the clock for a second, and then not any more.
        for sent in (1_400..3_000).step_by(100) {
            assert_eq!(clocks.learn(look(sent, 59_000, 61_100), false), None, "at {sent}");
        }
    }

    #[test]
    fn a_round_that_stood_still_while_the_clock_was_set_back_is_not_believed() {
        let mut clocks = calm();
        assert_eq!(clocks.learn(look(1_300, 59_500, 61_100), false), None);
        // Taken at 1250 by our clock, before the step; by the server's it seems to be younger by what the step took.
        assert_eq!(clocks.learn(look(1_800, 59_500, 61_250), true), None);
        assert_eq!(clocks.learn(look(1_900, 59_500, 61_250), false), None);
        // It was there when this one was begun.
        assert_eq!(clocks.learn(look(2_000, 59_500, 61_450), true), Some(51));
    }

    #[test]
    fn a_late_look_does_not_hide_that_the_clock_was_set_back() {
        let mut clocks = calm();
        // The server has answered at once; then its clock was set back by three seconds, while this process stood still for
        // five.
        let late = Look { came: 6_300, is_late: true, ..look(1_300, 60_000, 61_100) };
        assert_eq!(clocks.learn(late, false), Some(201), "as old as it was when that was sent");
        assert_eq!(
            clocks.learn(look(6_310, 57_000, 63_000), true),
            None,
            "taken at 3000 by our clock, and not at 6000"
        );
    }

    #[test]
    fn a_first_look_that_was_late_says_nothing() {
        let mut clocks = Clocks::default();
        let late = Look { came: 6_000, is_late: true, ..look(1_000, 60_000, 60_950) };
        assert_eq!(clocks.learn(late, true), None);
        assert_eq!(clocks.learn(look(6_010, 60_000, 66_000), true), None, "taken before the first that was in time");
        assert_eq!(clocks.learn(look(6_110, 60_000, 66_020), true), Some(91));
    }
}
