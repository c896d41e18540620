//! Which of very many keys come most often lately, in fixed memory: Space-Saving over counts that decay.
//!
//! Space-Saving (Metwally, Agrawal, El Abbadi: *Efficient Computation of Frequent and Top-k Elements in Data Streams*, 2005)
//! keeps a fixed number of counters. A key without one takes over the smallest, count included, and remembers how much of it
//! was never its own. So a count is never too low, what is left without the inherited part is never too high, and each key
//! that makes up more than one in [`SLOTS`] of what is counted has a counter.
//!
//! Counts decay forwards (Cormode, Shkapenyuk, Srivastava, Xu: *Forward Decay*, 2009): each arrival weighs twice that of one
//! half-life before, and sums are divided by the weight of now when they are read. Nothing is swept, and what the algorithm
//! compares stays in proportion.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::cache::entry;

/// Counters of one sketch.
pub(super) const SLOTS: usize = 256;
/// Longer keys are not counted, in bytes: with it the largest sketch is a third of a megabyte.
pub(super) const LONGEST_KEY: usize = 512;
/// After so many half-lives weights begin at one again, long before they lose their precision.
const RESCALE: f64 = 64.0;

/// Counters for the keys that come most often.
#[derive(Debug)]
pub(super) struct Sketch {
    half_life: Duration,
    /// When an arrival weighs one.
    began: Instant,
    /// What is searched at every arrival, apart from the rest.
    hashes: Vec<u64>,
    counts: Vec<f64>,
    slots: Vec<Slot>,
}

#[derive(Debug)]
struct Slot {
    key: String,
    resource: Arc<str>,
    /// How much of its count is from keys that had it before.
    inherited: f64,
    size: Option<usize>,
}

/// A key that comes often.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Frequent<'a> {
    pub(super) key: &'a str,
    pub(super) hash: u64,
    pub(super) resource: &'a Arc<str>,
    /// Arrivals, each worth half after a half-life; never more than there were.
    pub(super) count: f64,
    /// The payload's bytes when it was last seen with them.
    pub(super) size: Option<usize>,
}

impl Sketch {
    /// An empty one, in which an arrival is worth half after `half_life`.
    pub(super) fn new(half_life: Duration, now: Instant) -> Self {
        Self { half_life, began: now, hashes: Vec::new(), counts: Vec::new(), slots: Vec::new() }
    }

    /// Counts one arrival. Allocates while it grows, and where a key takes over a counter whose key was shorter.
    pub(super) fn count(&mut self, key: &str, resource: &Arc<str>, size: Option<usize>, now: Instant) {
        if key.len() > LONGEST_KEY {
            return;
        }
        let hash = entry::check(key);
        let weight = self.weight(now);
        if let Some(at) = self.hashes.iter().position(|other| *other == hash) {
            self.counts[at] += weight;
            self.slots[at].size = size.or(self.slots[at].size);
        } else if self.hashes.len() < SLOTS {
            self.hashes.push(hash);
            self.counts.push(weight);
            self.slots.push(Slot { key: key.to_owned(), resource: Arc::clone(resource), inherited: 0.0, size });
        } else {
            let (mut at, mut least) = (0, f64::INFINITY);
            for (index, count) in self.counts.iter().enumerate() {
                if *count < least {
                    (at, least) = (index, *count);
                }
            }
            self.hashes[at] = hash;
            self.counts[at] += weight;
            let slot = &mut self.slots[at];
            slot.key.clear();
            slot.key.push_str(key);
            (slot.resource, slot.inherited, slot.size) = (Arc::clone(resource), least, size);
        }
    }

