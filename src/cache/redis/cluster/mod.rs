//! Redis Cluster: as many memories as there are nodes that hold slots, each with its own control key, rounds and trust.
//!
//! An entry lives on the node of its slot and counts only there: every node has an epoch of its own, which is part of each
//! entry's tag. What many entries share (a group's generation) every node has a copy of. So a read asks one node, and no
//! script touches two slots. A client library's cluster connection is not used: it would send a lease again by itself.

mod topology;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use futures_util::future::{BoxFuture, join_all};

pub(super) use self::topology::Cluster;
use self::topology::{Member, Topology};
use super::{RedisCache, RedisNode};
use crate::cache::entry::Fence;
use crate::cache::{Cache, CacheError, Fill, Filled, Inspection, Lease, Lookup, Memory, Place, Ticket};
use crate::catalog::Mapping;
use crate::config;

/// A handle on a cluster, with lanes of its own in the runtime that uses it.
#[derive(Clone)]
pub struct ClusterCache {
    cluster: Arc<Cluster>,
    view: Arc<ArcSwap<View>>,
    /// Uses the members' own lanes.
    home: bool,
}

/// The members as one runtime sees them.
#[derive(Default)]
struct View {
    topology: Arc<Topology>,
    /// In the members' order.
    caches: Vec<RedisCache>,
}

impl std::fmt::Debug for ClusterCache {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("ClusterCache").field("health", &self.health()).finish_non_exhaustive()
    }
}

impl ClusterCache {
    /// Starts looking for the nodes that `config` names, and for those that they know; must be called inside a runtime.
    /// The rest is as for a single server.
    ///
    /// # Errors
    ///
    /// A URL or certificate that can't be used.
    pub fn new(config: &config::Cache, max_staleness: Option<Duration>, tiered: bool) -> anyhow::Result<Self> {
        let cluster = Cluster::open(config, max_staleness, tiered && max_staleness.is_some())?;
        Ok(Self::over(cluster, true))
    }

    fn over(cluster: Arc<Cluster>, home: bool) -> Self {
        let handle = Self { cluster, view: Arc::default(), home };
        tokio::spawn(Self::follow(Arc::downgrade(&handle.cluster), Arc::downgrade(&handle.view), home));
        handle
    }

    /// Opens lanes before anybody asks for them, and closes those that nobody will ask for.
    async fn follow(cluster: Weak<Cluster>, view: Weak<ArcSwap<View>>, home: bool) {
        let Some(mut turns) = cluster.upgrade().map(|cluster| cluster.turns()) else { return };
        turns.mark_changed();
        while turns.changed().await.is_ok() {
            let (Some(cluster), Some(view)) = (cluster.upgrade(), view.upgrade()) else { return };
            drop(Self { cluster, view, home }.view());
        }
    }

    /// A handle with lanes of its own in the runtime that uses it.
    #[must_use]
    pub fn attach(&self) -> Self {
        Self::over(Arc::clone(&self.cluster), false)
    }

    /// The members now. Lanes are opened for those that are new here.
    fn view(&self) -> Arc<View> {
        let (view, topology) = (self.view.load_full(), self.cluster.topology());
        if Arc::ptr_eq(&view.topology, &topology) {
            return view;
        }
        let known: HashMap<u64, &RedisCache> =
            view.topology.members.iter().map(|member| member.number).zip(&view.caches).collect();
        let open = |member: &Arc<Member>| match known.get(&member.number) {
            Some(cache) => (*cache).clone(),
            None if self.home => member.cache.clone(),
            None => member.cache.attach(),
        };
        let caches = topology.members.iter().map(open).collect();
        let view = Arc::new(View { topology, caches });
        self.view.store(Arc::clone(&view));
        view
    }

    /// The same; at the start there is time for one operation until anybody is known.
    async fn ready(&self) -> Arc<View> {
        let view = self.view();
        if !view.caches.is_empty() || *self.cluster.turns().borrow() > 0 {
            return view;
        }
        self.turned(self.cluster.timeout(), |cluster| *cluster.turns().borrow() > 0).await;
        self.view()
    }

