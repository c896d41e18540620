//! A lane: one connection in one runtime, and the supervisor that makes it, looks at it and replaces it.
//!
//! What is read over the lane is trusted only as far as its last looks say; what those find, and until when that is good for,
//! is each engine's own to judge ([`Engine`]). Without looks, or without rounds that move the watermark, the lane is of no
//! use, so a hung server is noticed by the same means as changed generations are.

mod asked;
mod clock;
mod common;
mod debts;
mod failed;
mod returns;
mod standing;
mod supervisor;

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use tokio::sync::{Notify, watch};

pub(super) use self::asked::Asked;
pub(super) use self::clock::{Wait, now_ms};
pub(super) use self::common::Common;
pub(super) use self::debts::Debts;
#[cfg(feature = "redis")]
pub(super) use self::debts::OWED_MAX;
pub(super) use self::failed::Failed;
pub(super) use self::returns::{PATIENCE, Returns};
pub(super) use self::standing::{Deadlines, Standing};
use super::CacheError;
use super::entry::Fence;
use crate::shield::Breaker;

/// So many timeouts in a row, with no answer between them, and the lane is not used until a look is answered. Fewer might be
/// one slow command that held up a handful of others; under load five come within the first `cache.timeout`, so that a
/// server that hangs costs one of those and not one for every read until trust ends.
const TIMEOUTS: u32 = 5;

/// What all lanes of a process to one server have in common, and what tells one engine's lanes from another's.
pub(super) trait Engine: Deref<Target = Common> + Send + Sync + Sized + 'static {
    /// A connection that answers.
    type Live: Send + Sync + 'static;
    /// What must be kept, and let go, with it.
    type Link: Send;

    /// How long a read waits for a lane that is about to be trusted.
    const PATIENCE: Duration;

    /// Between two looks, at most.
    fn pace(&self) -> Duration;

    /// What the looks over a connection have found.
    fn standing(live: &Self::Live) -> &Standing;

    /// Makes a connection.
    fn connect(&self) -> impl Future<Output = anyhow::Result<(Self::Link, Self::Live)>> + Send;

    /// One look and all that follows from it.
    fn turn(&self, live: &Self::Live) -> impl Future<Output = Result<(), Failed>> + Send;

    /// Gives leases back by their fences, over the connection that they were asked for on.
    fn give_back(&self, live: &Self::Live, held: &[(String, Fence)])
    -> impl Future<Output = anyhow::Result<()>> + Send;

    /// Ends a connection, whoever still waits for a reply.
    fn close(link: Self::Link, live: &Self::Live);
}

/// The place of a connection; empty while there is none, and while its breaker is open: nobody but the supervisor then uses
/// the connection that there may be.
pub(super) struct Lane<E: Engine> {
    engine: Arc<E>,
    pub(super) live: ArcSwapOption<E::Live>,
    /// Fed by operations and looks; a look that is answered is its probe.
    pub(super) breaker: Breaker,
    /// When something was answered last, in milliseconds of this process's clock.
    answered: AtomicU64,
    /// Rings when a request finds the connection dead, or wants it to be looked at.
    pub(super) wake: Notify,
    /// Counts looks, and attempts to connect.
    turns: watch::Sender<u64>,
}

impl<E: Engine> Lane<E> {
    /// Opens a lane in the current runtime.
    pub(super) fn open(engine: &Arc<E>) -> Arc<Self> {
        let lane = Arc::new(Self {
            engine: Arc::clone(engine),
            live: ArcSwapOption::empty(),
            breaker: Breaker::open(TIMEOUTS),
            answered: AtomicU64::new(0),
            wake: Notify::new(),
            turns: watch::Sender::new(0),
        });
        tokio::spawn(supervisor::supervise(Arc::clone(engine), Arc::downgrade(&lane)));
        lane
    }

    /// Waits for the next look, or the end of the first attempt to connect.
    pub(super) async fn turned(&self, patience: Duration, enough: impl Fn(&Self) -> bool) {
        let mut turns = self.turns.subscribe();
        let waiting = async {
            while !enough(self) {
                if turns.changed().await.is_err() {
                    break;
                }
            }
        };
        // Either way, what counts is how things are then.
        let _ = tokio::time::timeout(patience, waiting).await;
    }

    /// The connection. A lane that is new is given the time of one operation to open: the first requests after a
    /// start need not go past a cache that is there.
    pub(super) async fn live(&self) -> Result<Arc<E::Live>, CacheError> {
        if let Some(live) = self.live.load_full() {
            return Ok(live);
        }
        if self.untried() {
            self.turned(self.engine.timeout, |lane| !lane.untried()).await;
        }
        self.live.load_full().ok_or(CacheError::Disconnected)
    }

    /// The connection and its deadlines, loaded before anything is sent. One that will be trusted after its next look is
    /// looked at.
    pub(super) async fn ready(&self) -> Result<(Arc<E::Live>, Deadlines), CacheError> {
        let live = self.live().await?;
        let (standing, debts) = (E::standing(&live), &self.engine.debts);
        let deadlines = standing.deadlines();
        if debts.verified(deadlines).is_ok() || !standing.is_hopeful(debts) {
            return Ok((live, deadlines));
        }
        self.wake.notify_one();
        self.turned(self.engine.timeout.min(E::PATIENCE), |lane| lane.health().is_ok()).await;
        let live = self.live().await?;
        let deadlines = E::standing(&live).deadlines();
        Ok((live, deadlines))
    }

    /// Whether it is connected and trusted.
    ///
    /// # Errors
    ///
    /// What it is not.
    pub(super) fn health(&self) -> Result<(), CacheError> {
        let live = self.live.load();
        let live = live.as_ref().ok_or(CacheError::Disconnected)?;
        self.engine.debts.verified(E::standing(live).deadlines()).map(drop)
    }

    /// Waits until it is trusted, or known to have no connection, for `patience` at most.
    pub(super) async fn settled(&self, patience: Duration) {
        let away = |lane: &Self| !lane.untried() && lane.live.load().is_none();
        self.turned(patience, |lane| lane.health().is_ok() || away(lane)).await;
    }

    /// An operation was answered.
    pub(super) fn answered(&self) {
        self.answered.store(now_ms(), Ordering::Relaxed);
        self.breaker.answered();
    }

    /// Whether anything was answered since.
    pub(super) fn answered_since(&self, moment: Instant) -> bool {
        let ago = u64::try_from(moment.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.answered.load(Ordering::Relaxed) >= now_ms().saturating_sub(ago)
    }

    /// An operation that somebody began to wait for then was not answered in time.
    pub(super) fn missed(&self, wait: Wait) {
        if !wait.stood_still() {
            self.timed_out();
        }
    }

    /// Whether nobody knows yet if there is a server.
    pub(super) fn untried(&self) -> bool {
        *self.turns.borrow() == 0
    }

    /// An operation or a look was not answered in time.
    fn timed_out(&self) {
        if self.breaker.failed() {
            // Should a new connection have taken the place just now, its next look puts it back.
            self.live.store(None);
            self.wake.notify_one();
            tracing::debug!("the cache does not answer in time: it is not asked until a look is answered");
        }
    }

    /// A look was answered.
    fn answers(&self, live: &Arc<E::Live>) {
        self.answered.store(now_ms(), Ordering::Relaxed);
        self.breaker.probed();
        if self.live.load().is_none() {
            self.live.store(Some(Arc::clone(live)));
        }
    }

    fn lost(&self) {
        self.breaker.lost();
        self.live.store(None);
    }
}
