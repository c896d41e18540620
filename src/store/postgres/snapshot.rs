//! PostgreSQL's snapshots: which transactions were visible at a moment.

/// `xmin:xmax:xip,…`: everything below `xmax` was visible, save those in `xip`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Snapshot {
    xmax: u64,
    /// Under way at that moment, in ascending order.
    open: Vec<u64>,
}

impl Snapshot {
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let (_xmin, xmax, open) = (parts.next()?, parts.next()?.parse().ok()?, parts.next()?);
        let open = open.split(',').filter(|id| !id.is_empty()).map(str::parse).collect::<Result<_, _>>().ok()?;
        parts.next().is_none().then_some(Self { xmax, open })
    }

    /// What was not visible: the transactions under way, and the first that had not begun.
    pub(super) fn unseen(&self) -> (Vec<String>, String) {
        (self.open.iter().map(u64::to_string).collect(), self.xmax.to_string())
    }

    /// Whether everything that `other` shows is visible here too.
    pub(super) fn contains(&self, other: &Self) -> bool {
        let shown = |id: &u64| *id < other.xmax && !other.open.contains(id);
        let hidden_here = self.open.iter().any(shown);
        // What began after this snapshot and is below the other's end must have been under way in the other: all of it.
        let later = other.xmax.saturating_sub(self.xmax);
        let open_there = other.open.iter().filter(|id| **id >= self.xmax).count() as u64;
        !hidden_here && later <= open_there
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Snapshot;

    fn parse(text: &str) -> Snapshot {
        Snapshot::parse(text).expect("a snapshot")
    }

    #[test]
    fn what_postgres_writes_is_read() {
        let snapshot = parse("10:20:10,14,15");
        assert_eq!(snapshot.unseen(), (vec!["10".into(), "14".into(), "15".into()], "20".into()));
        assert_eq!(parse("10:10:").unseen(), (vec![], "10".into()));
        for wrong in ["", "1", "1:2", "a:b:", "1:2:x", "1:2:3:4"] {
            assert_eq!(Snapshot::parse(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn a_later_snapshot_contains_an_earlier_one_and_not_the_other_way_round() {
        let (early, late) = (parse("10:20:10,15"), parse("15:30:15,22"));
        assert!(late.contains(&early) && !early.contains(&late));
        // The same end, but one transaction has finished since.
        assert!(parse("10:20:10").contains(&early) && !early.contains(&parse("10:20:10")));
        assert!(early.contains(&early));
    }

    fn any_snapshot() -> impl Strategy<Value = Snapshot> {
        (1_u64..12, proptest::collection::btree_set(1_u64..12, 0..6))
            .prop_map(|(xmax, open)| Snapshot { xmax, open: open.into_iter().filter(|id| *id < xmax).collect() })
    }

    proptest! {
        #[test]
        fn containing_means_that_every_visible_transaction_is_visible(a in any_snapshot(), b in any_snapshot()) {
            let visible = |snapshot: &Snapshot, id: u64| id < snapshot.xmax && !snapshot.open.contains(&id);
            let expected = (0..16).all(|id| !visible(&b, id) || visible(&a, id));
            prop_assert_eq!(a.contains(&b), expected);
        }
    }
}
