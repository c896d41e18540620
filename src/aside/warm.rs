//! Fills the cache before anybody asks: batches of keys take the way of any read, so a warm fill is as safe as another,
//! and what is there is not loaded again.
//!
//! It stays behind readers: a share of the database's connections, and nothing while a reader waits for one. What it reads
//! is not counted among requests; it would make a miss of every row.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::answer::{Answer, Ask, Forward, ReadError, Source};
use super::{Aside, Core};
use crate::cache::Cache;
use crate::catalog::{Resource, Target};
use crate::store::{Keys, Store, StoreError};

/// Keys of one statement.
const BATCH: usize = 100;
/// Keys of one page of a walk.
const PAGE: usize = 1_000;
/// Batches that may be begun; how many are at work, their share of the connections says.
const BEGUN: usize = 16;
/// The most that one batch may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// A batch is tried so often, with pauses of this long and twice as long each time.
const TRIES: u32 = 6;
const PAUSE: Duration = Duration::from_millis(100);
/// Between two looks whether readers still wait for a connection.
const YIELD: Duration = Duration::from_millis(5);

/// How many keys a second are warmed where nobody says: fifty statements.
pub const RATE: u32 = 5_000;

/// What all that is warmed in a process may use together. Clones share it.
#[derive(Clone, Debug)]
pub struct Share(Arc<Semaphore>);

impl Share {
    /// A quarter of so many connections, at least one.
    #[must_use]
    pub fn of(connections: u32) -> Self {
        Self(Arc::new(Semaphore::new((connections as usize / 4).max(1))))
    }
}

/// What became of the keys so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Loaded and stored.
    pub filled: u64,
    /// In the cache already.
    pub present: u64,
    /// There are no such rows.
    pub absent: u64,
    /// Not in the cache now.
    pub failed: u64,
    /// Why those failed, and how many each.
    pub why: BTreeMap<&'static str, u64>,
}

impl Counts {
    /// All of them.
    #[must_use]
    pub fn keys(&self) -> u64 {
        self.filled + self.present + self.absent + self.failed
    }
}

/// Counts keys as they are done.
#[derive(Debug, Default)]
pub struct Tally {
    filled: AtomicU64,
    present: AtomicU64,
    absent: AtomicU64,
    failed: Mutex<BTreeMap<&'static str, u64>>,
}

impl Tally {
    /// The counts now.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let why = self.failed.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Counts {
            filled: self.filled.load(Ordering::Relaxed),
            present: self.present.load(Ordering::Relaxed),
            absent: self.absent.load(Ordering::Relaxed),
            failed: why.values().sum(),
            why,
        }
    }

    /// Counts a key that can't be warmed.
    pub fn failed(&self, why: &'static str) {
        *self.failed.lock().unwrap_or_else(PoisonError::into_inner).entry(why).or_default() += 1;
    }

    /// Counts a key that no row can have.
    pub fn absent(&self) {
        self.absent.fetch_add(1, Ordering::Relaxed);
    }
}

/// Warming under way. It ends when this is dropped.
#[derive(Debug)]
pub struct Warming {
    tally: Arc<Tally>,
    stop: CancellationToken,
    task: AbortOnDropHandle<Result<(), StoreError>>,
}

impl Warming {
    /// What was done so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.tally.counts()
    }

    /// Begins nothing more; [`Self::ended`] follows soon.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// Waits for the end.
    ///
    /// # Errors
    ///
    /// What made it give up.
    pub async fn ended(&mut self) -> Result<(), StoreError> {
        (&mut self.task).await.unwrap_or_else(|_| Err(StoreError::Refused("warming ended unexpectedly".into())))
    }
}