    async fn turned(&self, patience: Duration, enough: impl Fn(&Cluster) -> bool) {
        let mut turns = self.cluster.turns();
        let waiting = async {
            while !enough(&self.cluster) {
                if turns.changed().await.is_err() {
                    break;
                }
            }
        };
        // Either way, what counts is how things are then.
        let _ = tokio::time::timeout(patience, waiting).await;
    }

    /// Resolves when the members may be others than when this was called.
    #[must_use]
    pub fn changed(&self) -> BoxFuture<'_, ()> {
        let before = self.cluster.topology();
        Box::pin(async move {
            self.turned(Duration::MAX, |cluster| !Arc::ptr_eq(&before, &cluster.topology())).await;
        })
    }

    /// What brings each of the memories up to date, by a number that is never used again.
    #[must_use]
    pub fn nodes(&self) -> Vec<(u64, RedisNode)> {
        let topology = self.cluster.topology();
        topology.members.iter().filter_map(|member| Some((member.number, member.cache.node()?))).collect()
    }

    /// Each of the memories.
    #[must_use]
    pub fn memories(&self) -> Vec<Memory> {
        self.view().caches.iter().map(RedisCache::memory).collect()
    }

    /// What each server says of itself, by its address, or why it says nothing.
    pub async fn infos(&self, patience: Duration) -> Vec<(String, Result<String, String>)> {
        self.turned(patience, |cluster| !cluster.topology().members.is_empty()).await;
        let view = self.view();
        let infos = join_all(view.caches.iter().map(|cache| cache.info(patience))).await;
        view.caches.iter().map(|cache| cache.address().to_owned()).zip(infos).collect()
    }

    /// Declares what is cached here and which changes concern it. Nothing is used before that is registered.
    pub fn declare(&self, mappings: HashMap<String, Mapping>) {
        self.cluster.declare(mappings);
    }

    /// Waits until some node is known, for `patience` at most.
    pub async fn connected(&self, patience: Duration) {
        self.turned(patience, |cluster| !cluster.topology().members.is_empty()).await;
        join_all(self.view().caches.iter().map(|cache| cache.connected(patience))).await;
    }

    /// Waits until every node is trusted, for `patience` at most.
    pub async fn settled(&self, patience: Duration) {
        self.turned(patience, |cluster| !cluster.topology().members.is_empty()).await;
        join_all(self.view().caches.iter().map(|cache| cache.settled(patience))).await;
    }

    /// Whether every node is connected and trusted.
    ///
    /// # Errors
    ///
    /// What one of them is not.
    pub fn health(&self) -> Result<(), CacheError> {
        let view = self.view();
        if view.caches.is_empty() {
            return Err(CacheError::Disconnected);
        }
        view.caches.iter().try_for_each(RedisCache::health)
    }

    /// Whether invalidations that failed wait for delivery.
    #[must_use]
    pub fn owes(&self) -> bool {
        self.cluster.has_homeless() || self.view().caches.iter().any(RedisCache::owes)
    }

    /// Whether the tier in this process holds an entry of this key.
    #[must_use]
    pub fn in_process(&self, key: &str) -> bool {
        let view = self.view();
        view.topology.owner(key).is_some_and(|owner| view.caches[owner].in_process(key))
    }

    /// The number of open connections.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.view().caches.iter().map(RedisCache::connections).sum()
    }

    /// How far behind the database the memory is that is the furthest; `None` where that is not known of each.
    #[must_use]
    pub fn staleness(&self) -> Option<u64> {
        let behind: Option<Vec<u64>> = self.view().caches.iter().map(RedisCache::staleness).collect();
        behind?.into_iter().max()
    }

    /// Tells every node about those of the keys that it holds, and all of them of what each has a copy of. Where one has
    /// lost a key's slot meanwhile, its new holder is told.
    async fn tell(&self, keys: &[&str], word: Word) -> Result<(), CacheError> {
        let mut keys = keys.to_vec();
        let spare = matches!(word, Word::InvalidateUnlessHeld(_));
        let (mut failed, mut again) = (Ok(()), true);
        loop {
            let view = self.ready().await;
            let mut parts: BTreeMap<usize, Vec<&str>> = BTreeMap::new();
            for key in &keys {
                if self.cluster.everywhere(key) && !view.caches.is_empty() {
                    (0..view.caches.len()).for_each(|place| parts.entry(place).or_default().push(key));
                } else if let Some(owner) = view.topology.owner(key) {
                    parts.entry(owner).or_default().push(key);
                } else {
                    self.cluster.owe(&self.cluster.topology(), vec![((*key).to_owned(), spare)]);
                    failed = Err(CacheError::Disconnected);
                }
            }
            let told = join_all(parts.iter().map(|(place, some)| word.say(&view.caches[*place], some))).await;
            let (mut moved, mut late) = (Vec::new(), Ok(()));
            for ((place, some), told) in parts.into_iter().zip(told) {
                let Err(error) = told else { continue };
                self.cluster.strand(&view.topology.members[place]);
                if error == CacheError::Elsewhere {
                    moved.extend(some);
                    late = Err(error);
                } else {
                    failed = Err(error);
                }
            }
            if moved.is_empty() || !again {
                return failed.and(late);
            }
            (again, keys) = (false, moved);
            let before = &view.topology;
            self.turned(self.cluster.timeout(), |cluster| !Arc::ptr_eq(before, &cluster.topology())).await;
        }
    }
}

