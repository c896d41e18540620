//! Filters of existing keys, in the process: they answer "there is no such row" without a question to the database.
//!
//! A filter is a memory like the in-process tier, and lives by its numbers: it is registered at some batch, before the keys
//! are read from the database, and from then on takes the keys of every batch and of every write of this process, while it
//! is built and after. So once it is built it has every key that there was in the state of the database that the tier has
//! caught up with; what it lacks was not there then. Keys of deleted rows stay, and so do a few that it only seems to
//! have: those are asked for. A batch that is missing or says "anything", another life of the node, another generation of
//! the resource: the filter goes. A lost connection only silences it until it was told of all that it missed.
//!
//! The bits are a split block Bloom filter: eight bits for a key, all in one cache line (Putze, Sanders and Singler,
//! "Cache-, Hash- and Space-Efficient Bloom Filters", 2007; salts as in the specification of Apache Parquet).

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use xxhash_rust::xxh3::xxh3_64;

use crate::cache::lane::now_ms;

/// Bits for each key: about one absent key of two hundred seems to be there.
const BITS: u64 = 12;
/// Deleted keys stay, and a change that nobody captured is not known: built anew after so long.
const OLD: Duration = Duration::from_hours(1);
/// Bytes of a block.
const BLOCK: u64 = 32;
/// The first filter is made for so many keys.
const FIRST: u64 = 1 << 14;
const SALTS: [u32; 8] =
    [0x47b6_137b, 0x4497_4d91, 0x8824_ad5b, 0xa2b7_289d, 0x7054_95c7, 0x2df1_424b, 0x9efc_4947, 0x5c6b_fb31];

type Block = [AtomicU32; 8];

/// The keys of one resource.
pub(super) struct Filter {
    /// What the resource's rows' cache keys start with.
    prefix: String,
    /// Shape, epoch and generation under which it was begun.
    tag: u64,
    blocks: Box<[Block]>,
    capacity: u64,
    keys: AtomicU64,
    began: u64,
}

impl Filter {
    pub(super) fn new(prefix: String, tag: u64, capacity: u64) -> Self {
        let blocks = (capacity * BITS).div_ceil(8 * BLOCK).max(1);
        let blocks = (0..blocks).map(|_| Block::default()).collect();
        Self { prefix, tag, blocks, capacity, keys: AtomicU64::new(0), began: now_ms() }
    }

    fn place(&self, key: &str) -> (&Block, u32) {
        let hash = xxh3_64(key.as_bytes());
        let (high, low) = (hash >> 32, hash & 0xffff_ffff);
        #[expect(clippy::cast_possible_truncation, reason = "below the number of blocks, and 32 bits")]
        let (index, low) = (((high * self.blocks.len() as u64) >> 32) as usize, low as u32);
        (&self.blocks[index], low)
    }

    pub(super) fn insert(&self, key: &str) {
        let (block, low) = self.place(key);
        let mut new = false;
        for (word, salt) in block.iter().zip(SALTS) {
            let bit = 1 << (low.wrapping_mul(salt) >> 27);
            new |= word.fetch_or(bit, Ordering::AcqRel) & bit == 0;
        }
        if new {
            self.keys.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn has(&self, key: &str) -> bool {
        let (block, low) = self.place(key);
        block
            .iter()
            .zip(SALTS)
            .all(|(word, salt)| word.load(Ordering::Acquire) >> (low.wrapping_mul(salt) >> 27) & 1 == 1)
    }

    /// It has more keys than it was made for.
    pub(super) fn is_full(&self) -> bool {
        self.keys.load(Ordering::Relaxed) > self.capacity
    }

    fn bytes(&self) -> u64 {
        size_of_val(&*self.blocks) as u64
    }
}

/// What a filter is like, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FilterState {
    /// Keys, about.
    pub keys: u64,
    /// Bytes.
    pub bytes: u64,
    /// It answers; but it is old or full, and should be built anew.
    pub is_old: bool,
}

/// The filter that answers, and the one that is to take its place.
#[derive(Default)]
struct Pair {
    ready: Option<Arc<Filter>>,
    coming: Option<Arc<Filter>>,
}

/// The filters of a process, by resource. Whoever changes which there are holds the tier's lock.
#[derive(Default)]
pub(super) struct Filters(RwLock<HashMap<String, Pair>>);

impl Filters {
    /// From now on it takes all keys that are told.
    pub(super) fn register(&self, resource: &str, filter: Arc<Filter>) {
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        all.entry(resource.to_owned()).or_default().coming = Some(filter);
    }

    /// It has all keys; false: it went meanwhile.
    pub(super) fn complete(&self, resource: &str, filter: &Arc<Filter>) -> bool {
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let Some(pair) = all.get_mut(resource) else { return false };
        let coming = pair.coming.take_if(|coming| Arc::ptr_eq(coming, filter));
        let is_there = coming.is_some();
        pair.ready = coming.or(pair.ready.take());
        is_there
    }

    /// It will not be built.
    pub(super) fn give_up(&self, resource: &str, filter: &Arc<Filter>) {
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(pair) = all.get_mut(resource) {
            pair.coming.take_if(|coming| Arc::ptr_eq(coming, filter));
        }
    }

    /// These rows may be there now.
    pub(super) fn insert<K: AsRef<str>>(&self, keys: &[K]) {
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        for filter in all.values().flat_map(|pair| pair.ready.iter().chain(&pair.coming)) {
            for key in keys.iter().map(AsRef::as_ref).filter(|key| key.starts_with(&filter.prefix)) {
                filter.insert(key);
            }
        }
    }

