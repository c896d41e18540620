//! The hash slots of a cluster: which of them a node holds, and which it has held before.
//!
//! Keys move between nodes with their slots, and they carry their past with them: an entry that leaves a node is not told
//! what changes until it comes back. A node's epoch is in the tag of each of its entries, so one that moved to another node
//! is good for nothing there. Only where a slot comes back to a node that has held it under the same epoch, or keys do
//! that left ahead of a slot that never followed them, could an old entry count again: then the node begins anew.

use std::fmt;

/// How many there are.
pub(super) const COUNT: u16 = 16_384;

/// Some of the hash slots.
#[derive(Clone, PartialEq, Eq)]
pub struct Slots(Box<[u64; COUNT as usize / 64]>);

impl Default for Slots {
    fn default() -> Self {
        Self(Box::new([0; COUNT as usize / 64]))
    }
}

impl Slots {
    /// Adds all slots from the first to the last.
    pub(super) fn add(&mut self, first: u16, last: u16) {
        for slot in first..=last.min(COUNT - 1) {
            self.0[usize::from(slot / 64)] |= 1 << (slot % 64);
        }
    }

    /// Whether this slot is among them.
    #[must_use]
    pub fn contains(&self, slot: u16) -> bool {
        slot < COUNT && self.0[usize::from(slot / 64)] & (1 << (slot % 64)) != 0
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    fn combined(&self, other: &Self, combine: impl Fn(u64, u64) -> u64) -> Self {
        let mut combined = self.clone();
        combined.0.iter_mut().zip(other.0.iter()).for_each(|(word, other)| *word = combine(*word, *other));
        combined
    }

    /// Every slot.
    pub(super) fn iter(&self) -> impl Iterator<Item = u16> {
        (0..COUNT).filter(|slot| self.contains(*slot))
    }

    /// Reads `0-5460,6000`, as [`Display`](fmt::Display) writes it. `None`: it is something else.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut slots = Self::default();
        for range in text.split(',').filter(|range| !range.is_empty()) {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            slots.add(first.parse().ok()?, last.parse().ok()?);
        }
        Some(slots)
    }
}

/// What the node of a cluster has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Holdings {
    /// Its slots.
    pub owned: Slots,
    /// Those of them that are about to leave: their keys may be here or there.
    pub leaving: Slots,
}

impl Holdings {
    /// Those of the node that answered `CLUSTER NODES`. `None`: it said something else.
    pub(super) fn read(nodes: &str) -> Option<Self> {
        let mut holdings = Self::default();
        for word in nodes
            .lines()
            .find(|line| line.split(' ').nth(2).is_some_and(|flags| flags.split(',').any(|flag| flag == "myself")))?
            .split_whitespace()
            .skip(8)
        {
            if let Some(moving) = word.strip_prefix('[') {
                // [93->-id]: leaving; [77-<-id]: expected.
                if let Some((slot, _)) = moving.split_once("->-") {
                    let slot = slot.parse().ok()?;
                    holdings.leaving.add(slot, slot);
                }
                continue;
            }
            let (first, last) = word.split_once('-').unwrap_or((word, word));
            holdings.owned.add(first.parse().ok()?, last.parse().ok()?);
        }
        Some(holdings)
    }
}

impl fmt::Display for Slots {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut slots = self.iter().peekable();
        let mut between = "";
        while let Some(first) = slots.next() {
            let mut last = first;
            while let Some(next) = slots.next_if(|next| *next == last + 1) {
                last = next;
            }
            write!(out, "{between}{first}")?;
            if last > first {
                write!(out, "-{last}")?;
            }
            between = ",";
        }
        Ok(())
    }
}

impl fmt::Debug for Slots {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "Slots({self})")
    }
}

/// What a node's control key says of its slots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tenure {
    /// Those whose entries count.
    pub held: Slots,
    /// Those whose keys have left under its epoch, or may have.
    pub lost: Slots,
}

impl Tenure {
    /// What is to be said of a node that begins anew.
    pub(super) fn fresh(now: &Holdings) -> Self {
        Self { held: now.owned.clone(), lost: now.leaving.clone() }
    }

    /// What is to be said now; `None`: it must begin anew.
    pub(super) fn next(before: Option<&Self>, now: &Holdings) -> Option<Self> {
        let before = before?;
        let staying = now.owned.combined(&now.leaving, |owned, leaving| owned & !leaving);
        if !staying.combined(&before.lost, |staying, lost| staying & lost).is_empty() {
            return None;
        }
        let gone = before.held.combined(&now.owned, |held, owned| held & !owned);
        let lost = before.lost.combined(&gone, |lost, gone| lost | gone);
        Some(Self { held: now.owned.clone(), lost: lost.combined(&now.leaving, |lost, leaving| lost | leaving) })
    }
}

