//! What a lane is here: a connection, and what its looks find.
//!
//! A look reads the control key: from its number and those that were seen before follows until when what is read over this
//! connection is current enough (see `trust`).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::connection::Connection;
use super::locks::{Locks, Tickets};
use super::look::{Seen, look, register, write};
use super::shared::Shared;
use super::steps;
use super::trust::Numbers;
use crate::cache::control::field;
use crate::cache::entry::{self, Fence};
use crate::cache::lane::{Engine, Failed, PATIENCE, Standing, Wait, now_ms};
use crate::cache::{CacheError, Place};

/// Between two looks, at most.
const LOOK: Duration = Duration::from_millis(100);

/// A connection that answers.
pub(super) struct Live {
    pub(super) connection: Connection,
    pub(super) standing: Standing,
    /// The moment after which the snapshot was taken that is here; zero: nobody knows.
    taken: AtomicU64,
    numbers: Mutex<Numbers>,
    /// The leases that were given over it.
    pub(super) tickets: Tickets,
    /// The locks of others that were seen over it.
    pub(super) locks: Locks,
}

impl Live {
    fn new(connection: Connection) -> Self {
        Self {
            connection,
            standing: Standing::new(),
            taken: AtomicU64::new(0),
            numbers: Mutex::default(),
            tickets: Tickets::default(),
            locks: Locks::default(),
        }
    }

    /// What an entry must have been stored under to be of any use here now.
    pub(super) fn tag(&self, place: &Place<'_>, groups: &[u64]) -> u64 {
        let control = self.standing.control.load();
        entry::tag(place.shape, control.epoch, control.generation(place.resource), groups)
    }

    /// How far behind the database this memory is known to be at most, in milliseconds; `None`: nobody knows.
    pub(super) fn staleness(&self) -> Option<u64> {
        let taken = self.taken.load(Ordering::Relaxed);
        (taken > 0).then(|| now_ms().saturating_sub(taken))
    }

    fn learn(&self, shared: &Shared, seen: Seen) {
        let until = self.judge(shared, &seen);
        self.standing.learn(seen.sent, seen.control, until);
    }

    /// Until when what is here is current enough, and until when it is known to be what it says.
    fn judge(&self, shared: &Shared, seen: &Seen) -> (u64, u64) {
        let looked = Standing::known_after(seen.sent);
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

impl Engine for Shared {
    type Live = Live;
    type Link = ();

    /// About two rounds.
    const PATIENCE: Duration = Duration::from_millis(150);

    fn pace(&self) -> Duration {
        // A fixed share of what a hit may be behind.
        self.max_staleness.map_or(LOOK, |longest| LOOK.min(Duration::from_millis((longest / 10).max(5))))
    }

    fn standing(live: &Live) -> &Standing {
        &live.standing
    }

    async fn connect(&self) -> anyhow::Result<((), Live)> {
        Ok(((), Live::new(self.connect().await?)))
    }

    async fn turn(&self, live: &Live) -> Result<(), Failed> {
        // A server that evicts whatever it is given must not keep us here.
        for _ in 0..3 {
            let wait = Wait::new(self.timeout);
            let seen = look(self, &live.connection).await.map_err(|error| judge(live, error).unless(wait))?;
            let wait = Wait::new(self.timeout);
            if follow(self, live, seen).await.map_err(|error| judge(live, error).unless(wait))? {
                return Ok(());
            }
        }
        Err(judge(live, CacheError::Refused))
    }

    async fn give_back(&self, live: &Live, held: &[(String, Fence)]) -> anyhow::Result<()> {
        // What they wrote has numbers that nobody knows, so it is looked at once more.
        Ok(steps::give_back(self, live, held, PATIENCE).await?)
    }

    fn close((): (), live: &Live) {
        live.connection.close();
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

/// What follows from a look; false: another look does.
async fn follow(shared: &Shared, live: &Live, seen: Seen) -> Result<bool, CacheError> {
    if shared.max_staleness.is_none() && (seen.control.epoch == 0 || seen.control.ids != seen.ids) {
        // New, flushed or evicted: whatever generations it had are forgotten. Another life of the server: it may have kept
        // what was invalidated meanwhile. Either way nothing older may count, and the next turn finds the new epoch.
        live.standing.doubt();
        write(shared, &live.connection, &seen, |fields, _| {
            fields.insert(field::EPOCH.to_owned(), fastrand::u64(1..).to_string());
            fields.insert(field::RUN.to_owned(), seen.ids.run.clone());
            fields.insert(field::REPLICATION.to_owned(), seen.ids.replication.clone());
        })
        .await?;
        return Ok(false);
    }
    if shared.max_staleness.is_some() && register(shared, &live.connection, &seen).await? {
        live.standing.doubt();
        return Ok(false);
    }
    live.learn(shared, seen);
    shared.deliver(&live.connection).await?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;
    use std::time::Duration;

    use tokio::sync::mpsc;
    use tokio::task::yield_now;
    use tokio::time::advance;

    use super::Shared;
    use crate::cache::lane::{Engine, Failed};
    use crate::config::{self, SecretUrl};

    const TIMEOUT: Duration = Duration::from_millis(100);

    /// A server that has nothing, and tells when something is to be stored instead of answering. While its thread is at work,
    /// a paused clock is moved on by nobody else.
    fn fake() -> (u16, mpsc::UnboundedReceiver<()>) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port is free");
        let port = listener.local_addr().expect("it has one").port();
        let (tell, heard) = mpsc::unbounded_channel();
        tokio::task::spawn_blocking(move || {
            let (mut stream, _) = listener.accept().expect("somebody comes");
            let commands = BufReader::new(stream.try_clone().expect("it can be cloned"));
            for line in commands.lines().map_while(Result::ok) {
                let number = line.split(' ').find(|word| word.starts_with('O')).unwrap_or_default();
                let reply = match line.split(' ').next() {
                    Some("stats") => "STAT version 1.6.18\r\nEND\r\n".to_owned(),
                    Some("mg") => format!("EN {number}\r\n"),
                    Some("ms") => {
                        tell.send(()).expect("somebody listens");
                        continue;
                    }
                    _ => continue,
                };
                stream.write_all(reply.as_bytes()).expect("it is read");
            }
        });
        (port, heard)
    }

    /// What becomes of a turn whose look is answered, and what follows from it is not, for so long.
    async fn unanswered(time: Duration) -> Result<(), Failed> {
        let (port, mut heard) = fake();
        let url = SecretUrl::new(format!("memcached://127.0.0.1:{port}"));
        let config = config::Cache { url, timeout: TIMEOUT, ..config::Cache::default() };
        let shared = Shared::new(&config, None).expect("sound");
        let ((), live) = Engine::connect(&shared).await.expect("it is there");
        let (outcome, ()) = tokio::join!(shared.turn(&live), async {
            // There is no epoch yet.
            heard.recv().await.expect("it is told");
            // The second time is for what may be there, unread.
            for time in [time, TIMEOUT] {
                advance(time).await;
                for _ in 0..10 {
                    yield_now().await;
                }
            }
        });
        outcome
    }

    #[tokio::test(start_paused = true)]
    async fn what_follows_from_a_look_may_be_late_because_this_process_stood_still() {
        let late = TIMEOUT + Duration::from_millis(10);
        assert!(matches!(unanswered(late).await, Err(Failed::TimedOut)), "it was the server");
        assert!(matches!(unanswered(TIMEOUT * 2).await, Err(Failed::StoodStill)), "it was this process");
    }
}
