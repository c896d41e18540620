//! Points in the outbox's history: up to which id everything is known, and the ids below it that may still be committed.
//!
//! Ids are given out before rows are visible: a transaction with a low id may commit after one with a high id. A cursor
//! over ids would skip it for ever, so a point remembers the ids that it has not seen. Most of them never come (their
//! transactions were rolled back), and leave it after a while.

use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Everything up to `high` was seen, but for the gaps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Point {
    high: u64,
    /// First id → last id and the minute at which the gap was noticed. Gaps don't overlap.
    gaps: BTreeMap<u64, Gap>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Gap {
    last: u64,
    since: u64,
}

impl Point {
    /// A point before everything.
    pub(super) fn beginning() -> Self {
        Self::default()
    }

    /// `1:HIGH;MINUTE=FIRST-LAST,ID;…`: the gaps by the minute in which they were noticed.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.strip_prefix("1:")?.split(';');
        let mut point = Self { high: parts.next()?.parse().ok()?, gaps: BTreeMap::new() };
        for part in parts {
            let (since, ranges) = part.split_once('=')?;
            let since = since.parse().ok()?;
            for range in ranges.split(',') {
                let (first, last) = range.split_once('-').unwrap_or((range, range));
                let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
                if first > last || last >= point.high {
                    return None;
                }
                point.gaps.insert(first, Gap { last, since });
            }
        }
        Some(point)
    }

    pub(super) fn text(&self) -> String {
        let mut by_minute: BTreeMap<u64, String> = BTreeMap::new();
        for (first, gap) in &self.gaps {
            let ranges = by_minute.entry(gap.since).or_default();
            let comma = if ranges.is_empty() { "" } else { "," };
            // Writing to a String can't fail.
            let _ = if gap.last == *first {
                write!(ranges, "{comma}{first}")
            } else {
                write!(ranges, "{comma}{first}-{}", gap.last)
            };
        }
        let mut text = format!("1:{}", self.high);
        for (minute, ranges) in by_minute {
            let _ = write!(text, ";{minute}={ranges}");
        }
        text
    }

    pub(super) fn high(&self) -> u64 {
        self.high
    }

    /// The condition on `id` that names everything not seen yet. Numbers of our own alone.
    pub(super) fn unseen(&self) -> String {
        let mut condition = format!("id > {}", self.high);
        for (first, gap) in &self.gaps {
            let _ = if gap.last == *first {
                write!(condition, " OR id = {first}")
            } else {
                write!(condition, " OR id BETWEEN {first} AND {}", gap.last)
            };
        }
        condition
    }

    /// What is known once these ids, all that there are of the unseen ones, were seen at `minute`.
    pub(super) fn seen(&self, ids: &mut [u64], minute: u64) -> Self {
        ids.sort_unstable();
        let mut next = Self { high: self.high, gaps: BTreeMap::new() };
        let mut ids = ids.iter().copied().peekable();
        for (first, gap) in &self.gaps {
            let mut from = *first;
            while let Some(id) = ids.next_if(|id| *id <= gap.last) {
                if id > from {
                    next.gaps.insert(from, Gap { last: id - 1, since: gap.since });
                }
                from = id.saturating_add(1).max(from);
            }
            if from <= gap.last {
                next.gaps.insert(from, Gap { last: gap.last, since: gap.since });
            }
        }
        for id in ids {
            if id > next.high + 1 {
                next.gaps.insert(next.high + 1, Gap { last: id - 1, since: minute });
            }
            next.high = next.high.max(id);
        }
        next
    }

    /// The gaps that may leave: those noticed before `minute`, and the oldest of what are more than `most`, if they were
    /// noticed before `recent`.
    pub(super) fn doubtful(&self, minute: u64, most: usize, recent: u64) -> Vec<(u64, u64)> {
        let mut by_age: Vec<(u64, u64, u64)> =
            self.gaps.iter().map(|(first, gap)| (gap.since, *first, gap.last)).collect();
        by_age.sort_unstable();
        let surplus = by_age.len().saturating_sub(most);
        let may_leave = |place: usize, since: u64| since < minute || (place < surplus && since < recent);
        let doubtful = by_age.into_iter().enumerate().filter(|(place, (since, ..))| may_leave(*place, *since));
        doubtful.map(|(_, (_, first, last))| (first, last)).collect()
    }

    /// Gives these gaps up, but for the ids that are alive: they are as good as new at `minute`.
    pub(super) fn settle(&mut self, doubtful: &[(u64, u64)], alive: &mut [u64], minute: u64) {
        alive.sort_unstable();
        for (first, last) in doubtful {
            self.gaps.remove(first);
            let from = alive.partition_point(|id| id < first);
            let mut run: Option<(u64, u64)> = None;
            for id in alive[from..].iter().copied().take_while(|id| id <= last) {
                run = match run {
                    Some((start, end)) if id <= end + 1 => Some((start, id)),
                    Some((start, end)) => {
                        self.gaps.insert(start, Gap { last: end, since: minute });
                        Some((id, id))
                    }
                    None => Some((id, id)),
                };
            }
            if let Some((start, end)) = run {
                self.gaps.insert(start, Gap { last: end, since: minute });
            }
        }
    }

    /// Whether this id was seen.
    pub(super) fn shows(&self, id: u64) -> bool {
        id <= self.high && self.gaps.range(..=id).next_back().is_none_or(|(_, gap)| gap.last < id)
    }

    /// Whether everything that `other` shows was seen here too.
    pub(super) fn contains(&self, other: &Self) -> bool {
        if self.high < other.high {
            // Unless all that is between them is hidden there.
            let hidden = (self.high + 1..=other.high).all_hidden(other);
            if !hidden {
                return false;
            }
        }
        self.gaps.iter().all(|(first, gap)| (*first..=gap.last).all_hidden(other))
    }
}

