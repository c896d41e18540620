//! Values by keys, loaded by the program's own closure where the cache lacks them.

use std::borrow::Borrow;
use std::error::Error as StdError;
use std::fmt::Write as _;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, TryStreamExt, stream};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::{Error, Fetched, Found, Result, Shared, key};
use crate::aside::{Aside, Ask, Limits, Source};
use crate::cache::{AnyCache, Inspection};
use crate::catalog::{Key, Policy, Resource, Target};
use crate::store::LoaderError;
use crate::store::loader::Loader;

/// Calls of a [loader for single keys](EntriesBuilder::loader_each) that run at once.
const AT_ONCE: usize = 16;
/// Calls of the loader for values that are still fresh, at most at once.
const REFRESHES: usize = 8;

/// Nobody waits for so long.
const FAR: Duration = Duration::from_hours(24 * 365);

/// How entries live, until they have a loader.
#[derive(Debug)]
#[must_use = "entries need a loader"]
pub struct EntriesBuilder<K, V> {
    shared: Arc<Shared>,
    name: String,
    policy: Policy,
    version: u64,
    load_timeout: Duration,
    timeout: Duration,
    types: PhantomData<fn(K) -> V>,
}

impl<K, V> EntriesBuilder<K, V> {
    pub(super) fn new(shared: Arc<Shared>, name: &str) -> Self {
        let policy = Policy::new(&shared.defaults);
        let (load_timeout, timeout) = (Duration::from_secs(5), Duration::from_secs(10));
        Self { shared, name: spelled(name), policy, version: 0, load_timeout, timeout, types: PhantomData }
    }