    /// All keys that have a counter, in no order.
    pub(super) fn frequent(&mut self, now: Instant) -> impl Iterator<Item = Frequent<'_>> {
        let weight = self.weight(now);
        let all = self.hashes.iter().zip(&self.counts).zip(&self.slots);
        all.map(move |((hash, count), slot)| Frequent {
            key: &slot.key,
            hash: *hash,
            resource: &slot.resource,
            count: (count - slot.inherited) / weight,
            size: slot.size,
        })
    }

    /// What an arrival weighs now.
    fn weight(&mut self, now: Instant) -> f64 {
        let passed = now.saturating_duration_since(self.began).as_secs_f64() / self.half_life.as_secs_f64();
        if passed < RESCALE {
            return passed.exp2();
        }
        let weight = passed.exp2();
        for (count, slot) in self.counts.iter_mut().zip(&mut self.slots) {
            *count /= weight;
            slot.inherited /= weight;
        }
        self.began = now;
        1.0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const HALF_LIFE: Duration = Duration::from_secs(5);

    fn counted(keys: impl Iterator<Item = (String, Instant)>, now: Instant) -> Sketch {
        let resource = Arc::from("item");
        let mut sketch = Sketch::new(HALF_LIFE, now);
        for (key, at) in keys {
            sketch.count(&key, &resource, Some(key.len()), at);
        }
        sketch
    }

    fn of<'a>(all: &'a [Frequent<'a>], key: &str) -> Option<&'a Frequent<'a>> {
        all.iter().find(|one| one.key == key)
    }

    /// Keys by Zipf's law: the nth comes with a probability in proportion to 1/n.
    fn zipf(keys: u32, draws: u32, seed: u64) -> Vec<String> {
        let mut sums = Vec::new();
        let mut sum = 0.0;
        for rank in 1..=keys {
            sum += 1.0 / f64::from(rank);
            sums.push(sum);
        }
        let mut random = fastrand::Rng::with_seed(seed);
        let mut draw = || random.f64() * sum;
        let keys = (0..draws).map(|_| draw()).map(|drawn| sums.partition_point(|below| *below < drawn));
        keys.map(|rank| format!("item:{rank}")).collect()
    }

    #[test]
    fn the_most_frequent_of_a_zipf_stream_are_found_and_counted() {
        let now = Instant::now();
        let stream = zipf(50_000, 400_000, 11);
        let mut exact: HashMap<&str, f64> = HashMap::new();
        for key in &stream {
            *exact.entry(key).or_default() += 1.0;
        }
        let mut sketch = counted(stream.iter().map(|key| (key.clone(), now)), now);
        let mut found: Vec<Frequent<'_>> = sketch.frequent(now).collect();
        found.sort_by(|one, other| other.count.total_cmp(&one.count));
        let mut ranked: Vec<(&str, f64)> = exact.iter().map(|(key, count)| (*key, *count)).collect();
        ranked.sort_by(|one, other| other.1.total_cmp(&one.1));
        for (key, count) in &ranked[..20] {
            let found = of(&found[..24], key).unwrap_or_else(|| panic!("{key} is not among the first"));
            assert!((count - found.count) / count < 0.05, "{key}: {} of {count}", found.count);
        }
        // What makes up more than one in SLOTS has a counter, and none says more than there was.
        let share = f64::from(400_000) / 256.0;
        for (key, _) in ranked.iter().filter(|(_, count)| *count > share) {
            assert!(of(&found, key).is_some(), "{key}");
        }
        assert!(found.iter().all(|one| one.count <= exact[one.key]));
    }

    #[test]
    fn what_is_no_longer_read_is_forgotten() {
        let began = Instant::now();
        let at = |millis: u64| began + Duration::from_millis(millis);
        let old = (0..10_000).map(|n| ("item:old".to_owned(), at(n)));
        let new = (0..10_000).map(|n| ("item:new".to_owned(), at(60_000 + n)));
        let mut sketch = counted(old.chain(new), began);
        let found: Vec<Frequent<'_>> = sketch.frequent(at(70_000)).collect();
        let (old, new) = (of(&found, "item:old").map_or(0.0, |one| one.count), of(&found, "item:new").unwrap().count);
        assert!(old * 1000.0 < new, "{old} {new}");
        // A thousand a second for two half-lives: three quarters of what it is for ever.
        let steady = 1000.0 * HALF_LIFE.as_secs_f64() / std::f64::consts::LN_2;
        assert!((0.74..0.76).contains(&(new / steady)), "{}", new / steady);
    }

    #[test]
    fn a_year_later_it_still_counts() {
        let began = Instant::now();
        let year = began + Duration::from_hours(365 * 24);
        let mut sketch = counted([("item:1".to_owned(), began), ("item:2".to_owned(), year)].into_iter(), began);
        let found: Vec<Frequent<'_>> = sketch.frequent(year).collect();
        assert_eq!(of(&found, "item:1").map(|one| one.count), Some(0.0));
        assert_eq!(of(&found, "item:2").map(|one| one.count), Some(1.0));
    }

    proptest! {
        #[test]
        fn whatever_comes_memory_and_counts_are_bounded(
            keys in proptest::collection::vec((0..600_u32, 0..700_usize, 0..100_000_u64), 0..3000)
        ) {
            let began = Instant::now();
            let mut exact: HashMap<String, f64> = HashMap::new();
            let stream = keys.iter().map(|(key, pad, at)| {
                let key = format!("item:{key:0>pad$}");
                *exact.entry(key.clone()).or_default() += 1.0;
                (key, began + Duration::from_millis(*at))
            });
            let mut sketch = counted(stream, began);
            prop_assert!(sketch.slots.len() <= SLOTS && sketch.hashes.len() == sketch.counts.len());
            prop_assert!(sketch.slots.iter().all(|slot| slot.key.capacity() <= 2 * LONGEST_KEY));
            let now = began + Duration::from_secs(100);
            for one in sketch.frequent(now) {
                prop_assert!(one.count >= 0.0 && one.count <= exact[one.key] + 1e-6, "{one:?}");
            }
        }
    }
}
