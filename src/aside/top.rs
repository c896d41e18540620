//! What stands out: entries that are read most, that are largest, and whose fills are refused most often.
//!
//! It sits on the way of every hit, so one read in [`SAMPLE`] is counted, under a lock that nobody waits for; the others pay
//! one random number. Which keys are hot is published a few times a second as a short list of fingerprints, so that a read
//! asks it without a lock. Keys are data: they go to [`Aside::top`] and nowhere else, neither to metrics nor to the log.
//!
//! All of it is bounded: two sketches of 256 keys and [`BIGGEST`] large entries, half a megabyte with the longest keys.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use super::sketch::{LONGEST_KEY, Sketch};
use super::{Aside, Core};
use crate::cache::{AnyCache, Place};
use crate::catalog::Target;
use crate::store::Load;

/// One read in so many is counted; a power of two.
const SAMPLE: u8 = 16;
/// A read counts half after this time: a key of 20,000 reads a second is no longer hot 40 seconds after the last.
const HALF_LIFE: Duration = Duration::from_secs(5);
/// The same for refused fills, which are rare.
const REFUSED_HALF_LIFE: Duration = Duration::from_mins(5);
/// So many reads a second in this process make a key hot. Below that the shared tier's share of a core is under a hundredth,
/// and the estimate, of some 45 samples, would be a guess.
const HOT: f64 = 100.0;
/// Between two lists of what is hot, and for how long one is good.
const PUBLISH: Duration = Duration::from_millis(250);
const GOOD: Duration = Duration::from_secs(2);
/// What is hot at others when this process begins is taken to be hot here for so long: by then it is known.
#[cfg(feature = "server")]
const EXPECTED: Duration = Duration::from_secs(5);
/// How many large entries are remembered, and for how long.
const BIGGEST: usize = 64;
const REMEMBERED: Duration = Duration::from_hours(1);

/// What one process has seen.
#[derive(Debug)]
pub(super) struct Top {
    reads: Mutex<Reads>,
    hot: ArcSwap<Hot>,
    refused: Mutex<Sketch>,
    big: Mutex<Vec<Big>>,
}

#[derive(Debug)]
struct Reads {
    sketch: Sketch,
    published: Instant,
    /// What is hot whatever was counted, for a while.
    expected: Hot,
}

/// Fingerprints of the keys that are hot.
#[derive(Clone, Debug)]
struct Hot {
    hashes: Vec<u64>,
    until: Instant,
}

#[derive(Clone, Debug)]
struct Big {
    key: String,
    resource: Arc<str>,
    size: usize,
    seen: Instant,
}

/// The entries of one replica that stand out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Standing {
    /// Read most often lately, the most first.
    pub hot: Vec<Outstanding>,
    /// Largest when they were loaded within the last hour, the largest first.
    pub big: Vec<Outstanding>,
    /// Whose fills were refused most often lately, the most first.
    pub refused: Vec<Outstanding>,
}

/// An entry that stands out.
#[derive(Clone, Debug, PartialEq)]
pub struct Outstanding {
    /// The cache key.
    pub key: String,
    /// The resource it belongs to.
    pub resource: Arc<str>,
    /// Reads per second, estimated over some seconds; 0 where it is not among those that are counted.
    pub reads_per_second: f64,
    /// The payload's bytes, where they are known.
    pub size: Option<usize>,
    /// Refused fills, each counted half after five minutes.
    pub refused: f64,
    /// It is held in this process.
    pub in_process: bool,
}

impl Default for Top {
    fn default() -> Self {
        let now = Instant::now();
        let nothing = Hot { hashes: Vec::new(), until: now };
        let sketch = Sketch::new(HALF_LIFE, now);
        Self {
            reads: Mutex::new(Reads { sketch, published: now, expected: nothing.clone() }),
            hot: ArcSwap::from_pointee(nothing),
            refused: Mutex::new(Sketch::new(REFUSED_HALF_LIFE, now)),
            big: Mutex::default(),
        }
    }
}

impl Top {
    /// Counts a read, perhaps; `size` is that of its payload.
    pub(super) fn read(&self, target: &Target, size: Option<usize>, now: Instant) {
        if fastrand::u8(..).is_multiple_of(SAMPLE) {
            self.sampled(target, size, now);
        }
    }