    /// Values are fresh for this long. Default: an hour.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.policy.ttl = ttl;
        self
    }

    /// Each TTL is drawn from `[ttl*(1-jitter), ttl]`, so that values don't end together; 0 to 1. Default 0.1.
    pub fn ttl_jitter(mut self, jitter: f64) -> Self {
        self.policy.jitter = if jitter.is_finite() { jitter.clamp(0.0, 1.0) } else { 0.0 };
        self
    }

    /// How long "not found" is remembered; zero: not at all. Default 5 s.
    pub fn negative_ttl(mut self, ttl: Duration) -> Self {
        self.policy.negative_ttl = ttl;
        self
    }

    /// How long past its TTL a value may still be served when the loader fails; zero: never. What was invalidated is never
    /// served. Default 10 min.
    pub fn stale_if_error(mut self, time: Duration) -> Self {
        self.policy.stale_if_error = time;
        self
    }

    /// How long past its TTL a value is served while one reader in the fleet loads it anew. Default: not at all.
    pub fn stale_while_revalidate(mut self, time: Duration) -> Self {
        self.policy.stale_while_revalidate = time;
        self
    }

    /// How eagerly a value that is read often is loaded again before its TTL ends, so that nobody waits for it: so many times
    /// two to three times what its last load took, and 50 to 100 ms, before that end. 0: never. Default 1.
    pub fn refresh_ahead(mut self, beta: f64) -> Self {
        self.policy.refresh_ahead = if beta.is_finite() { beta.max(0.0) } else { 0.0 };
        self
    }

    /// The most that one call of the loader may take; past it its future is dropped, and the call fails with
    /// [`Error::TimedOut`]. Until then its lock in the cache is kept alive. Default 5 s.
    pub fn load_timeout(mut self, timeout: Duration) -> Self {
        self.load_timeout = timeout;
        self
    }

    /// The most that a reader waits, for its own load or another's. Default 10 s.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Another version of the values' type: what was stored under another one is as good as absent. Say a new one when the
    /// type changes; then two versions don't get into each other's way while an update is rolled out.
    pub fn version(mut self, version: u64) -> Self {
        self.version = version;
        self
    }

    /// Where values come from that the cache lacks: a closure that is given all missing keys of a call at once, each once and
    /// in the order asked, and gives back what it [found](Found).
    ///
    /// It runs in the runtime in which the cache was built. For each key it runs once at a time in the fleet, as far as all its
    /// processes use the same cache and are alive. Neither a caller's end stops it, nor does its own panic hurt anybody:
    /// those who waited for it get [`Error::Panicked`].
    pub fn loader<F, Fut, R, E>(self, load: F) -> Entries<K, V>
    where
        F: Fn(Vec<K>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<R, E>> + Send + 'static,
        R: Found<K, V>,
        E: Into<Box<dyn StdError + Send + Sync>>,
        K: DeserializeOwned + Clone + Send + 'static,
        V: Serialize,
    {
        let load = move |texts: Vec<String>| {
            let ids: Result<Vec<K>, LoaderError> =
                texts.iter().map(|text| key::read(text).map_err(|error| own(Error::Key(error.to_string())))).collect();
            // The closure is called here, its future runs later: neither needs the other's types.
            let loading = ids.map(|ids| (load(ids.clone()), ids));
            async move {
                let (loading, ids) = loading?;
                let found = loading.await.map_err(|error| LoaderError(Arc::from(error.into())))?;
                found.in_order(&ids).into_iter().map(bytes).collect()
            }
            .boxed()
        };
        let Self { shared, name, policy, version, load_timeout, timeout, .. } = self;
        let limits = Limits {
            max_entry: shared.max_entry,
            wait: load_timeout.saturating_add(Duration::from_millis(500)),
            hold: load_timeout,
            refreshes: REFRESHES,
            audit_ratio: 0.0,
            max_staleness: Duration::ZERO,
        };
        let loader = Loader::new(load, load_timeout);
        let (cache, metrics, writes) = (shared.cache.clone(), Arc::clone(&shared.metrics), shared.writes.clone());
        let _in_the_runtime = shared.runtime.enter();
        let aside = Aside::beside(cache, loader, limits, metrics, writes);
        let resource = Arc::new(Resource::loaded(&name, policy, &shared.key_prefix, version));
        Entries { inner: Arc::new(Inner { aside, resource, timeout }), types: PhantomData }
    }

    /// The same for a closure that loads one value by one key. Several missing keys are several calls, of which sixteen run at
    /// once.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> cache_aside::Result<()> {
    /// # let cache = cache_aside::CacheAside::builder().build().await?;
    /// let files = cache.entries::<String, String>("files").loader_each(async |name: String| {
    ///     match std::fs::read_to_string(&name) {
    ///         Ok(text) => Ok(Some(text)),
    ///         Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
    ///         Err(error) => Err(error),
    ///     }
    /// });
    /// assert_eq!(files.get("/no/such/file").await?, None);
    /// # Ok(()) }
    /// ```
    pub fn loader_each<F, Fut, E>(self, load: F) -> Entries<K, V>
    where
        F: Fn(K) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Option<V>, E>> + Send + 'static,
        E: Into<Box<dyn StdError + Send + Sync>> + Send + 'static,
        K: DeserializeOwned + Clone + Send + 'static,
        V: Serialize + Send + 'static,
    {
        self.loader(move |ids: Vec<K>| {
            let calls: Vec<Fut> = ids.into_iter().map(&load).collect();
            stream::iter(calls).buffered(AT_ONCE).try_collect::<Vec<Option<V>>>()
        })
    }
}

/// A name as it stands in cache keys, where `:` ends it, and `cache-aside` is taken.
fn spelled(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    let taken = name.starts_with("cache-aside");
    for byte in name.bytes() {
        match byte {
            b'-' if taken => out.push_str("%2D"),
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'-' => out.push(char::from(byte)),
            // Writing to a String can't fail.
            other => drop(write!(out, "%{other:02X}")),
        }
    }
    out
}

/// An error of ours on its way through the heart.
fn own(error: Error) -> LoaderError {
    LoaderError(Arc::new(error))
}

fn bytes<V: Serialize>(value: Option<V>) -> Result<Option<Bytes>, LoaderError> {
    let json = value.map(|value| serde_json::to_vec(&value).map(Bytes::from)).transpose();
    json.map_err(|error| own(error.into()))
}

/// Values of type `V` by keys of type `K`. Clones share everything.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> cache_aside::Result<()> {
/// # use std::convert::Infallible;
/// # let cache = cache_aside::CacheAside::builder().build().await?;
/// # let squares = cache.entries::<u32, u64>("squares").loader(async |ids: Vec<u32>| {
/// #     Ok::<_, Infallible>(ids.into_iter().map(|id| (id < 100).then(|| u64::from(id).pow(2))).collect::<Vec<_>>())
/// # });
/// assert_eq!(squares.get(&3).await?, Some(9));
/// // One round trip to the cache, and one call of the loader for 4 and 1000.
/// assert_eq!(squares.get_many(&[3, 4, 1000]).await?, [Some(9), Some(16), None]);
/// // After the program has written, and before it says so.
/// squares.invalidate(&3).await?;
/// assert!(!squares.fetch(&3).await?.is_hit());
/// # Ok(()) }
/// ```
pub struct Entries<K, V> {
    inner: Arc<Inner>,
    types: PhantomData<fn(K) -> V>,
}

