//! The rounds of each memory, run by this process or watched while another runs them.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::{AbortHandle, abortable};
use futures_util::stream::FuturesUnordered;
use tokio::time::Instant;

use super::plan;
use crate::cache::{AnyCache, AnyNode, CacheError, Looked, Node, Step};
use crate::store::{AnyFeed, StoreError};
use crate::telemetry::Metrics;

/// How often things happen, all in proportion to how far behind a hit may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Between two rounds of whoever ran the last one.
    period: Duration,
    /// Between two looks of the others.
    watch: Duration,
    /// A watermark older than this, and a random while, makes another step in.
    step_in: Duration,
    /// What the database may take to say what is owed.
    pub patience: Duration,
}

impl Pace {
    /// The pace that keeps a memory within `max_staleness`.
    #[must_use]
    pub fn new(max_staleness: Duration) -> Self {
        let part = |share: u32, least: u64, most: u64| {
            (max_staleness / share).clamp(Duration::from_millis(least), Duration::from_millis(most))
        };
        Self {
            period: part(20, 5, 50),
            watch: part(10, 10, 100),
            step_in: part(5, 20, 200),
            patience: part(3, 100, 1000),
        }
    }
}

/// A database of an earlier timeline is not believed while the cache keeps up with a later one; when it has not for so
/// long, somebody has gone back on purpose.
const FORMER: Duration = Duration::from_secs(10);

/// Between two sweeps of the outbox, and two counts of its rows.
const SWEEP: Duration = Duration::from_secs(30);

/// Between two looks at how far behind the decoder is.
const WATCH: Duration = Duration::from_secs(5);

/// Why the last round failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Trouble {
    /// At the cache.
    #[error("the cache can't be brought up to date: {0}")]
    Cache(#[from] CacheError),
    /// A newer version must do it.
    #[error("a newer version of this service uses the cache; it must keep it up to date")]
    Newer,
    /// At the database.
    #[error("changes can't be read: {0}")]
    Store(#[from] StoreError),
}

/// Whether `one` is an earlier timeline of the same database as `other`.
fn is_former(one: &str, other: &str) -> bool {
    let parts = |text: &str| {
        let mut parts = text.split(':').map(ToOwned::to_owned);
        let (system, timeline) = (parts.next()?, u32::from_str_radix(&parts.next()?, 16).ok()?);
        Some((system, parts.next()?, timeline))
    };
    match (parts(one), parts(other)) {
        (Some(one), Some(other)) => (&one.0, &one.1) == (&other.0, &other.1) && one.2 < other.2,
        _ => false,
    }
}

/// Why the last round failed, by the memory's address; those of the others went well.
#[derive(Debug, Default)]
pub struct Troubles(Mutex<BTreeMap<String, Trouble>>);

impl Troubles {
    /// All there are.
    #[must_use]
    pub fn all(&self) -> BTreeMap<String, Trouble> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What it was before.
    fn set(&self, address: &str, trouble: Option<Trouble>) -> Option<Trouble> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match trouble {
            Some(trouble) => all.insert(address.to_owned(), trouble),
            None => all.remove(address),
        }
    }
}

/// Keeps the memories of a cache current.
#[derive(Debug)]
pub struct Rounds {
    cache: AnyCache,
    feed: AnyFeed,
    pace: Pace,
    metrics: Arc<Metrics>,
    troubles: Arc<Troubles>,
}

/// Keeps one memory current.
struct Keeper<'a> {
    rounds: &'a Rounds,
    node: AnyNode,
}

impl Rounds {
    /// Rounds from `feed` to all that `cache` consists of. `troubles` says why the last ones failed, for people.
    #[must_use]
    pub fn new(cache: AnyCache, feed: AnyFeed, pace: Pace, metrics: Arc<Metrics>, troubles: Arc<Troubles>) -> Self {
        Self { cache, feed, pace, metrics, troubles }
    }

    /// Runs for as long as the service does.
    pub async fn run(self) {
        tokio::join!(self.keep_all_current(), self.sweep(), self.watch_decoder());
    }

    /// One keeper for each memory, for as long as it is one.
    async fn keep_all_current(&self) {
        let mut kept: HashMap<u64, (String, AbortHandle)> = HashMap::new();
        let mut keepers = FuturesUnordered::new();
        loop {
            // Before they are looked at: no change is missed.
            let mut changed = self.cache.changed();
            let mut nodes: HashMap<u64, AnyNode> = self.cache.nodes().into_iter().collect();
            kept.retain(|number, (address, keeper)| {
                let stays = nodes.remove(number).is_some();
                if !stays {
                    keeper.abort();
                    self.troubles.set(address, None);
                }
                stays
            });
            for (number, node) in nodes {
                let address = node.address().to_owned();
                let (keeper, handle) = abortable(async move { Keeper { rounds: self, node }.keep_current().await });
                kept.insert(number, (address, handle));
                keepers.push(keeper);
            }
            loop {
                tokio::select! {
                    () = &mut changed => break,
                    // Only those end that were aborted.
                    Some(_) = keepers.next() => {}
                }
            }
        }
    }

    /// Tells in metrics how far behind the decoder is, where there is one.
    async fn watch_decoder(&self) {
        loop {
            match self.feed.decoder_lag().await {
                Ok(Some((lag, retained))) => self.metrics.replication_slot(lag, retained),
                Ok(None) => {}
                Err(error) => tracing::debug!(%error, "how far the decoder is behind is not known"),
            }
            tokio::time::sleep(WATCH).await;
        }
    }

