//! A lane: one multiplexed connection in one runtime, and the supervisor that makes it, looks at it and replaces it.
//!
//! Every 100 ms the supervisor *looks*: it reads the control key, the server's identity and its clock. What is read over
//! the lane is trusted until `max_staleness` after the moment the memory was last known to be current; without looks, or
//! without rounds that move the watermark, the lane is of no use, so a hung server is noticed by the same means as changed
//! generations are. A lane whose looks fail is thrown away with its connection, because a dead multiplexed connection
//! never recovers by itself.

use std::pin::pin;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use deadpool_redis::Connection;
use redis::aio::MultiplexedConnection;
use tokio::sync::{Notify, watch};

use super::look::{Seen, look, register};
use super::shared::{Made, Peer, Shared};
use crate::cache::control::{Control, field};
use crate::cache::lane::{Failed, PATIENCE, Strikes, Wait, now_ms};
use crate::cache::slots::{self, Slots, Tenure};
use crate::shield::Breaker;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(100);
/// Between two looks while the lane is not trusted but may soon be.
const SOON: Duration = Duration::from_millis(15);
/// For so long after it was made, or told to look again, a lane is taken to become trusted soon, in milliseconds.
const HOPE: u64 = 500;
/// Without a watermark, what was read is trusted for this long after the last look was sent; with one, that is how long
/// what was seen of the server's identity is good for. In milliseconds.
const LOOKED: u64 = 1_000;
/// Two clocks that run alike may differ by this much between two looks, in milliseconds.
const DRIFT: u64 = 5;
/// So many timeouts in a row, with no answer between them, and the lane is not used until a look is answered. Fewer might be
/// one slow command that held up a handful of others; under load five come within the first `cache.timeout`, so that a
/// server that hangs costs one of those and not one for every read until trust ends.
const TIMEOUTS: u32 = 5;
/// Between two attempts to connect, at most.
const BACKOFF: Duration = Duration::from_millis(500);

static NUMBERS: AtomicU64 = AtomicU64::new(1);

/// A connection that answers.
pub(super) struct Live {
    pub(super) conn: MultiplexedConnection,
    pub(super) control: ArcSwap<Control>,
    /// Until when what is here is known to be current enough, in milliseconds of this process's clock.
    trust: AtomicU64,
    /// Until when this is known to be the memory that caught up, whatever it has missed since.
    known: AtomicU64,
    /// When the look was sent that gave the two. Stored after them, loaded before.
    looked: AtomicU64,
    /// When the watermark was taken that the last look found.
    taken: AtomicU64,
    /// Only a watermark that was taken later is believed: the server's time at the first look, or at the last one that
    /// found its clock set back.
    believed: AtomicU64,
    /// The server's time at the last look, and this process's when its reply was there; zero: no look yet.
    last_now: AtomicU64,
    last_seen: AtomicU64,
    /// When it was made, by this process's clock.
    made: u64,
    /// No other connection of this process has it.
    pub(super) number: u64,
    /// The server's clock less this process's, in milliseconds.
    clock: AtomicI64,
    peer: Peer,
    pub(super) set_nx_get: bool,
    /// The slots that the node of a cluster had at the last look, and which of them names its own keys then.
    owned: ArcSwapOption<(Slots, Option<u16>)>,
}

/// What is loaded before a command is sent, and compared when its reply is used.
#[derive(Clone, Copy)]
pub(super) struct Deadlines {
    pub(super) looked: u64,
    pub(super) trust: u64,
    pub(super) known: u64,
}

impl Live {
    pub(super) fn new(made: &Made) -> Self {
        Self {
            conn: made.conn.clone(),
            control: ArcSwap::default(),
            trust: AtomicU64::new(0),
            known: AtomicU64::new(0),
            looked: AtomicU64::new(0),
            taken: AtomicU64::new(0),
            believed: AtomicU64::new(0),
            last_now: AtomicU64::new(0),
            last_seen: AtomicU64::new(0),
            made: now_ms(),
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            clock: AtomicI64::new(0),
            peer: made.peer.clone(),
            set_nx_get: made.set_nx_get,
            owned: ArcSwapOption::empty(),
        }
    }