struct Inner {
    aside: Aside<AnyCache, Loader>,
    resource: Arc<Resource>,
    timeout: Duration,
}

impl<K, V> Clone for Entries<K, V> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner), types: PhantomData }
    }
}

impl<K, V> std::fmt::Debug for Entries<K, V> {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Entries").field("name", &self.inner.resource.name).finish_non_exhaustive()
    }
}

/// Which way a read goes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Way {
    /// Through the cache.
    Cache,
    /// Past it, and into it.
    Refresh,
    /// To the cache and no further.
    CacheOnly,
}

impl Way {
    pub(super) fn ask(self, timeout: Duration) -> Ask {
        let now = Instant::now();
        // A program may say `Duration::MAX` and mean "as long as it takes".
        let deadline = now.checked_add(timeout).unwrap_or(now + FAR);
        Ask { refresh: self == Self::Refresh, only_if_cached: self == Self::CacheOnly, deadline }
    }
}

impl<K, V: DeserializeOwned> Entries<K, V> {
    /// The value; `None` where there is none.
    ///
    /// A value of another type, stored by another version of the program, is loaded anew.
    ///
    /// # Errors
    ///
    /// What the loader failed with, or that it took too long. A cache that is away is no error.
    pub async fn get<Q>(&self, id: &Q) -> Result<Option<V>>
    where
        K: Borrow<Q>,
        Q: Serialize + ?Sized,
    {
        Ok(self.fetch(id).await?.value)
    }

    /// The same, with how it came.
    ///
    /// # Errors
    ///
    /// As [`Self::get`].
    pub async fn fetch<Q>(&self, id: &Q) -> Result<Fetched<Option<V>>>
    where
        K: Borrow<Q>,
        Q: Serialize + ?Sized,
    {
        self.read(&self.target(id)?, Way::Cache).await
    }

    /// Loads the value whatever the cache holds, and stores it.
    ///
    /// # Errors
    ///
    /// As [`Self::get`].
    pub async fn refresh<Q>(&self, id: &Q) -> Result<Fetched<Option<V>>>
    where
        K: Borrow<Q>,
        Q: Serialize + ?Sized,
    {
        self.read(&self.target(id)?, Way::Refresh).await
    }

    /// The value if the cache has it; nothing is loaded.
    ///
    /// # Errors
    ///
    /// [`Error::NotCached`].
    pub async fn cached<Q>(&self, id: &Q) -> Result<Fetched<Option<V>>>
    where
        K: Borrow<Q>,
        Q: Serialize + ?Sized,
    {
        self.read(&self.target(id)?, Way::CacheOnly).await
    }

    /// The values of many keys, in their order: one round trip to the cache, and one call of the loader for what is missing.
    ///
    /// # Errors
    ///
    /// As [`Self::get`]; one key that can't be loaded fails all.
    pub async fn get_many(&self, ids: &[K]) -> Result<Vec<Option<V>>>
    where
        K: Serialize,
    {
        Ok(self.fetch_many(ids).await?.into_iter().map(|fetched| fetched.value).collect())
    }

    /// The same, with how each of them came.
    ///
    /// # Errors
    ///
    /// As [`Self::get_many`].
    pub async fn fetch_many(&self, ids: &[K]) -> Result<Vec<Fetched<Option<V>>>>
    where
        K: Serialize,
    {
        let targets = ids.iter().map(|id| self.target(id)).collect::<Result<Vec<Target>>>()?;
        read_many(&self.inner.aside, &targets, self.inner.timeout).await
    }

    async fn read(&self, target: &Target, way: Way) -> Result<Fetched<Option<V>>> {
        read(&self.inner.aside, target, way, self.inner.timeout).await
    }
}

