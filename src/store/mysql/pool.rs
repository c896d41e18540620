//! Connections that are kept, as many as there may be; whoever wants one waits in a queue of bounded length and time.
//!
//! The driver has a pool of its own. It takes back connections whose last user was cancelled, and waits for what is still
//! under way on them; here such a connection is given up, and what the server does on it is ended. Nor does it see that a
//! server has ended a connection before somebody uses it: so those that nobody used for a while are asked whether they live.
//!
//! Where the server has no room for one more, or refuses us, it is asked again only now and then; meanwhile whoever has a
//! permit and no connection waits for one of those that there are.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use mysql_async::prelude::Queryable;
use mysql_async::{Conn, Error};
use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tokio::time::Instant;
use tokio::time::error::Elapsed;

use super::close;
use super::connect::{Connector, Made};
use super::refusal::{Failure, out_of_reach};
use crate::config;
use crate::store::{Connections, StoreError};

/// One part of so many of the pool is kept open though nobody needs it now: when a cache dies, readers must not wait for
/// connections first.
const KEPT: usize = 2;

/// Between two looks whether connections are missing.
const TOP_UP: Duration = Duration::from_secs(1);
/// The same after one could not be made.
const LATER: Duration = Duration::from_secs(10);

/// A connection that nobody used for so long is asked whether it is alive.
const RESTED: Duration = Duration::from_secs(10);
/// What that may take.
const PROOF: Duration = Duration::from_secs(1);

/// After a refusal the server is not asked for another connection for so long.
const REFUSED: Duration = Duration::from_millis(500);

/// Connections to one server.
pub(super) struct Pool {
    connector: Arc<Connector>,
    held: Mutex<Held>,
    /// One for each connection that there may be.
    permits: Semaphore,
    /// One for each who has a permit or waits for one.
    places: Semaphore,
    size: usize,
    room: usize,
    patience: Duration,
    /// Rings when a connection has come back, or is lost.
    returned: Notify,
}

#[derive(Default)]
struct Held {
    /// The one that was used last comes last, and is used first.
    idle: Vec<Made>,
    lent: usize,
    refused: Option<Refused>,
}

/// The server gives us no more connections.
struct Refused {
    said: String,
    until: Instant,
}

impl Held {
    fn is_empty(&self) -> bool {
        self.lent + self.idle.len() == 0
    }

    fn lend(&mut self, choose: impl FnOnce(&mut Vec<Made>) -> Option<Made>) -> Option<Made> {
        let chosen = choose(&mut self.idle)?;
        self.lent += 1;
        Some(chosen)
    }
}

/// Keeps some connections open for as long as the pool is there.
async fn keep_open(pool: Weak<Pool>) {
    let mut pause = TOP_UP;
    loop {
        tokio::time::sleep(pause).await;
        let Some(pool) = pool.upgrade() else { return };
        pool.prove().await;
        pause = if pool.top_up().await { TOP_UP } else { LATER };
    }
}

impl Pool {
    pub(super) fn new(connector: Arc<Connector>, config: &config::Database) -> anyhow::Result<Arc<Self>> {
        let size = usize::try_from(config.pool_size)?;
        let room = size.saturating_add(usize::try_from(config.queue)?).min(Semaphore::MAX_PERMITS);
        let pool = Arc::new(Self {
            connector,
            held: Mutex::default(),
            permits: Semaphore::new(size),
            places: Semaphore::new(room),
            size,
            room,
            patience: config.statement_timeout,
            returned: Notify::new(),
        });
        pool.connector.runtime().spawn(keep_open(Arc::downgrade(&pool)));
        Ok(pool)
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who has the right to a connection.
    fn admitted(&self) -> usize {
        self.size.saturating_sub(self.permits.available_permits())
    }

    pub(super) fn connections(&self) -> Connections {
        let inside = self.room.saturating_sub(self.places.available_permits());
        let waiting = inside.saturating_sub(self.admitted());
        let held = self.held();
        Connections { in_use: held.lent, idle: held.idle.len(), waiting }
    }

    /// A connection, after a wait in a queue that is bounded in length and time. One that was kept may have died since.
    pub(super) async fn checkout(&self) -> Result<Checked<'_>, StoreError> {
        let place = self.places.try_acquire().map_err(|_| StoreError::Busy)?;
        let until = Instant::now() + self.patience;
        let acquired = tokio::time::timeout_at(until, self.permits.acquire()).await;
        // The semaphore is never closed.
        let permit = acquired.map_err(|_| StoreError::Busy)?.map_err(|_| StoreError::Busy)?;
        let (made, was_kept) = self.connection(true, until).await?;
        Ok(self.checked(made, was_kept, place, permit))
    }