    fn sampled(&self, target: &Target, size: Option<usize>, now: Instant) {
        let mut reads = match self.reads.try_lock() {
            Ok(reads) => reads,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // Another read is being counted: this one is not worth waiting.
            Err(TryLockError::WouldBlock) => return,
        };
        reads.sketch.count(target.entry(), &target.resource().name, size, now);
        if now.saturating_duration_since(reads.published) >= PUBLISH {
            reads.published = now;
            let hot = reads.sketch.frequent(now).filter(|one| per_second(one.count) >= HOT);
            let mut hashes: Vec<u64> = hot.map(|one| one.hash).collect();
            if now < reads.expected.until {
                hashes.extend(&reads.expected.hashes);
            }
            if !hashes.is_empty() || !self.hot.load().hashes.is_empty() {
                self.hot.store(Arc::new(Hot { hashes, until: now + GOOD }));
            }
        }
    }

    /// Takes entries to be hot for a while.
    #[cfg(feature = "server")]
    pub(super) fn expect<'a>(&self, keys: impl Iterator<Item = &'a str>, now: Instant) {
        let expected = Hot { hashes: keys.map(crate::cache::entry::check).collect(), until: now + EXPECTED };
        let mut reads = own(&self.reads);
        reads.expected = expected.clone();
        self.hot.store(Arc::new(expected));
    }

    /// Whether an entry is read so often that it is worth being held in this process.
    fn is_hot(&self, key: &str, now: Instant) -> bool {
        let hot = self.hot.load();
        !hot.hashes.is_empty() && now < hot.until && hot.hashes.contains(&crate::cache::entry::check(key))
    }

    /// Notes how large an entry was when it was loaded.
    pub(super) fn loaded(&self, target: &Target, size: usize, now: Instant) {
        let mut big = own(&self.big);
        if let Some(known) = big.iter_mut().find(|known| known.key == target.entry()) {
            (known.size, known.seen) = (size, now);
            return;
        }
        if size == 0 || target.entry().len() > LONGEST_KEY {
            return;
        }
        if big.len() == BIGGEST {
            big.retain(|known| now.saturating_duration_since(known.seen) < REMEMBERED);
        }
        let found =
            || Big { key: target.entry().to_owned(), resource: Arc::clone(&target.resource().name), size, seen: now };
        if big.len() < BIGGEST {
            big.push(found());
        } else if let Some(least) = big.iter_mut().min_by_key(|known| known.size)
            && least.size < size
        {
            *least = found();
        }
    }

    /// Counts a fill that was refused.
    pub(super) fn refused(&self, target: &Target, now: Instant) {
        own(&self.refused).count(target.entry(), &target.resource().name, None, now);
    }

    /// Up to `limit` of each kind.
    fn standing(&self, limit: usize, now: Instant) -> Standing {
        // Copied, so that no read finds the lock taken for longer than that.
        let row =
            |one: super::sketch::Frequent<'_>| (one.key.to_owned(), Arc::clone(one.resource), one.count, one.size);
        let reads: Vec<_> = own(&self.reads).sketch.frequent(now).map(row).collect();
        let refused: Vec<_> = own(&self.refused).frequent(now).map(row).collect();
        let big: Vec<Big> = own(&self.big).clone();
        let whole = |key: &str, resource: &Arc<str>| {
            let read = reads.iter().find(|(other, ..)| other == key);
            let largest = big.iter().find(|known| known.key == key);
            Outstanding {
                key: key.to_owned(),
                resource: Arc::clone(resource),
                reads_per_second: read.map_or(0.0, |(_, _, count, _)| per_second(*count)),
                size: largest.map(|known| known.size).or_else(|| read.and_then(|(.., size)| *size)),
                refused: refused.iter().find(|(other, ..)| other == key).map_or(0.0, |(_, _, count, _)| *count),
                in_process: false,
            }
        };
        let all = |rows: &[(String, Arc<str>, f64, Option<usize>)]| {
            rows.iter().map(|(key, resource, ..)| whole(key, resource)).collect::<Vec<_>>()
        };
        let lately = big.iter().filter(|known| now.saturating_duration_since(known.seen) < REMEMBERED);
        let big = lately.map(|known| whole(&known.key, &known.resource)).collect();
        let first = |mut rows: Vec<Outstanding>, by: fn(&Outstanding) -> f64| {
            rows.sort_by(|one, other| by(other).total_cmp(&by(one)));
            // What would be told as nothing.
            rows.retain(|row| by(row) >= 0.05);
            rows.truncate(limit);
            rows
        };
        #[expect(clippy::cast_precision_loss, reason = "sizes are compared, and far below 2^53")]
        let size = |row: &Outstanding| row.size.unwrap_or(0) as f64;
        Standing {
            hot: first(all(&reads), |row| row.reads_per_second),
            big: first(big, size),
            refused: first(all(&refused), |row| row.refused),
        }
    }
}

fn own<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The rate of a steady stream whose decayed count is this.
fn per_second(count: f64) -> f64 {
    count * f64::from(SAMPLE) * std::f64::consts::LN_2 / HALF_LIFE.as_secs_f64()
}

