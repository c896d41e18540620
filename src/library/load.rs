//! What loaders may give back.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, Hash};

/// What a loader found: the values of the ids that it was given. What it leaves out does not exist.
///
/// A map from ids to values, pairs of both, or one `Option` per id in the ids' order.
pub trait Found<K, V> {
    /// One `Option` per id, in their order.
    fn in_order(self, ids: &[K]) -> Vec<Option<V>>;
}

impl<K, V> Found<K, V> for Vec<Option<V>> {
    fn in_order(self, _: &[K]) -> Vec<Option<V>> {
        self
    }
}

impl<K: Eq + Hash, V, S: BuildHasher> Found<K, V> for HashMap<K, V, S> {
    fn in_order(mut self, ids: &[K]) -> Vec<Option<V>> {
        ids.iter().map(|id| self.remove(id)).collect()
    }
}

impl<K: Ord, V> Found<K, V> for BTreeMap<K, V> {
    fn in_order(mut self, ids: &[K]) -> Vec<Option<V>> {
        ids.iter().map(|id| self.remove(id)).collect()
    }
}

impl<K: Eq + Hash, V> Found<K, V> for Vec<(K, V)> {
    fn in_order(self, ids: &[K]) -> Vec<Option<V>> {
        self.into_iter().collect::<HashMap<K, V>>().in_order(ids)
    }
}