impl<C: Cache + Clone + 'static, S: Store + 'static> Aside<C, S> {
    /// Warms rows of a resource, as fast as `rate` says in keys a second (0: as fast as its share of the connections
    /// goes). What the caller finds wrong with a key it counts in `tally` itself.
    #[must_use]
    pub fn warm(
        &self,
        batches: impl Stream<Item = Result<Vec<Target>, StoreError>> + Send + 'static,
        tally: Arc<Tally>,
        rate: u32,
        share: Share,
    ) -> Warming {
        let stop = CancellationToken::new();
        let warmer = Warmer {
            // Over the connection of the engine's runtime: a worker that serves hits is left alone.
            aside: Self { core: Arc::clone(&self.core), cache: self.core.cache.clone() },
            tally: Arc::clone(&tally),
            share,
        };
        let until = stop.clone();
        let task = self.core.runtime.spawn(async move {
            let batches = paced(batches, rate).take_until(until.cancelled_owned());
            batches.try_for_each_concurrent(BEGUN, async |targets| warmer.batch(targets).await).await
        });
        Warming { tally, stop, task: AbortOnDropHandle::new(task) }
    }

    /// All rows of a resource, in the order of their keys.
    pub fn all(
        &self,
        resource: &Arc<Resource>,
        share: &Share,
    ) -> impl Stream<Item = Result<Vec<Target>, StoreError>> + use<C, S> {
        let walk = Walk {
            core: Arc::clone(&self.core),
            resource: Arc::clone(resource),
            keys: Keys::new(PAGE),
            share: share.clone(),
        };
        let pages = stream::try_unfold(walk, |mut walk| async move {
            let page = walk.page().await?;
            Ok::<_, StoreError>((!page.is_empty()).then_some((page, walk)))
        });
        pages.map_ok(|page| batches(stream::iter(page)).map(Ok)).try_flatten()
    }
}

/// Cuts targets into batches, which are made when their turn has come.
pub fn batches(targets: impl Stream<Item = Target>) -> impl Stream<Item = Vec<Target>> {
    targets.chunks(BATCH)
}

/// A walk through all keys.
struct Walk<C, S> {
    core: Arc<Core<C, S>>,
    resource: Arc<Resource>,
    keys: Keys,
    share: Share,
}

impl<C, S: Store> Walk<C, S> {
    async fn page(&mut self) -> Result<Vec<Target>, StoreError> {
        for pause in pauses() {
            let _permit = turn(&self.core.store, &self.share).await;
            let started = std::time::Instant::now();
            let page = self.keys.next(&self.core.store, &self.resource).await;
            self.core.metrics.store_query(&self.resource.name, "keys", started.elapsed());
            match (page, pause) {
                (Ok(page), _) => return Ok(page.keys.into_iter().map(|key| self.resource.row_of(key)).collect()),
                (Err(error), Some(pause)) if error.is_outage() => {
                    tracing::debug!(resource = %self.resource.name, %error, "a page of keys is asked for again");
                    tokio::time::sleep(pause).await;
                }
                (Err(error), _) => return Err(error),
            }
        }
        Err(StoreError::Busy)
    }
}

/// The pauses after each try; `None`: it was the last.
fn pauses() -> impl Iterator<Item = Option<Duration>> {
    (0..TRIES).map(|tried| (tried + 1 < TRIES).then(|| PAUSE * 2_u32.pow(tried)))
}

/// Waits until no reader waits for a connection, and for a part of the share.
async fn turn<'a>(store: &impl Store, share: &'a Share) -> Option<tokio::sync::SemaphorePermit<'a>> {
    // The semaphore is never closed.
    let permit = share.0.acquire().await.ok();
    while store.is_pressed() {
        tokio::time::sleep(YIELD).await;
    }
    permit
}

/// Lets so many keys a second pass; 0: all at once.
fn paced(
    batches: impl Stream<Item = Result<Vec<Target>, StoreError>>,
    rate: u32,
) -> impl Stream<Item = Result<Vec<Target>, StoreError>> {
    let mut next = Instant::now();
    batches.then(move |batch| {
        let at = next.max(Instant::now());
        if let (Ok(targets), 1..) = (&batch, rate) {
            #[expect(clippy::cast_precision_loss, reason = "a batch of keys")]
            let share = targets.len() as f64 / f64::from(rate);
            next = at + Duration::from_secs_f64(share);
        }
        async move {
            tokio::time::sleep_until(at).await;
            batch
        }
    })
}

struct Warmer<C, S> {
    aside: Aside<C, S>,
    tally: Arc<Tally>,
    share: Share,
}