/// Reads one value. What came from the cache and is of another type is loaded anew, once.
pub(super) async fn read<S: crate::store::Load + 'static, V: DeserializeOwned>(
    aside: &Aside<AnyCache, S>,
    target: &Target,
    way: Way,
    timeout: Duration,
) -> Result<Fetched<Option<V>>> {
    let ask = way.ask(timeout);
    let answer = aside.read(target, ask).await?;
    match Fetched::read(&answer) {
        Err(_) if ask.only_if_cached => Err(Error::NotCached),
        Err(_) if answer.status.source == Source::Cache => {
            let again = aside.read(target, Ask { refresh: true, ..ask }).await?;
            Ok(Fetched::read(&again)?)
        }
        fetched => Ok(fetched?),
    }
}

/// The same for many.
pub(super) async fn read_many<S: crate::store::Load + 'static, V: DeserializeOwned>(
    aside: &Aside<AnyCache, S>,
    targets: &[Target],
    timeout: Duration,
) -> Result<Vec<Fetched<Option<V>>>> {
    let ask = Way::Cache.ask(timeout);
    let answers = aside.read_many(targets, ask).await?;
    let mut fetched = Vec::with_capacity(answers.len());
    let mut unfit = Vec::new();
    for (index, answer) in answers.iter().enumerate() {
        match Fetched::read(answer) {
            Err(_) if answer.status.source == Source::Cache => {
                fetched.push(None);
                unfit.push(index);
            }
            one => fetched.push(Some(one?)),
        }
    }
    if !unfit.is_empty() {
        let again: Vec<Target> = unfit.iter().map(|index| targets[*index].clone()).collect();
        let answers = aside.read_many(&again, Ask { refresh: true, ..ask }).await?;
        for (index, answer) in unfit.into_iter().zip(&answers) {
            fetched[index] = Some(Fetched::read(answer)?);
        }
    }
    Ok(fetched.into_iter().flatten().collect())
}

impl<K, V> Entries<K, V> {
    /// Drops a value after the program has written what it is made of, and before it says so to anybody: whoever reads from
    /// then on, in any process that shares the cache, gets what is there now. Loads that began before are refused.
    ///
    /// Once begun it ends, even if the caller is gone.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidationPending`] where the cache could not be told. The write itself stands.
    pub async fn invalidate<Q>(&self, id: &Q) -> Result<()>
    where
        K: Borrow<Q>,
        Q: Serialize + ?Sized,
    {
        self.forget(vec![self.target(id)?]).await
    }

    /// The same for many keys, in one round trip.
    ///
    /// # Errors
    ///
    /// As [`Self::invalidate`].
    pub async fn invalidate_many(&self, ids: &[K]) -> Result<()>
    where
        K: Serialize,
    {
        self.forget(ids.iter().map(|id| self.target(id)).collect::<Result<_>>()?).await
    }

    /// Drops all values of this name, whatever their number: this process knows it before the answer, others within a
    /// fraction of a second.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidationPending`] where the cache could not be told; it is not repeated by itself.
    pub async fn invalidate_all(&self) -> Result<()> {
        self.inner.aside.forget_all(&self.inner.resource).await.map_err(Error::InvalidationPending)
    }

    /// What the cache holds under a key: its state, age, TTL and size.
    ///
    /// # Errors
    ///
    /// [`Error::NotCached`] where the cache can't be asked.
    pub async fn inspect<Q>(&self, id: &Q) -> Result<Inspection>
    where
        K: Borrow<Q>,
        Q: Serialize + ?Sized,
    {
        self.inner.aside.inspect(&self.target(id)?).await.map_err(|_| Error::NotCached)
    }

    /// The key under which the cache has it, for people with a `redis-cli`.
    ///
    /// # Errors
    ///
    /// [`Error::Key`].
    pub fn key<Q>(&self, id: &Q) -> Result<String>
    where
        K: Borrow<Q>,
        Q: Serialize + ?Sized,
    {
        Ok(self.target(id)?.entry().to_owned())
    }

    async fn forget(&self, targets: Vec<Target>) -> Result<()> {
        self.inner.aside.forget(targets).await.map_err(Error::InvalidationPending)
    }

    fn target<Q: Serialize + ?Sized>(&self, id: &Q) -> Result<Target> {
        Ok(self.inner.resource.row_of(Key::from_database(vec![key::spell(id)?])))
    }
}