    /// An idle connection or a new one, which is lent now, and whether it was kept. Where the server gives us no other one,
    /// one of those that there are is waited for, though it may be a new one that is wanted.
    async fn connection(&self, mut may_be_kept: bool, until: Instant) -> Result<(Made, bool), StoreError> {
        loop {
            // Rings for whatever comes back from now on.
            let returned = self.returned.notified();
            if may_be_kept && let Some(kept) = self.kept() {
                return Ok((kept, true));
            }
            match self.connect().await {
                Ok(made) => return Ok((made, false)),
                Err(refused @ StoreError::Refused(_)) if self.held().is_empty() => return Err(out_of_reach(refused)),
                Err(StoreError::Refused(_)) if Instant::now() >= until => return Err(StoreError::Busy),
                Err(StoreError::Refused(_)) => {
                    may_be_kept = true;
                    // Whether one came or not: it may be somebody else's by now, or there may be room again.
                    let _ = tokio::time::timeout_at(until.min(Instant::now() + REFUSED), returned).await;
                }
                Err(other) => return Err(other),
            }
        }
    }

    /// The same for who has found a dead one already: this one has just answered, or is new.
    pub(super) async fn checkout_alive(&self) -> Result<Checked<'_>, StoreError> {
        let until = Instant::now() + self.patience;
        let mut checked = self.checkout().await?;
        while checked.was_kept && !checked.answers().await {
            checked.replace(until).await?;
        }
        Ok(checked)
    }

    /// The idle connection that was used last, if there is any that may be used. It is lent now.
    fn kept(&self) -> Option<Made> {
        loop {
            let kept = self.held().lend(Vec::pop)?;
            if self.may_use(&kept) {
                return Some(kept);
            }
            self.held().lent -= 1;
            close(kept.conn);
        }
    }

    /// One that was made before may lead to a database that is the primary no more.
    fn may_use(&self, made: &Made) -> bool {
        !made.conn.is_disconnected() && self.connector.leads_to(made.origin)
    }

    /// A new one, which is lent now. [`StoreError::Refused`]: there is none to be had, by what the server says or has said a moment ago.
    async fn connect(&self) -> Result<Made, StoreError> {
        if let Some(refused) = &mut self.held().refused {
            let now = Instant::now();
            if now < refused.until {
                return Err(StoreError::Refused(refused.said.clone()));
            }
            // One asks for all.
            refused.until = now + REFUSED;
        }
        let made = self.connector.open().await;
        match &made {
            Ok(_) => {
                let mut held = self.held();
                held.refused = None;
                held.lent += 1;
            }
            Err(StoreError::Refused(said)) => {
                let refused = Refused { said: said.clone(), until: Instant::now() + REFUSED };
                self.held().refused = Some(refused);
            }
            Err(_) => {}
        }
        made
    }

    fn checked<'a>(
        &'a self,
        made: Made,
        was_kept: bool,
        place: SemaphorePermit<'a>,
        permit: SemaphorePermit<'a>,
    ) -> Checked<'a> {
        Checked { made: Some(made), state: State::Clean, was_kept, pool: self, _place: place, _permit: permit }
    }

    /// Gives up idle connections that have died. The rest of them next time, where one does not answer at all.
    async fn prove(&self) {
        while let Some(mut rested) = self.rested() {
            if rested.made.as_ref().is_some_and(|made| !self.may_use(made)) {
                rested.forget();
            } else if !rested.answers().await && rested.state == State::Busy {
                return;
            }
        }
    }

    /// The connection that nobody used for longest, if that is long, and while nobody waits for one.
    fn rested(&self) -> Option<Checked<'_>> {
        let (permit, place) = (self.permits.try_acquire().ok()?, self.places.try_acquire().ok()?);
        let is_rested = |made: &mut Made| made.answered.elapsed() >= RESTED;
        let rested = self.held().lend(|idle| idle.first_mut().is_some_and(is_rested).then(|| idle.remove(0)))?;
        Some(self.checked(rested, true, place, permit))
    }

    /// Opens what is missing of [`KEPT`], one by one, while nobody waits for a permit. Whether it could.
    async fn top_up(&self) -> bool {
        while self.admitted() + self.held().idle.len() < self.size / KEPT {
            let Ok(permit) = self.permits.try_acquire() else { break };
            let Ok(place) = self.places.try_acquire() else { break };
            match self.connect().await {
                Ok(made) => drop(self.checked(made, false, place, permit)),
                // Whoever needs one says why there is none.
                Err(_) => return false,
            }
        }
        true
    }
}