/// What nodes are told of keys.
#[derive(Clone, Copy)]
enum Word {
    Invalidate,
    InvalidateEverywhere,
    InvalidateUnlessHeld(Option<Fence>),
}

impl Word {
    async fn say(self, cache: &RedisCache, keys: &[&str]) -> Result<(), CacheError> {
        match self {
            Self::Invalidate => cache.invalidate(keys).await,
            Self::InvalidateEverywhere => cache.invalidate_everywhere(keys).await,
            Self::InvalidateUnlessHeld(owner) => cache.invalidate_unless_held(keys, owner).await,
        }
    }
}

/// Items by the node that holds their keys.
struct Split<T> {
    parts: BTreeMap<usize, Part<T>>,
    count: usize,
}

struct Part<T> {
    /// Where the items stood.
    indices: Vec<usize>,
    items: Vec<T>,
}

impl<T> Split<T> {
    fn new(view: &View, items: impl ExactSizeIterator<Item = T>, key: impl Fn(&T) -> &str) -> Self {
        let mut split = Self { parts: BTreeMap::new(), count: items.len() };
        for (index, item) in items.enumerate() {
            if let Some(owner) = view.topology.owner(key(&item)) {
                let part = split.parts.entry(owner).or_insert_with(|| Part { indices: Vec::new(), items: Vec::new() });
                part.indices.push(index);
                part.items.push(item);
            }
        }
        split
    }

    /// Asks every node for its part.
    async fn ask<'s, R, F: Future<Output = R>>(
        &'s self,
        view: &'s View,
        ask: impl Fn(&'s RedisCache, &'s [T]) -> F,
    ) -> Vec<R> {
        join_all(self.parts.iter().map(|(owner, part)| ask(&view.caches[*owner], &part.items))).await
    }

    /// The answers in the items' order. Items that nobody answers for get `otherwise`, unless nobody answers at all.
    fn merge<R>(
        self,
        answers: Vec<Result<Vec<R>, CacheError>>,
        otherwise: impl Fn() -> R,
    ) -> Result<Vec<R>, CacheError> {
        let mut merged: Vec<Option<R>> = (0..self.count).map(|_| None).collect();
        let (mut answered, mut failure) = (self.count == 0, CacheError::Disconnected);
        for (part, answer) in self.parts.into_values().zip(answers) {
            match answer {
                Ok(replies) => {
                    answered = true;
                    part.indices.into_iter().zip(replies).for_each(|(index, reply)| merged[index] = Some(reply));
                }
                Err(error) => failure = error,
            }
        }
        if !answered {
            return Err(failure);
        }
        Ok(merged.into_iter().map(|reply| reply.unwrap_or_else(&otherwise)).collect())
    }
}