/// The slot of a key, as the cluster specification has it: of what stands between the first braces, if anything does.
pub(super) fn slot(key: &str) -> u16 {
    let hashed = key.split_once('{').and_then(|(_, rest)| rest.split_once('}')).map(|(tag, _)| tag);
    let hashed = hashed.filter(|tag| !tag.is_empty()).unwrap_or(key);
    crc16::State::<crc16::XMODEM>::calculate(hashed.as_bytes()) % COUNT
}

/// The slot whose hash tag names a node's own keys. All who know which slots it holds agree on it, and it seldom changes
/// when slots come and go.
pub(super) fn elect(slots: &Slots) -> Option<u16> {
    slots.iter().max_by_key(|slot| xxhash_rust::xxh3::xxh3_64(&slot.to_le_bytes()))
}

/// A short text with this slot.
pub(super) fn tag(wanted: u16) -> String {
    // Any text will do; each hits with a chance of 1 in 16,384, so this takes a fraction of a millisecond.
    (0..u64::MAX).map(|number| format!("{number:x}")).find(|text| slot(text) == wanted).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::{COUNT, Holdings, Slots, Tenure, elect, slot, tag};

    fn some(text: &str) -> Slots {
        Slots::parse(text).unwrap()
    }

    #[test]
    fn keys_have_the_slots_of_the_specification() {
        // From the cluster specification and its reference implementation.
        for (key, expected) in [("123456789", 0x31c3), ("foo", 12182), ("bar", 5061), ("{user1000}.following", 3443)] {
            assert_eq!(slot(key), expected, "{key}");
        }
        assert_eq!(slot("{user1000}.following"), slot("{user1000}.followers"));
        assert_eq!(slot("foo{}{bar}"), crc16::State::<crc16::XMODEM>::calculate(b"foo{}{bar}") % COUNT);
        assert_eq!(slot("foo{{bar}}zap"), slot("{bar"));
    }

    #[test]
    fn every_slot_has_a_tag() {
        for wanted in [0, 1, 5460, 12182, COUNT - 1] {
            assert_eq!(slot(&format!("x{{{}}}y", tag(wanted))), wanted);
        }
    }

    #[test]
    fn slots_are_spelled_and_read() {
        for text in ["", "0", "0-5460", "1,3-4,16383", "0-16383"] {
            assert_eq!(some(text).to_string(), text);
        }
        assert!(Slots::parse("x").is_none());
        let nodes = "aa 127.0.0.1:1@2 master - 0 0 1 connected 5461-10922\n\
                     bb 127.0.0.1:3@4 myself,master - 0 0 2 connected 0-5460 6000 [93->-cc] [77-<-dd]\n";
        assert_eq!(Holdings::read(nodes), Some(Holdings { owned: some("0-5460,6000"), leaving: some("93") }));
        let replica = "bb 127.0.0.1:3@4 myself,slave aa 0 0 2 connected";
        assert_eq!(Holdings::read(replica), Some(Holdings::default()));
        assert_eq!(Holdings::read(""), None);
    }

    #[test]
    fn most_changes_leave_the_elected_slot_alone() {
        let elected = elect(&some("0-5460")).unwrap();
        let moved = (0..1000).filter(|slot| *slot != elected).collect::<Vec<_>>();
        let mut fewer = Slots::default();
        some("0-5460").iter().filter(|slot| !moved.contains(slot)).for_each(|slot| fewer.add(slot, slot));
        assert_eq!(elect(&fewer), Some(elected));
        assert_eq!(elect(&Slots::default()), None);
    }

    #[test]
    fn only_keys_that_come_back_make_a_node_begin_anew() {
        let now = |owned: &str, leaving: &str| Holdings { owned: some(owned), leaving: some(leaving) };
        assert_eq!(Tenure::next(None, &now("0-9", "")), None, "nobody knows");
        let tenure = Tenure::fresh(&now("0-9", ""));
        let tenure = Tenure::next(Some(&tenure), &now("0-9", "9")).unwrap();
        assert_eq!((tenure.held.to_string(), tenure.lost.to_string()), ("0-9".into(), "9".into()));
        assert_eq!(Tenure::next(Some(&tenure), &now("0-9", "")), None, "its keys may have been away");
        let tenure = Tenure::next(Some(&tenure), &now("0-8,20", "")).unwrap();
        assert_eq!((tenure.held.to_string(), tenure.lost.to_string()), ("0-8,20".into(), "9".into()));
        let tenure = Tenure::next(Some(&tenure), &now("0-7,20-21", "")).unwrap();
        assert_eq!(tenure.lost.to_string(), "8-9", "without a word of leaving");
        assert_eq!(Tenure::next(Some(&tenure), &now("0-7,9,20-21", "")), None);
        assert_eq!(Tenure::fresh(&now("0-7,9", "3")).lost.to_string(), "3");
    }
}