/// A run of ids, looked at as a whole: it may be long.
trait Hidden {
    fn all_hidden(self, point: &Point) -> bool;
}

impl Hidden for std::ops::RangeInclusive<u64> {
    fn all_hidden(self, point: &Point) -> bool {
        let (mut id, last) = self.into_inner();
        let last = last.min(point.high);
        while id <= last {
            match point.gaps.range(..=id).next_back() {
                Some((_, gap)) if gap.last >= id => id = gap.last + 1,
                _ => return false,
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::Point;

    fn parse(text: &str) -> Point {
        Point::parse(text).expect("a point")
    }

    #[test]
    fn a_point_survives_as_text() {
        for text in ["1:0", "1:10;5=3-4,7", "1:100;5=3;6=9-12,50"] {
            assert_eq!(parse(text).text(), text);
        }
        for wrong in ["", "10", "2:10", "1:x", "1:10;5=11", "1:10;5=4-3", "1:10;5", "1:10;=3", "1:10;5="] {
            assert_eq!(Point::parse(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn what_was_not_seen_is_asked_for_until_it_comes() {
        let point = parse("1:10;5=3-6,8").seen(&mut [15, 4, 12, 8], 9);
        assert_eq!(point, parse("1:15;5=3,5-6;9=11,13-14"));
        let expected = "id > 15 OR id = 3 OR id BETWEEN 5 AND 6 OR id = 11 OR id BETWEEN 13 AND 14";
        assert_eq!(point.unseen(), expected);
        assert_eq!(Point::beginning().seen(&mut [1, 2, 3], 0), parse("1:3"));
    }

    #[test]
    fn old_gaps_leave_unless_they_are_alive() {
        let mut point = parse("1:100;5=3-6,20;9=40");
        let doubtful = point.doubtful(9, 1000, 12);
        assert_eq!(doubtful, [(3, 6), (20, 20)]);
        point.settle(&doubtful, &mut [6, 4, 5], 12);
        assert_eq!(point, parse("1:100;9=40;12=4-6"));
        assert_eq!(point.doubtful(0, 1, 10), [(40, 40)], "the oldest of too many");
        assert_eq!(point.doubtful(0, 1, 9), [], "but for those that are young");
    }

    #[test]
    fn a_run_of_ids_is_compared_as_a_whole() {
        let long = parse("1:18446744073709551000;1=1-18446744073709550000");
        assert!(long.contains(&long) && parse("1:18446744073709551000").contains(&long));
        assert!(!long.contains(&parse("1:5")));
    }

    fn any_point() -> impl Strategy<Value = Point> {
        proptest::collection::btree_set(1_u64..20, 0..12)
            .prop_map(|ids| Point::beginning().seen(&mut ids.into_iter().collect::<Vec<_>>(), 1))
    }

    proptest! {
        #[test]
        fn containing_means_that_every_seen_id_was_seen(a in any_point(), b in any_point()) {
            let expected = (1..25).all(|id| !b.shows(id) || a.shows(id));
            prop_assert_eq!(a.contains(&b), expected);
        }

        #[test]
        fn whatever_the_order_of_commits_each_id_is_asked_for_until_it_was_seen(
            rounds in proptest::collection::vec(proptest::collection::btree_set(1_u64..40, 0..10), 1..8)
        ) {
            let (mut point, mut all) = (Point::beginning(), BTreeSet::new());
            for round in rounds {
                let mut fresh: Vec<u64> = round.into_iter().filter(|id| !point.shows(*id)).collect();
                all.extend(fresh.iter().copied());
                point = point.seen(&mut fresh, 1);
                prop_assert!((1..45).all(|id| point.shows(id) == all.contains(&id)));
            }
            prop_assert_eq!(Point::parse(&point.text()), Some(point));
        }
    }
}