/// What goes on on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing.
    Clean,
    /// Something, or nobody knows what.
    Busy,
    /// It is lost, or must not be used again.
    Lost,
}

/// A connection out of the pool, with the right to be on it. It goes back when dropped, if nothing is under way on it.
pub(super) struct Checked<'a> {
    made: Option<Made>,
    state: State,
    /// It was used before, and may have died since.
    was_kept: bool,
    pool: &'a Pool,
    _place: SemaphorePermit<'a>,
    _permit: SemaphorePermit<'a>,
}

impl Checked<'_> {
    /// A fingerprint of the database that it leads to.
    pub(super) fn origin(&self) -> u64 {
        self.made.as_ref().map_or(0, |made| made.origin)
    }

    /// The connection, for one or several statements. Until [`Self::end`] says that they were answered, it is not kept.
    pub(super) fn begin(&mut self) -> Result<&mut Conn, StoreError> {
        self.state = State::Busy;
        match &mut self.made {
            Some(made) => Ok(&mut made.conn),
            None => Err(StoreError::Unavailable("the connection was lost".into())),
        }
    }

    /// What came of it. After an answer nothing is under way any more.
    pub(super) fn end<T>(&mut self, outcome: Result<Result<T, Error>, Elapsed>) -> Result<T, Failure> {
        let outcome = outcome.map_err(|_| Failure::TimedOut)?;
        let outcome = outcome.map_err(Failure::from);
        self.state = if outcome.as_ref().is_err_and(Failure::was_lost) { State::Lost } else { State::Clean };
        outcome
    }

    /// Gives it up when it is dropped, though nothing is under way on it.
    pub(super) fn forget(&mut self) {
        self.state = State::Lost;
    }

    /// Whether it is alive.
    async fn answers(&mut self) -> bool {
        let Ok(conn) = self.begin() else { return false };
        let asked = tokio::time::timeout(PROOF, conn.ping()).await;
        matches!(self.end(asked), Ok(()) | Err(Failure::Server(_)))
    }

    /// Puts another connection in the place of a dead one.
    async fn replace(&mut self, until: Instant) -> Result<(), StoreError> {
        // Dead ones say so at once. Where one says nothing, so may the others: they are not tried one after the other.
        let may_be_kept = self.state != State::Busy;
        self.give_up();
        let (made, was_kept) = self.pool.connection(may_be_kept, until).await?;
        (self.made, self.state, self.was_kept) = (Some(made), State::Clean, was_kept);
        Ok(())
    }

    /// Puts the connection back, or ends it with whatever is under way on it.
    fn give_up(&mut self) {
        let Some(mut made) = self.made.take() else { return };
        let mut held = self.pool.held();
        held.lent -= 1;
        if self.state == State::Clean {
            made.answered = Instant::now();
            held.idle.push(made);
            return;
        }
        drop(held);
        let (id, origin) = (made.conn.id(), made.origin);
        close(made.conn);
        if self.state == State::Busy {
            let connector = Arc::clone(&self.pool.connector);
            self.pool.connector.runtime().spawn(async move { connector.kill(id, origin).await });
        }
    }
}

impl Drop for Checked<'_> {
    fn drop(&mut self) {
        self.give_up();
        self.pool.returned.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::{Connector, Pool, StoreError};
    use crate::config;

    #[tokio::test(start_paused = true)]
    async fn as_many_are_let_in_as_there_are_connections_and_places_to_wait() {
        // Connections are accepted by the kernel, and nobody says a word.
        let silent = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port is free");
        let port = silent.local_addr().expect("it is bound").port();
        let database = config::Database {
            url: format!("mysql://a@127.0.0.1:{port}/b").into(),
            pool_size: 2,
            queue: 3,
            statement_timeout: Duration::from_mins(1),
            ..config::Database::default()
        };
        let connector = Arc::new(Connector::new(&database).expect("it is sound"));
        let pool = Pool::new(connector, &database).expect("it is sound");
        for _ in 0..2 {
            let asked = (0..20).map(|_| async { pool.checkout().await.map(drop) });
            let answers = futures_util::future::join_all(asked).await;
            let busy = answers.iter().filter(|answer| **answer == Err(StoreError::Busy)).count();
            let silent = answers.iter().filter(|answer| matches!(answer, Err(StoreError::Unavailable(_)))).count();
            assert_eq!((busy, silent), (15, 5), "{answers:?}");
            assert_eq!(pool.connections().waiting, 0);
        }
    }
}