impl<C, S> Core<C, S> {
    /// Where a target's entry is kept: in this process too, for a moment, where it is hot and that is wanted.
    pub(super) fn place<'a>(&self, target: &'a Target, now: Instant) -> Place<'a> {
        let mut place = target.place();
        let policy = target.policy();
        if place.local_ttl.is_zero() && !policy.local_hot_ttl.is_zero() && self.top.is_hot(place.key, now) {
            place.local_ttl = policy.local_hot_ttl;
        }
        place
    }
}

impl<S: Load + 'static> Aside<AnyCache, S> {
    /// The entries that stand out in this process, up to `limit` of each kind.
    #[must_use]
    pub fn top(&self, limit: usize) -> Standing {
        let mut standing = self.core.top.standing(limit, Instant::now());
        let lists = [&mut standing.hot, &mut standing.big, &mut standing.refused];
        for row in lists.into_iter().flatten() {
            row.in_process = self.cache.in_process(&row.key);
        }
        standing
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::{Key, Policy, Resource};
    use crate::config::Defaults;

    fn target(name: &str, key: &str) -> Target {
        let policy = Policy::new(&Defaults::default());
        let resource = Arc::new(Resource::loaded(name, policy, "", 1));
        resource.row_of(Key::from_database(vec![key.to_owned()]))
    }

    fn keys(rows: &[Outstanding]) -> Vec<&str> {
        rows.iter().map(|row| row.key.as_str()).collect()
    }

    #[test]
    fn what_is_read_often_is_hot_for_as_long_as_it_is() {
        let (top, began) = (Top::default(), Instant::now());
        let (hot, cold) = (target("item", "hot"), target("item", "cold"));
        let at = |millis: u64| began + Duration::from_millis(millis);
        // 200 reads a second of one and 40 of the other, of which one in sixteen is counted: for ten seconds.
        for sample in 0..125_u64 {
            top.sampled(&hot, Some(100), at(sample * 80));
            if sample.is_multiple_of(5) {
                top.sampled(&cold, None, at(sample * 80));
            }
        }
        assert!(top.is_hot("item:hot", at(10_000)) && !top.is_hot("item:cold", at(10_000)));
        let rows = top.standing(20, at(10_000)).hot;
        assert_eq!(keys(&rows), ["item:hot", "item:cold"]);
        assert!((100.0..200.0).contains(&rows[0].reads_per_second), "{rows:?}");
        assert_eq!((rows[0].size, rows[1].size), (Some(100), None));
        // Nobody reads any more: what was said is no longer good.
        assert!(!top.is_hot("item:hot", at(13_000)));
        // Somebody does, now and then.
        for sample in 0..40_u64 {
            top.sampled(&hot, Some(100), at(13_000 + sample * 1000));
        }
        assert!(!top.is_hot("item:hot", at(52_500)));
        assert_eq!(keys(&top.standing(1, at(53_000)).hot), ["item:hot"]);
    }

    #[test]
    fn a_share_of_the_reads_is_counted() {
        let (top, now) = (Top::default(), Instant::now());
        let target = target("item", "1");
        (0..20_000).for_each(|_| top.read(&target, None, now));
        let rate = top.standing(1, now).hot[0].reads_per_second;
        let counted = rate / per_second(1.0) * f64::from(SAMPLE);
        assert!((18_000.0..22_000.0).contains(&counted), "{counted}");
    }

    #[test]
    fn the_largest_are_remembered_for_an_hour() {
        let (top, now) = (Top::default(), Instant::now());
        for size in 1..=1000_usize {
            top.loaded(&target("item", &size.to_string()), size, now);
        }
        // It has shrunk since.
        top.loaded(&target("item", "1000"), 10, now);
        assert_eq!(keys(&top.standing(2, now).big), ["item:999", "item:998"]);
        assert_eq!(top.standing(1000, now).big.len(), BIGGEST);
        let later = now + REMEMBERED;
        assert_eq!(top.standing(2, later).big, []);
        top.loaded(&target("item", "1"), 1, later);
        assert_eq!(keys(&top.standing(2, later).big), ["item:1"]);
        assert_eq!(own(&top.big).len(), 1);
    }

    #[test]
    fn refused_fills_are_counted_by_key() {
        let (top, now) = (Top::default(), Instant::now());
        for key in ["a", "b", "b"] {
            top.refused(&target("item", key), now);
        }
        let rows = top.standing(20, now).refused;
        assert_eq!(keys(&rows), ["item:b", "item:a"]);
        assert_eq!((rows[0].refused, rows[0].reads_per_second), (2.0, 0.0));
    }
}