    /// What the filters of a resource take together.
    #[cfg(test)]
    fn bytes(&self, resource: &str) -> u64 {
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        all.get(resource).into_iter().flat_map(|pair| pair.ready.iter().chain(&pair.coming)).map(|it| it.bytes()).sum()
    }

    /// Any row may be there now.
    pub(super) fn clear(&self) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Whether there was no such row, in the state that the tier has caught up with.
    pub(super) fn lacks(&self, resource: &str, tag: u64, key: &str) -> bool {
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let ready = all.get(resource).and_then(|pair| pair.ready.as_ref());
        ready.is_some_and(|filter| filter.tag == tag && !filter.has(key))
    }

    /// The filter that answers for this tag.
    pub(super) fn state(&self, resource: &str, tag: u64) -> Option<FilterState> {
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let filter = all.get(resource)?.ready.as_ref().filter(|filter| filter.tag == tag)?;
        let age = Duration::from_millis(now_ms().saturating_sub(filter.began));
        Some(FilterState {
            keys: filter.keys.load(Ordering::Relaxed),
            bytes: filter.bytes(),
            is_old: filter.is_full() || age > OLD,
        })
    }
}

/// For how many keys the filters of a resource are made: never for more than fit twice into what they may take together,
/// since the former one answers while its successor is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    next: u64,
    most: u64,
}

impl Sizes {
    /// Both together take at most so many bytes.
    #[must_use]
    pub fn within(bytes: u64) -> Self {
        // Whole blocks, and what fits into them.
        let most = (bytes / 2 / BLOCK).saturating_mul(8 * BLOCK) / BITS;
        Self { next: FIRST.min(most), most }
    }

    /// For how many keys the next filter is made; `None`: there is not even room for the smallest.
    #[must_use]
    pub fn next(self) -> Option<u64> {
        (self.next > 0).then_some(self.next)
    }

    /// There were more keys than that: the next one is for four times as many, or as many as fit; false: so was this one.
    #[must_use]
    pub fn grow(&mut self) -> bool {
        let before = self.next;
        self.next = before.saturating_mul(4).min(self.most);
        self.next > before
    }

    /// There were so many keys: the next one leaves them room to become more, as far as there is any.
    pub fn leave_room(&mut self, keys: u64) {
        self.next = self.next.max(keys.saturating_add(keys / 4)).min(self.most);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::{BLOCK, Filter, Filters, Sizes};

    proptest! {
        #[test]
        fn a_filter_and_its_successor_never_take_more_than_they_may(
            bytes in 0_u64..200_000, keys in proptest::collection::vec(0_u64..200_000, 1..6)
        ) {
            let filters = Filters::default();
            let mut sizes = Sizes::within(bytes);
            for keys in keys {
                // As they are built: for more and more, until all keys fit; then it answers until the next one does.
                let built = loop {
                    let Some(capacity) = sizes.next() else { break None };
                    let filter = Arc::new(Filter::new("item:".into(), 1, capacity));
                    filters.register("item", Arc::clone(&filter));
                    prop_assert!(filters.bytes("item") <= bytes, "{} of {bytes}", filters.bytes("item"));
                    if keys <= capacity {
                        break Some(filter);
                    }
                    filters.give_up("item", &filter);
                    if !sizes.grow() {
                        break None;
                    }
                };
                // What is left out would not have fit: one block more, and there were too many of them.
                let fits = keys.max(1) * 12 <= bytes / 2 / BLOCK * BLOCK * 8;
                prop_assert_eq!(built.is_some(), fits, "{} keys in {}", keys, bytes);
                if let Some(built) = built {
                    prop_assert!(filters.complete("item", &built));
                    sizes.leave_room(keys);
                }
            }
        }
    }

    #[test]
    fn what_was_inserted_is_there_and_little_else() {
        let filter = Filter::new("item:".into(), 1, 100_000);
        for id in 0..100_000 {
            filter.insert(&format!("item:{id}"));
        }
        assert!((0..100_000).all(|id| filter.has(&format!("item:{id}"))));
        let seem = (100_000..200_000).filter(|id| filter.has(&format!("item:{id}"))).count();
        assert!(seem < 1_500, "{seem}");
        assert!(!filter.is_full(), "a key that is inserted twice or seems to be there counts once");
        assert_eq!(filter.bytes(), 150_016);
    }

    #[test]
    fn a_filter_answers_once_it_is_complete_and_only_for_its_tag() {
        let filters = Filters::default();
        let filter = Arc::new(Filter::new("item:".into(), 7, 100));
        filters.register("item", Arc::clone(&filter));
        assert!(!filters.lacks("item", 7, "item:1"), "not before it has all keys");
        filters.insert(&["item:1", "other:2"]);
        assert!(filters.complete("item", &filter));
        assert!(!filters.lacks("item", 7, "item:1") && filters.lacks("item", 7, "item:2"));
        assert!(!filters.lacks("item", 8, "item:2"), "another generation");
        filters.insert(&["item:2"]);
        assert!(!filters.lacks("item", 7, "item:2"));
        let next = Arc::new(Filter::new("item:".into(), 7, 100));
        filters.register("item", Arc::clone(&next));
        filters.insert(&["item:3"]);
        assert!(!filters.lacks("item", 7, "item:3") && filters.lacks("item", 7, "item:4"), "the former one answers on");
        filters.clear();
        assert!(!filters.lacks("item", 7, "item:4") && !filters.complete("item", &next), "it missed something");
    }
}