    /// Drops what nobody needs from the outbox, now and then.
    async fn sweep(&self) {
        loop {
            tokio::time::sleep(SWEEP.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            let swept = async {
                self.feed.sweep().await?;
                self.metrics.outbox_rows(self.feed.rows().await?);
                Ok::<_, StoreError>(())
            };
            if let Err(error) = swept.await {
                tracing::debug!(%error, "the outbox was not swept");
                self.metrics.error("outbox", error.kind());
            }
        }
    }
}

impl Keeper<'_> {
    async fn keep_current(&self) {
        let Rounds { pace, metrics, troubles, .. } = self.rounds;
        let cache = self.node.address();
        // When the watermark was taken that this process set last.
        let mut mine = 0;
        let mut random = Duration::ZERO;
        loop {
            match self.turn(&mut mine, random).await {
                Ok(ran) => {
                    if let Some(before) = troubles.set(cache, None) {
                        tracing::info!(cache, after = %before, "the cache is kept up to date again");
                    }
                    if !ran {
                        random = pace.step_in.mul_f64(fastrand::f64() / 2.0);
                    }
                    tokio::time::sleep(if ran { pace.period } else { pace.watch }).await;
                }
                Err(trouble) => {
                    if troubles.set(cache, Some(trouble.clone())) != Some(trouble.clone()) {
                        tracing::warn!(cache, error = %trouble, "a round failed; trying again");
                    }
                    let kind = match &trouble {
                        Trouble::Newer => "newer",
                        Trouble::Cache(error) => error.kind(),
                        Trouble::Store(error) => error.kind(),
                    };
                    metrics.error("rounds", kind);
                    tokio::time::sleep(pace.watch.mul_f64(0.5 + fastrand::f64())).await;
                }
            }
        }
    }

    /// Looks, and runs a round where it is this process's turn; whether it was.
    async fn turn(&self, mine: &mut u64, random: Duration) -> Result<bool, Trouble> {
        let looked = self.node.look().await?;
        let control = &looked.control;
        let age = Duration::from_millis(looked.now.saturating_sub(control.taken));
        let changed = control.point.is_empty() || control.ids != looked.ids;
        // Whoever runs them is connected to a primary that was replaced.
        let overtaken = is_former(&control.origin, &self.rounds.feed.origin());
        let late = changed || overtaken || control.taken > looked.now || age > self.rounds.pace.step_in + random;
        if *mine != control.taken && !late {
            return Ok(false);
        }
        let began = Instant::now();
        if self.round(&looked).await? {
            *mine = looked.now;
            tracing::trace!(took = ?began.elapsed(), "a round");
            return Ok(true);
        }
        *mine = 0;
        Ok(false)
    }

    async fn round(&self, looked: &Looked) -> Result<bool, Trouble> {
        if looked.control.is_newer {
            return Err(Trouble::Newer);
        }
        // Another configuration's changes may come from the log, though this one's come from triggers.
        let late = looked.control.mappings.values().any(|mapping| mapping.late);
        let owed = self.rounds.feed.owed(looked.control.since(), &looked.control.origin, late).await;
        // Only silence is an outage; a "no" (no outbox, no right to it) is a reason to go past the cache.
        self.node.database_answers(!owed.as_ref().is_err_and(StoreError::is_outage));
        let owed = owed?;
        if owed.origin.is_empty() {
            let words = "it follows another database, and may be behind it".to_owned();
            self.node.database_answers(false);
            return Err(StoreError::Unavailable(words).into());
        }
        let age = Duration::from_millis(looked.now.saturating_sub(looked.control.taken));
        if is_former(&owed.origin, &looked.control.origin) && age < FORMER {
            // A primary that was replaced and does not know it: what is cached is newer than what it says.
            self.node.database_answers(true);
            return Err(StoreError::Refused("this database was replaced by one of a later timeline".into()).into());
        }
        let mut step = Step { point: owed.point, origin: owed.origin, ..Step::default() };
        step.anew = !owed.complete || step.origin != looked.control.origin || looked.control.epoch == 0;
        let mut counts = Vec::new();
        if !step.anew {
            let mut plan = plan(looked.control.mappings.values(), &owed.changes);
            plan.drop.values_mut().for_each(|keys| keys.retain(|key| self.node.concerns(looked, key)));
            step.drop = plan.keys(false).cloned().collect();
            step.spare = plan.keys(true).cloned().collect();
            step.renew = plan.renew.iter().cloned().collect();
            counts = plan.drop.into_iter().map(|(resource, keys)| (resource, keys.len() as u64)).collect();
            counts.extend(plan.renew.into_iter().map(|resource| (resource, 1)));
        }
        let moved = self.node.advance(looked, &step).await?;
        if moved {
            if step.anew {
                tracing::info!("what the cache missed is not known: everything in it is absent from now on");
            }
            for (resource, entries) in counts {
                self.rounds.metrics.invalidated_by_round(&resource, entries);
            }
            for change in &owed.changes {
                self.rounds.metrics.invalidation_lag(change.age);
            }
        }
        Ok(moved)
    }
}

#[cfg(test)]
mod tests {
    use super::is_former;

    #[test]
    fn only_an_earlier_timeline_of_the_same_database_is_a_former_life() {
        assert!(is_former("1:00000001:5:a", "1:0000000A:5:b"));
        for (one, other) in [
            ("1:00000002:5:a", "1:00000001:5:a"),
            ("1:00000001:5:a", "1:00000001:5:b"),
            ("1:00000001:5:a", "2:00000002:5:a"),
            ("", "1:00000001:5:a"),
            ("1:x:5:a", ""),
        ] {
            assert!(!is_former(one, other), "{one} {other}");
        }
    }
}