impl Cache for ClusterCache {
    async fn read(&self, place: Place<'_>) -> Result<Lookup, CacheError> {
        let view = self.ready().await;
        let owner = view.topology.owner(place.key).ok_or(CacheError::Disconnected)?;
        view.caches[owner].read(place).await
    }

    async fn read_many(&self, places: &[Place<'_>]) -> Result<Vec<Lookup>, CacheError> {
        let view = self.ready().await;
        let split = Split::new(&view, places.iter().copied(), |place| place.key);
        let answers = split.ask(&view, |cache, some| cache.read_many(some)).await;
        split.merge(answers, || Lookup::Absent)
    }

    async fn lease(&self, places: &[Place<'_>], lock: Duration) -> Result<Vec<Lease>, CacheError> {
        let view = self.ready().await;
        let split = Split::new(&view, places.iter().copied(), |place| place.key);
        let answers = split.ask(&view, |cache, some| cache.lease(some, lock)).await;
        split.merge(answers, || Lease::Past)
    }

    async fn renew(&self, held: &[(Place<'_>, Ticket)], lock: Duration) -> Result<(), CacheError> {
        let view = self.ready().await;
        let split = Split::new(&view, held.iter().copied(), |(place, _)| place.key);
        split.ask(&view, |cache, some| cache.renew(some, lock)).await.into_iter().collect()
    }

    async fn fill(&self, fills: &[(Place<'_>, Ticket, Fill)]) -> Result<Vec<Filled>, CacheError> {
        let view = self.ready().await;
        let split = Split::new(&view, fills.iter().cloned(), |(place, _, _)| place.key);
        let answers = split.ask(&view, |cache, some| cache.fill(some)).await;
        split.merge(answers, || Filled::Gone)
    }

    async fn release(&self, held: &[(Place<'_>, Ticket)]) -> Result<(), CacheError> {
        let view = self.ready().await;
        let split = Split::new(&view, held.iter().copied(), |(place, _)| place.key);
        split.ask(&view, |cache, some| cache.release(some)).await.into_iter().collect()
    }

    async fn invalidate(&self, keys: &[&str]) -> Result<(), CacheError> {
        self.tell(keys, Word::Invalidate).await
    }

    async fn hold(&self, keys: &[&str], owner: Fence, time: Duration) -> Result<(), CacheError> {
        let view = self.ready().await;
        let (shared, own): (Vec<&str>, Vec<&str>) = keys.iter().partition(|key| self.cluster.everywhere(key));
        let split = Split::new(&view, own.iter().copied(), |key| key);
        if view.caches.is_empty() || split.parts.values().map(|part| part.items.len()).sum::<usize>() < own.len() {
            // One that can't be held holds nobody back.
            return Err(CacheError::Disconnected);
        }
        if !shared.is_empty() {
            let held = view.caches.iter().map(|cache| cache.hold(&shared, owner, time));
            join_all(held).await.into_iter().collect::<Result<(), _>>()?;
        }
        split.ask(&view, |cache, some| cache.hold(some, owner, time)).await.into_iter().collect()
    }

    async fn invalidate_unless_held(&self, keys: &[&str], owner: Option<Fence>) -> Result<(), CacheError> {
        self.tell(keys, Word::InvalidateUnlessHeld(owner)).await
    }

    async fn invalidate_everywhere(&self, keys: &[&str]) -> Result<(), CacheError> {
        self.tell(keys, Word::InvalidateEverywhere).await
    }

    async fn purge(&self, resource: &str) -> Result<(), CacheError> {
        let view = self.ready().await;
        if view.caches.is_empty() {
            return Err(CacheError::Disconnected);
        }
        join_all(view.caches.iter().map(|cache| cache.purge(resource))).await.into_iter().collect()
    }

    fn answered_since(&self, key: &str, moment: Instant) -> bool {
        let view = self.view.load();
        view.topology.owner(key).is_some_and(|owner| view.caches[owner].answered_since(key, moment))
    }

    async fn inspect(&self, place: Place<'_>) -> Result<Inspection, CacheError> {
        let view = self.ready().await;
        let owner = view.topology.owner(place.key).ok_or(CacheError::Disconnected)?;
        view.caches[owner].inspect(place).await
    }
}
