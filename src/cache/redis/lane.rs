//! What a lane is here: a multiplexed connection, and what its looks find.
//!
//! A look reads the control key, the server's identity and its clock. What is read over the lane is trusted until
//! `max_staleness` after the moment the memory was last known to be current. A lane whose looks fail is thrown away with its
//! connection, because a dead multiplexed connection never recovers by itself.

use std::pin::pin;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use deadpool_redis::Connection;
use redis::Pipeline;
use redis::aio::MultiplexedConnection;

use super::look::{Seen, look, register};
use super::shared::{Made, Peer, Shared};
use super::trust::{Clocks, Look};
use crate::cache::control::field;
use crate::cache::entry::Fence;
use crate::cache::lane::{Engine, Failed, PATIENCE, Standing, Wait, now_ms};
use crate::cache::slots::{self, Slots, Tenure};

/// A connection that answers.
pub(super) struct Live {
    pub(super) conn: MultiplexedConnection,
    pub(super) standing: Standing,
    /// When the watermark was taken that the last look found.
    taken: AtomicU64,
    clocks: Mutex<Clocks>,
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
            clocks: Mutex::default(),
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
        let (came, is_first) = (now_ms(), self.standing.deadlines().looked == 0);
        // A reply that lay unread for a while says less of the server's clock than those before it.
        let is_late = came.saturating_sub(seen.sent) > u64::try_from(shared.timeout.as_millis()).unwrap_or(u64::MAX);
        if is_first || !is_late {
            let middle = seen.sent.midpoint(came);
            self.clock.store(seen.now.cast_signed().wrapping_sub(middle.cast_signed()), Ordering::Relaxed);
        }
        let until = self.judge(shared, &seen, came, is_late);
        self.standing.learn(seen.sent, seen.control, until);
    }

    /// Until when what is here is current enough, and until when it is known to be what it says.
    fn judge(&self, shared: &Shared, seen: &Seen, came: u64, is_late: bool) -> (u64, u64) {
        if self.is_another_member(shared, seen) {
            return (0, 0);
        }
        let looked = Standing::known_after(seen.sent);
        let Some(max_staleness) = shared.max_staleness else { return (looked, looked) };
        let control = &seen.control;
        let unknown = seen.holdings.is_some() && control.tenure.is_none();
        if control.epoch == 0 || control.point.is_empty() || control.ids != seen.ids || unknown {
            // An old dump, or a server that was promoted without all that its master had: the next round finds out.
            self.taken.store(0, Ordering::Relaxed);
            return (0, 0);
        }
        let moved = self.taken.swap(control.taken, Ordering::Relaxed) != control.taken;
        let look = Look { sent: seen.sent, came, is_late, now: seen.now, taken: control.taken };
        let mut clocks = self.clocks.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(age) = clocks.learn(look, moved) else { return (0, looked) };
        let trust = seen.sent.saturating_add(max_staleness).saturating_sub(age);
        // The same watermark gives no more time than it gave before, whatever the server's clock did.
        let trust = if moved { trust } else { trust.min(self.standing.deadlines().trust) };
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
            let mut wait = Wait::new(self.timeout);
            if follow(self, live, seen, &mut wait).await.map_err(|error| judge(live, error).unless(wait))? {
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

/// What follows from a look; false: another look does. `wait` begins anew with each round trip.
async fn follow(shared: &Shared, live: &Live, seen: Seen, wait: &mut Wait) -> anyhow::Result<bool> {
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
    live.learn(shared, seen);
    let control = live.standing.control.load_full();
    shared.deliver(&mut conn, &control, wait).await?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Weak};
    use std::time::Duration;

    use tokio::task::yield_now;
    use tokio::time::advance;

    use super::super::fake::{Fake, TIMEOUT};
    use super::super::look::Seen;
    use super::super::shared::{Door, Member, Shared};
    use super::{Live, looked};
    use crate::cache::control::{Control, Ids};
    use crate::cache::lane::{Engine, Failed, now_ms};
    use crate::cache::slots::{self, Holdings, Slots, Tenure};

    /// How far the server's clock is ahead.
    const AHEAD: u64 = 60_000;

    /// All that waits finds its time over, and nothing more has come.
    async fn stand_still(time: Duration) {
        advance(time).await;
        for _ in 0..10 {
            yield_now().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_when_a_process_that_stood_still_goes_on_was_in_time() {
        let mut fake = Fake::start("HGETALL");
        let shared = fake.shared(None);
        let (_link, live) = Engine::connect(&*shared).await.expect("it is there");
        let (seen, ()) = tokio::join!(looked(&shared, &live), async {
            fake.heard().await;
            stand_still(Duration::from_mins(1)).await;
            fake.answer();
        });
        assert!(seen.is_ok(), "{:?}", seen.err());
    }

    /// What becomes of a turn that delivers what is owed, of whose round trips each takes so long and the last is not
    /// answered.
    async fn delivering(times: &[Duration]) -> Result<(), Failed> {
        let mut fake = Fake::start("UNLINK");
        let shared = fake.shared(None);
        let (_link, live) = Engine::connect(&*shared).await.expect("it is there");
        let keys: Vec<String> = (0..times.len() * 1_000).map(|id| id.to_string()).collect();
        shared.debts.owe(&keys.iter().map(String::as_str).collect::<Vec<_>>(), false);
        let (outcome, ()) = tokio::join!(shared.turn(&live), async {
            for (number, time) in times.iter().enumerate() {
                if number > 0 {
                    fake.answer();
                }
                fake.heard().await;
                stand_still(*time).await;
            }
        });
        outcome
    }

    #[tokio::test(start_paused = true)]
    async fn what_follows_from_a_look_may_be_late_because_this_process_stood_still() {
        let late = TIMEOUT + Duration::from_millis(10);
        assert!(matches!(delivering(&[late]).await, Err(Failed::TimedOut)), "it was the server");
        assert!(matches!(delivering(&[TIMEOUT * 2]).await, Err(Failed::StoodStill)), "it was this process");
        assert!(matches!(delivering(&[TIMEOUT / 4 * 3, late]).await, Err(Failed::TimedOut)), "each has its time");
    }

    /// A look that was sent then, while the server's clock was so far ahead, finds what was taken just before.
    fn seen(sent: u64, ahead: u64) -> Seen {
        let (now, ids) = (sent + ahead, Ids { run: "one".to_owned(), replication: "one".to_owned() });
        let control =
            Control { epoch: 1, point: "1".to_owned(), taken: now - 1, ids: ids.clone(), ..Control::default() };
        Seen { control, ids, holdings: None, now, sent }
    }

    /// Connected, with a first look that was in time.
    async fn followed(fake: &Fake) -> (Arc<Shared>, Live) {
        let shared = fake.shared(Some(Duration::from_secs(1)));
        let (_link, live) = Engine::connect(&*shared).await.expect("it is there");
        live.learn(&shared, seen(now_ms(), AHEAD));
        (shared, live)
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_that_lay_unread_hides_no_step_of_the_servers_clock() {
        let (shared, live) = followed(&Fake::start("nothing")).await;
        std::thread::sleep(Duration::from_millis(2));
        live.learn(&shared, seen(now_ms(), AHEAD));
        let late = seen(now_ms(), AHEAD);
        // By now the clock has been set back by most of the time that has passed.
        std::thread::sleep(TIMEOUT * 3);
        live.learn(&shared, late);
        live.learn(&shared, seen(now_ms(), AHEAD - 250));
        assert_eq!(live.standing.deadlines().trust, 0, "nobody knows how old that is");
    }
    #[tokio::test(start_paused = true)]
    async fn a_node_that_has_come_to_have_other_keys_of_its_own_is_not_trusted_for_a_moment() {
        let fake = Fake::start("nothing");
        let slots = |from: u16| {
            let mut slots = Slots::default();
            slots.add(from, from + 9);
            slots
        };
        let elected = slots::elect(&slots(0)).expect("it has slots");
        let member = Member { elected, tag: slots::tag(elected), cluster: Weak::new(), away: Arc::default() };
        let config = fake.config();
        let door = Door::new(&config, config.url.expose()).expect("sound");
        let shared = Shared::of_cluster(&config, Some(Duration::from_secs(1)), door, member).expect("sound");
        let (_link, live) = Engine::connect(&shared).await.expect("it is there");
        let look = |from| {
            let mut seen = seen(now_ms(), AHEAD);
            let holdings = Holdings { owned: slots(from), leaving: Slots::default() };
            seen.control.tenure = Some(Tenure::fresh(&holdings));
            seen.holdings = Some(holdings);
            live.learn(&shared, seen);
            let deadlines = live.standing.deadlines();
            (deadlines.trust > 0, deadlines.known > 0)
        };
        while look(0) != (true, true) {
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(look(20), (false, false));
    }
}