    /// The server's clock, in milliseconds.
    pub(super) fn cache_now(&self) -> u64 {
        now_ms().saturating_add_signed(self.clock.load(Ordering::Relaxed))
    }

    pub(super) fn deadlines(&self) -> Deadlines {
        let looked = self.looked.load(Ordering::Acquire);
        let (trust, known) = (self.trust.load(Ordering::Acquire), self.known.load(Ordering::Acquire));
        Deadlines { looked, trust, known }
    }

    /// Whether it is not trusted only because there was no time yet to look.
    pub(super) fn hopeful(&self, shared: &Shared) -> bool {
        let floor = shared.floor.load(Ordering::Acquire);
        let since = if floor == u64::MAX { 0 } else { self.made.max(floor) };
        now_ms().saturating_sub(since) < HOPE
    }

    /// How far behind the database this memory is known to be at most, in milliseconds; `None`: nobody knows.
    pub(super) fn staleness(&self) -> Option<u64> {
        let taken = self.taken.load(Ordering::Relaxed);
        (taken > 0).then(|| self.cache_now().saturating_sub(taken))
    }

    /// Nothing over this connection is of any use any more.
    fn mistrust(&self) {
        self.trust.store(0, Ordering::Release);
        self.known.store(0, Ordering::Release);
    }

    /// Whether the node of a cluster has come to have other keys of its own: others may use those already.
    fn is_another_member(&self, shared: &Shared, seen: &Seen) -> bool {
        let (Some(member), Some(now)) = (&shared.member, &seen.holdings) else { return false };
        let before = self.owned.load();
        if before.as_deref().is_none_or(|(owned, _)| *owned != now.owned) {
            let elected = slots::elect(&now.owned);
            self.owned.store(Some(Arc::new((now.owned.clone(), elected))));
        }
        let strange = self.owned.load().as_deref().is_none_or(|(_, elected)| *elected != Some(member.elected));
        if let Some(cluster) = shared.cluster().filter(|_| strange) {
            cluster.look_again();
        }
        strange
    }

    pub(super) fn learn(&self, shared: &Shared, seen: Seen) {
        let (now, is_first) = (now_ms(), self.looked.load(Ordering::Acquire) == 0);
        // A reply that lay unread for a while says less of the server's clock than those before it.
        if is_first || now.saturating_sub(seen.sent) <= u64::try_from(shared.timeout.as_millis()).unwrap_or(u64::MAX) {
            let middle = seen.sent.midpoint(now);
            self.clock.store(seen.now.cast_signed().wrapping_sub(middle.cast_signed()), Ordering::Relaxed);
        }
        let (trust, known) = self.judge(shared, &seen);
        self.control.store(Arc::new(seen.control));
        self.trust.store(trust, Ordering::Release);
        self.known.store(known, Ordering::Release);
        self.looked.store(seen.sent, Ordering::Release);
    }

    /// Until when what is here is current enough, and until when it is known to be what it says.
    fn judge(&self, shared: &Shared, seen: &Seen) -> (u64, u64) {
        let looked = seen.sent + LOOKED;
        let Some(max_staleness) = shared.max_staleness else { return (looked, looked) };
        let control = &seen.control;
        let unknown = seen.holdings.is_some() && control.tenure.is_none();
        if control.epoch == 0 || control.point.is_empty() || control.ids != seen.ids || unknown {
            // An old dump, or a server that was promoted without all that its master had: the next round finds out.
            self.taken.store(0, Ordering::Relaxed);
            return (0, 0);
        }
        let before = self.taken.swap(control.taken, Ordering::Relaxed);
        // Clocks step. What was taken before this connection's first look, or before a step back, says nothing of its age.
        let last = self.last_now.swap(seen.now, Ordering::Relaxed);
        let passed = seen.sent.saturating_sub(self.last_seen.swap(now_ms(), Ordering::Relaxed));
        if last == 0 || seen.now + DRIFT < last + passed {
            self.believed.store(seen.now, Ordering::Relaxed);
        }
        if control.taken <= self.believed.load(Ordering::Relaxed) || control.taken > seen.now {
            return (0, looked);
        }
        let trust = seen.sent.saturating_add(max_staleness).saturating_sub(seen.now - control.taken);
        // The same watermark gives no more time than it gave before, whatever the server's clock did.
        let trust = if before == control.taken { trust.min(self.trust.load(Ordering::Acquire)) } else { trust };
        (trust, looked)
    }
}