/// What became of one key.
enum Done {
    Filled,
    Present,
    Absent,
    /// It is not in the cache, for this reason: perhaps the next time.
    Again(&'static str),
    Failed(&'static str),
}

/// Read, but not kept.
const UNSTORED: &str = "read but not stored: changed at the time, or spelled otherwise in the database";

impl<C: Cache + Clone + 'static, S: Store + 'static> Warmer<C, S> {
    /// Warms a batch, trying again what may be only a matter of time. An error: there is no use in going on.
    async fn batch(&self, targets: Vec<Target>) -> Result<(), StoreError> {
        let (mut left, mut why) = (targets, Vec::new());
        for pause in pauses() {
            let read = {
                let _permit = turn(&self.aside.core.store, &self.share).await;
                self.read(&left).await
            };
            match (read, pause) {
                (Ok(done), _) => {
                    let counted = left.into_iter().zip(done);
                    let again = counted.filter_map(|(target, done)| Some((self.count(&target, &done)?, target)));
                    (why, left) = again.unzip();
                }
                (Err(error), Some(_)) if error.is_outage() => {
                    tracing::debug!(%error, "a batch is warmed again");
                }
                (Err(error), _) => return Err(error),
            }
            match pause {
                Some(pause) if !left.is_empty() => tokio::time::sleep(pause).await,
                _ => break,
            }
        }
        for (target, why) in left.iter().zip(why) {
            self.count(target, &Done::Failed(why));
        }
        Ok(())
    }

    /// Reads a batch; where the database can't read one of its keys, each by itself.
    async fn read(&self, targets: &[Target]) -> Result<Vec<Done>, StoreError> {
        let ask = || Ask { refresh: false, only_if_cached: false, deadline: Instant::now() + PATIENCE };
        let judge = |answer: &Answer| self.judge(answer);
        match self.aside.answer_many(targets, ask()).await {
            Ok(answers) => Ok(answers.iter().map(judge).collect()),
            Err(ReadError::Store(StoreError::BadValue(_))) => {
                let mut done = Vec::with_capacity(targets.len());
                for target in targets {
                    done.push(match self.aside.answer_many(std::slice::from_ref(target), ask()).await {
                        Ok(answers) => answers.first().map_or(Done::Again(UNSTORED), judge),
                        Err(ReadError::Store(StoreError::BadValue(_))) => {
                            Done::Failed("the database can't read the key as one of the column's type")
                        }
                        Err(error) => return Err(given_up(error)),
                    });
                }
                Ok(done)
            }
            Err(error) => Err(given_up(error)),
        }
    }

    fn judge(&self, answer: &Answer) -> Done {
        let (entry, status) = (&answer.entry, &answer.status);
        match status.forward {
            _ if entry.negative => Done::Absent,
            _ if status.stored => Done::Filled,
            _ if status.source == Source::Cache => Done::Present,
            Some(Forward::Bypass) => Done::Again("the cache can't be used"),
            _ if entry.payload.len() > self.aside.core.limits.max_entry => Done::Failed("larger than cache.max_entry"),
            _ => Done::Again(UNSTORED),
        }
    }

    /// Counts a key, unless it is to be tried again; why.
    fn count(&self, target: &Target, done: &Done) -> Option<&'static str> {
        let (counter, outcome) = match done {
            Done::Filled => (&self.tally.filled, "filled"),
            Done::Present => (&self.tally.present, "present"),
            Done::Absent => (&self.tally.absent, "absent"),
            Done::Again(why) => return Some(why),
            Done::Failed(why) => {
                self.tally.failed(why);
                self.aside.core.metrics.warmed(&target.resource().name, "failed");
                return None;
            }
        };
        counter.fetch_add(1, Ordering::Relaxed);
        self.aside.core.metrics.warmed(&target.resource().name, outcome);
        None
    }
}

/// What a failed read of a batch means for the whole.
fn given_up(error: ReadError) -> StoreError {
    match error {
        ReadError::Store(error) => error,
        ReadError::TimedOut => StoreError::TimedOut,
        // Nothing was asked for from the cache alone.
        ReadError::NotCached | ReadError::Failed => StoreError::Unavailable(error.to_string()),
    }
}
