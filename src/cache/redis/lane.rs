//! What a lane is here: a multiplexed connection, and what its looks find.
//!
//! A look reads the control key, the server's identity and its clock. What is read over the lane is trusted until
//! `max_staleness` after the moment the memory was last known to be current. A lane whose looks fail is thrown away with its
//! connection, because a dead multiplexed connection never recovers by itself.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use deadpool_redis::Connection;
use redis::Pipeline;
use redis::aio::MultiplexedConnection;

use super::look::{Seen, look, register};
use super::shared::{Made, Peer, Shared};
use crate::cache::control::field;
use crate::cache::entry::Fence;
use crate::cache::lane::{Engine, Failed, PATIENCE, Standing, Wait, now_ms};
use crate::cache::slots::{self, Slots, Tenure};

/// Two clocks that run alike may differ by this much between two looks, in milliseconds.
const DRIFT: u64 = 5;

/// A connection that answers.
pub(super) struct Live {
    pub(super) conn: MultiplexedConnection,
    pub(super) standing: Standing,
    /// When the watermark was taken that the last look found.
    taken: AtomicU64,
    /// Only a watermark that was taken later is believed: the server's time at the first look, or at the last one that
    /// found its clock set back.
    believed: AtomicU64,
    /// The server's time at the last look, and this process's when its reply was there; zero: no look yet.
    last_now: AtomicU64,
    last_seen: AtomicU64,
    /// The server's clock less this process's, in milliseconds.
    clock: AtomicI64,
    peer: Peer,
    pub(super) set_nx_get: bool,
    /// The slots that the node of a cluster had at the last look, and which of them names its own keys then.
    owned: ArcSwapOption<(Slots, Option<u16>)>,
}

impl Live {
    pub(super) fn new(made: &Made) -> Self {
        Self {
            conn: made.conn.clone(),
            standing: Standing::new(),
            taken: AtomicU64::new(0),
            believed: AtomicU64::new(0),
            last_now: AtomicU64::new(0),
            last_seen: AtomicU64::new(0),
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

    /// How far behind the database this memory is known to be at most, in milliseconds; `None`: nobody knows.
    pub(super) fn staleness(&self) -> Option<u64> {
        let taken = self.taken.load(Ordering::Relaxed);
        (taken > 0).then(|| self.cache_now().saturating_sub(taken))
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
        let (now, is_first) = (now_ms(), self.standing.deadlines().looked == 0);
        // A reply that lay unread for a while says less of the server's clock than those before it.
        let is_late = now.saturating_sub(seen.sent) > u64::try_from(shared.timeout.as_millis()).unwrap_or(u64::MAX);
        if is_first || !is_late {
            let middle = seen.sent.midpoint(now);
            self.clock.store(seen.now.cast_signed().wrapping_sub(middle.cast_signed()), Ordering::Relaxed);
        }
        let until = self.judge(shared, &seen, is_late);
        self.standing.learn(seen.sent, seen.control, until);
    }

    /// Until when what is here is current enough, and until when it is known to be what it says.
    fn judge(&self, shared: &Shared, seen: &Seen, is_late: bool) -> (u64, u64) {
        let looked = Standing::known_after(seen.sent);
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
        let last = self.last_now.load(Ordering::Relaxed);
        let passed = seen.sent.saturating_sub(self.last_seen.load(Ordering::Relaxed));
        // Between the server's time of a late reply and ours there may be all that this process missed: a step back as
        // long as that would not be seen.
        if !is_late {
            self.last_now.store(seen.now, Ordering::Relaxed);
            self.last_seen.store(now_ms(), Ordering::Relaxed);
        }
        if last == 0 || seen.now + DRIFT < last + passed {
            self.believed.store(seen.now, Ordering::Relaxed);
        }
        if control.taken <= self.believed.load(Ordering::Relaxed) || control.taken > seen.now {
            return (0, looked);
        }
        let trust = seen.sent.saturating_add(max_staleness).saturating_sub(seen.now - control.taken);
        // The same watermark gives no more time than it gave before, whatever the server's clock did.
        let trust = if before == control.taken { trust.min(self.standing.deadlines().trust) } else { trust };
        (trust, looked)
    }
}

impl Engine for Shared {
    type Live = Live;
    type Link = Connection;

    const PATIENCE: Duration = Duration::from_millis(50);

    fn pace(&self) -> Duration {
        Duration::from_millis(100)
    }

    fn standing(live: &Live) -> &Standing {
        &live.standing
    }

    async fn connect(&self) -> anyhow::Result<(Connection, Live)> {
        let made = self.connect().await?;
        let live = Live::new(&made);
        Ok((made.connection, live))
    }

    async fn turn(&self, live: &Live) -> Result<(), Failed> {
        // A server that evicts whatever it is given must not keep us here.
        for _ in 0..3 {
            let seen = looked(self, live).await?;
            let wait = Wait::new(self.timeout);
            if follow(self, live, seen).await.map_err(|error| judge(live, error).unless(wait))? {
                return Ok(());
            }
        }
        Err(judge(live, anyhow::anyhow!("the control key {} does not stay in the cache", self.control_key)))
    }

    async fn give_back(&self, live: &Live, held: &[(String, Fence)]) -> anyhow::Result<()> {
        let mut pipe = Pipeline::with_capacity(held.len());
        for (key, fence) in held {
            pipe.add_command(self.scripts.release(key, &fence.0));
        }
        let mut conn = live.conn.clone();
        // What nobody waits for may never be sent.
        conn.set_response_timeout(PATIENCE);
        conn.send_packed_commands(&pipe, 0, pipe.len()).await?;
        Ok(())
    }

    fn close(link: Connection, _: &Live) {
        // Out of the pool, or the pool would hand the dead connection out again.
        drop(Connection::take(link));
    }
}

/// What an error during a look says of its connection.
fn judge(live: &Live, error: anyhow::Error) -> Failed {
    match error.downcast_ref::<redis::RedisError>() {
        None => {
            // It follows another one, which may hold anything.
            live.standing.mistrust();
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
    // It is our own patience that ends it, also where all timers are overdue.
    conn.set_response_timeout(Duration::from_hours(1));
    let wait = Wait::new(shared.timeout);
    match wait.until(pin!(look(shared, &mut conn, &live.peer))).await {
        Some(seen) => seen.map_err(|error| judge(live, error)),
        None if wait.stood_still() => Err(Failed::StoodStill),
        None => Err(Failed::TimedOut),
    }
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
        live.standing.doubt();
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
        live.standing.doubt();
        return Ok(false);
    }
    let strange = live.is_another_member(shared, &seen);
    live.learn(shared, seen);
    if strange {
        live.standing.mistrust();
    }
    let control = live.standing.control.load_full();
    shared.deliver(&mut conn, &control).await?;
    Ok(true)
}