/// The place of a connection; empty while there is none, and while its breaker is open: nobody but the supervisor then uses
/// the connection that there may be.
pub(super) struct Lane {
    pub(super) live: ArcSwapOption<Live>,
    /// Fed by operations and looks; a look that is answered is its probe.
    pub(super) breaker: Breaker,
    /// When something was answered last, in milliseconds of this process's clock.
    answered: AtomicU64,
    /// Rings when a request finds the connection dead, or wants it to be looked at.
    pub(super) wake: Notify,
    /// Counts looks, and attempts to connect.
    turns: watch::Sender<u64>,
}

impl Lane {
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
    fn answers(&self, live: &Arc<Live>) {
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

    /// Whether nobody knows yet if there is a server.
    pub(super) fn untried(&self) -> bool {
        *self.turns.borrow() == 0
    }

    /// Opens a lane in the current runtime.
    pub(super) fn open(shared: &Arc<Shared>) -> Arc<Self> {
        let lane = Arc::new(Self {
            live: ArcSwapOption::empty(),
            breaker: Breaker::open(TIMEOUTS),
            answered: AtomicU64::new(0),
            wake: Notify::new(),
            turns: watch::Sender::new(0),
        });
        let (shared, weak) = (Arc::clone(shared), Arc::downgrade(&lane));
        tokio::spawn(async move {
            let mut failures = 0_u32;
            while weak.strong_count() > 0 {
                match connect(&shared).await {
                    Ok((made, live)) => {
                        let live = Arc::new(live);
                        let Some(lane) = weak.upgrade() else { break };
                        lane.answers(&live);
                        lane.turns.send_modify(|turns| *turns += 1);
                        drop(lane);
                        tracing::info!(cache = shared.address, "connected to the cache");
                        failures = 0;
                        let reason = keep_looking(&shared, &live, &weak).await;
                        if let Some(lane) = weak.upgrade() {
                            lane.lost();
                            tracing::warn!(cache = shared.address, reason, "lost the cache; reads go to the database");
                        }
                        // Out of the pool, or the pool would hand the dead connection out again.
                        drop(Connection::take(made.connection));
                    }
                    Err(error) => {
                        if failures == 0 {
                            tracing::warn!(cache = shared.address, %error, "can't reach the cache; trying again");
                        }
                        failures += 1;
                        if let Some(lane) = weak.upgrade() {
                            lane.turns.send_modify(|turns| *turns += 1);
                        }
                    }
                }
                let pause = BACKOFF.min(Duration::from_millis(20 << failures.min(5)));
                tokio::time::sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            }
        });
        lane
    }
}

async fn connect(shared: &Shared) -> anyhow::Result<(Made, Live)> {
    let made = shared.connect().await?;
    let live = Live::new(&made);
    match turn(shared, &live).await {
        Ok(()) => Ok((made, live)),
        Err(failed) => {
            drop(Connection::take(made.connection));
            Err(failed.into())
        }
    }
}

/// Looks until the connection is of no use any more, and says why.
async fn keep_looking(shared: &Shared, live: &Arc<Live>, lane: &Weak<Lane>) -> &'static str {
    let mut strikes = Strikes::default();
    loop {
        let now = now_ms();
        let pause = if live.deadlines().trust < now && live.hopeful(shared) { SOON } else { LOOK };
        {
            let Some(strong) = lane.upgrade() else { return "not needed any more" };
            tokio::select! {
                () = strong.wake.notified() => {}
                () = shared.look_now.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
        let outcome = turn(shared, live).await;
        if let Some(lane) = lane.upgrade() {
            match &outcome {
                Ok(()) => lane.answers(live),
                Err(Failed::TimedOut) => lane.timed_out(),
                Err(_) => {}
            }
            lane.turns.send_modify(|turns| *turns += 1);
        }
        match outcome {
            Ok(()) => strikes = Strikes::default(),
            Err(failed) => {
                tracing::debug!(cache = shared.address, error = %failed, ?strikes, "a look at the cache failed");
                if let Some(reason) = strikes.add(&failed) {
                    return reason;
                }
            }
        }
    }
}

/// What an error during a look says of its connection.
fn judge(live: &Live, error: anyhow::Error) -> Failed {
    match error.downcast_ref::<redis::RedisError>() {
        None => {
            // It follows another one, which may hold anything.
            live.mistrust();
            Failed::Over { reason: "it is not the master, or its control key can't be kept", error }
        }
        Some(of) if of.is_timeout() => Failed::TimedOut,
        Some(of) if of.is_unrecoverable_error() => Failed::Over { reason: "the connection broke", error },
        Some(_) => Failed::Refused(error),
    }
}

/// One look. What is there when a process that stood still goes on was in time.
pub(super) async fn looked(shared: &Shared, live: &Live) -> Result<Seen, Failed> {
    let mut conn = live.conn.clone();
    // It is our own patience that ends first.
    conn.set_response_timeout(shared.timeout + PATIENCE);
    let wait = Wait::new(shared.timeout);
    match wait.until(pin!(look(shared, &mut conn, &live.peer))).await {
        Some(seen) => seen.map_err(|error| judge(live, error)),
        None if wait.stood_still() => Err(Failed::StoodStill),
        None => Err(Failed::TimedOut),
    }
}

/// One look and all that follows from it.
async fn turn(shared: &Shared, live: &Live) -> Result<(), Failed> {
    // A server that evicts whatever it is given must not keep us here.
    for _ in 0..3 {
        let seen = looked(shared, live).await?;
        if follow(shared, live, seen).await.map_err(|error| judge(live, error))? {
            return Ok(());
        }
    }
    Err(judge(live, anyhow::anyhow!("the control key {} does not stay in the cache", shared.control_key)))
}

/// What follows from a look; false: another look does.
async fn follow(shared: &Shared, live: &Live, seen: Seen) -> anyhow::Result<bool> {
    let mut conn = live.conn.clone();
    let before = seen.control.tenure.as_ref();
    let next = seen.holdings.as_ref().map(|now| Tenure::next(before, now));
    let moved = next.as_ref().is_some_and(|next| next.is_none() || next.as_ref() != before);
    if shared.max_staleness.is_none() && (seen.control.epoch == 0 || seen.control.ids != seen.ids || moved) {
        // New, flushed or evicted: whatever generations it had are forgotten. Another life of the server: it may have
        // come back with what was invalidated. Either way nothing older may count, and the next turn finds the new
        // epoch.
        live.trust.store(0, Ordering::Release);
        let mut renew = redis::cmd("HSET");
        renew.arg(&shared.control_key);
        let same = seen.control.epoch != 0 && seen.control.ids == seen.ids;
        let kept = next.flatten().filter(|_| same);
        if !same || kept.is_none() {
            renew.arg(field::EPOCH).arg(fastrand::u64(1..));
        }
        if let Some(tenure) = kept.or_else(|| seen.holdings.as_ref().map(Tenure::fresh)) {
            renew.arg(field::HELD).arg(tenure.held.to_string());
            renew.arg(field::LOST).arg(tenure.lost.to_string());
        }
        renew.arg(field::RUN).arg(&seen.ids.run).arg(field::REPLICATION).arg(&seen.ids.replication);
        let () = renew.query_async(&mut conn).await?;
        return Ok(false);
    }
    if shared.max_staleness.is_some() && register(shared, &mut conn, &seen).await? {
        live.trust.store(0, Ordering::Release);
        return Ok(false);
    }
    let strange = live.is_another_member(shared, &seen);
    live.learn(shared, seen);
    if strange {
        live.mistrust();
    }
    let control = live.control.load_full();
    shared.deliver(&mut conn, &control).await?;
    Ok(true)
}
