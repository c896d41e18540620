//! A lane: one connection in one runtime, and the supervisor that makes it, looks at it and replaces it.
//!
//! Every 100 ms the supervisor *looks*: it reads the control key, and from its number and those that it saw before it
//! knows until when what is read over this connection is current enough (see `trust`). Without looks, or without rounds that move
//! the watermark, the lane is of no use, so a hung server is noticed by the same means as changed generations are.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::sync::{Notify, watch};

use super::connection::Connection;
use super::locks::{Locks, Tickets};
use super::look::{Seen, look, register, write};
use super::shared::Shared;
use super::trust::Numbers;
use crate::cache::control::{Control, field};
use crate::cache::lane::{Failed, Strikes, Wait, now_ms};
use crate::cache::{CacheError, Place, entry};
use crate::shield::Breaker;

/// Between two looks, at most.
const LOOK: Duration = Duration::from_millis(100);
/// Between two looks while the lane is not trusted but may soon be.
const SOON: Duration = Duration::from_millis(15);
/// For so long after it was made, or told to look again, a lane is taken to become trusted soon, in milliseconds.
const HOPE: u64 = 500;
/// Without a watermark, what was read is trusted for this long after the last look was sent; with one, that is how long
/// what was seen of the server's identity is good for. In milliseconds.
const LOOKED: u64 = 1_000;
/// So many timeouts in a row, with no answer between them, and the lane is not used until a look is answered. Fewer might be
/// one slow command that held up a handful of others; under load five come within the first `cache.timeout`, so that a
/// server that hangs costs one of those and not one for every read until trust ends.
const TIMEOUTS: u32 = 5;
/// Between two attempts to connect, at most.
const BACKOFF: Duration = Duration::from_millis(500);

static NUMBERS: AtomicU64 = AtomicU64::new(1);

/// A connection that answers.
pub(super) struct Live {
    pub(super) connection: Connection,
    pub(super) control: ArcSwap<Control>,
    /// Until when what is here is known to be current enough, in milliseconds of this process's clock.
    trust: AtomicU64,
    /// Until when this is known to be the memory that caught up, whatever it has missed since.
    known: AtomicU64,
    /// When the look was sent that gave the two. Stored after them, loaded before.
    looked: AtomicU64,
    /// The moment after which the snapshot was taken that is here; zero: nobody knows.
    taken: AtomicU64,
    numbers: Mutex<Numbers>,
    /// The leases that were given over it.
    pub(super) tickets: Tickets,
    /// The locks of others that were seen over it.
    pub(super) locks: Locks,
    /// When it was made, by this process's clock.
    made: u64,
    /// No other connection of this process has it.
    pub(super) number: u64,
}

/// What is loaded before a command is sent, and compared when its reply is used.
#[derive(Clone, Copy)]
pub(super) struct Deadlines {
    pub(super) looked: u64,
    pub(super) trust: u64,
    pub(super) known: u64,
}

impl Live {
    fn new(connection: Connection) -> Self {
        Self {
            connection,
            control: ArcSwap::default(),
            trust: AtomicU64::new(0),
            known: AtomicU64::new(0),
            looked: AtomicU64::new(0),
            taken: AtomicU64::new(0),
            numbers: Mutex::default(),
            tickets: Tickets::default(),
            locks: Locks::default(),
            made: now_ms(),
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// What an entry must have been stored under to be of any use here now.
    pub(super) fn tag(&self, place: &Place<'_>, groups: &[u64]) -> u64 {
        let control = self.control.load();
        entry::tag(place.shape, control.epoch, control.generation(place.resource), groups)
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
        (taken > 0).then(|| now_ms().saturating_sub(taken))
    }

    fn learn(&self, shared: &Shared, seen: Seen) {
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
        let mut numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = numbers.learn(control.epoch, control.number, control.taken, seen.sent);
        if control.epoch == 0 || control.point.is_empty() || control.ids != seen.ids {
            // New, or another life of the server, which may have kept its data: the next round finds out what it missed.
            self.taken.store(0, Ordering::Relaxed);
            return (0, 0);
        }
        self.taken.store(taken.unwrap_or(0), Ordering::Relaxed);
        (taken.map_or(0, |taken| taken.saturating_add(max_staleness)), looked)
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
                    Ok(live) => {
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
                        live.connection.close();
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

async fn connect(shared: &Shared) -> anyhow::Result<Live> {
    let live = Live::new(shared.connect().await?);
    turn(shared, &live).await?;
    Ok(live)
}

/// Looks until the connection is of no use any more, and says why.
async fn keep_looking(shared: &Shared, live: &Arc<Live>, lane: &Weak<Lane>) -> &'static str {
    // A fixed share of what a hit may be behind.
    let calm = shared.max_staleness.map_or(LOOK, |longest| LOOK.min(Duration::from_millis((longest / 10).max(5))));
    let mut strikes = Strikes::default();
    loop {
        let pause = if live.deadlines().trust < now_ms() && live.hopeful(shared) { SOON.min(calm) } else { calm };
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
fn judge(live: &Live, error: CacheError) -> Failed {
    match error {
        _ if live.connection.is_closed() => Failed::Over { reason: "the connection broke", error: error.into() },
        CacheError::TimedOut => Failed::TimedOut,
        _ => Failed::Refused(error.into()),
    }
}

/// One look and all that follows from it.
async fn turn(shared: &Shared, live: &Live) -> Result<(), Failed> {
    // A server that evicts whatever it is given must not keep us here.
    for _ in 0..3 {
        let wait = Wait::new(shared.timeout);
        let seen = look(shared, &live.connection).await.map_err(|error| match judge(live, error) {
            Failed::TimedOut if wait.stood_still() => Failed::StoodStill,
            failed => failed,
        })?;
        if follow(shared, live, seen).await.map_err(|error| judge(live, error))? {
            return Ok(());
        }
    }
    Err(judge(live, CacheError::Refused))
}

/// What follows from a look; false: another look does.
async fn follow(shared: &Shared, live: &Live, seen: Seen) -> Result<bool, CacheError> {
    if shared.max_staleness.is_none() && (seen.control.epoch == 0 || seen.control.ids != seen.ids) {
        // New, flushed or evicted: whatever generations it had are forgotten. Another life of the server: it may have kept
        // what was invalidated meanwhile. Either way nothing older may count, and the next turn finds the new epoch.
        live.trust.store(0, Ordering::Release);
        write(shared, &live.connection, &seen, |fields, _| {
            fields.insert(field::EPOCH.to_owned(), fastrand::u64(1..).to_string());
            fields.insert(field::RUN.to_owned(), seen.ids.run.clone());
            fields.insert(field::REPLICATION.to_owned(), seen.ids.replication.clone());
        })
        .await?;
        return Ok(false);
    }
    if shared.max_staleness.is_some() && register(shared, &live.connection, &seen).await? {
        live.trust.store(0, Ordering::Release);
        return Ok(false);
    }
    live.learn(shared, seen);
    shared.deliver(&live.connection).await?;
    Ok(true)
}
