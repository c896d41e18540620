//! Connections that are kept, as many as there may be; whoever wants one waits in a queue of bounded length and time.
//!
//! Half of the pool is kept open though nobody needs it: when a cache dies, its readers come at once, and must not wait for
//! connections first. Whoever finds none of these idle makes one himself, as long as there are fewer. The other half is made
//! only while somebody waits, and one by one: dozens that are made at the same time keep server and machine busier than the
//! statements that wait for them. [`Seats`] says who may.
//!
//! Whoever waits takes what comes first, an idle connection or a seat. What he began to make by then is made to its end, for
//! others; whoever leaves ends it.
//!
//! The connection that was used last is used next: each is slow when it plans a statement for the first time. Those that are idle
//! do so [ahead].

mod ahead;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use arc_swap::ArcSwap;
use deadpool_postgres::ClientWrapper;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;
use tokio_postgres::Error;
use tokio_postgres::error::SqlState;

use self::ahead::Expected;
use super::connect::{CONNECT, Connector, Origin};
use super::seats::{Seat, Seats};
use super::unreachable;
use crate::config;
use crate::store::waiters::Place;
use crate::store::{Connections, StoreError};

/// One part of so many of the pool is kept open though nobody needs it now.
const KEPT: usize = 2;
/// Between two looks whether connections are missing, or were lost.
const LOOK: Duration = Duration::from_secs(1);
/// Where one could not be made to be kept, so long until the next is tried.
const LATER: Duration = Duration::from_secs(10);
/// Whoever waits gives a connection this long to come back before one more is made.
const COMES_BACK: Duration = Duration::from_millis(10);
/// A connect that takes longer than this is not waited for: the next one is tried beside it.
const HANGS: Duration = Duration::from_millis(250);
/// Where one could not be made beside those that there are, nobody tries again for so long.
const REFUSED: Duration = Duration::from_secs(1);

/// Connections to one server.
pub(super) struct Pool {
    connector: Connector,
    seats: Arc<Seats>,
    held: Mutex<Held>,
    /// One for each that is idle: whoever has one takes a connection.
    ready: Semaphore,
    /// Somebody sees to it that more are made.
    growing: AtomicBool,
    /// Who has a connection or waits for one, and how many may.
    inside: AtomicUsize,
    room: usize,
    /// What each connection runs once before it is needed.
    expected: ArcSwap<Vec<Arc<Expected>>>,
    /// Who waits for others.
    waiting: AtomicUsize,
    patience: Duration,
}

#[derive(Default)]
struct Held {
    /// The one that was used last comes last, and is used first.
    idle: Vec<Made>,
    lent: usize,
}

impl Held {
    fn is_empty(&self) -> bool {
        self.lent + self.idle.len() == 0
    }
}

/// A connection in its seat.
pub(super) struct Made {
    pub(super) client: ClientWrapper,
    life: Arc<Origin>,
    /// What it has run ahead.
    ran: Vec<Arc<Expected>>,
    /// Dropped after the connection.
    _seat: Seat,
}

/// A connection out of the pool. It goes back when dropped, if it has not ended.
pub(super) struct Checked<'a> {
    made: Option<Made>,
    /// Which database it leads to, as it said when it was made.
    pub(super) life: Arc<Origin>,
    pool: &'a Pool,
    _inside: Place<'a>,
}

/// What there is for whoever needs a connection.
#[expect(clippy::large_enum_variant, reason = "it is on its way from one function to the next")]
enum Turn {
    Take(Made),
    Make(Seat),
}

/// Why a connection could not be made.
enum Failed {
    /// The server answers, and gives us no other one: those that there are have to do.
    Refused,
    Otherwise(StoreError),
}

impl Pool {
    /// Prepares it, without connecting yet; the first half is made soon.
    pub(super) fn new(connector: Connector, config: &config::Database) -> anyhow::Result<Arc<Self>> {
        let pool = Self::empty(connector, config)?;
        pool.connector.runtime().spawn(keep(Arc::downgrade(&pool)));
        pool.connector.runtime().spawn(ahead::run(Arc::downgrade(&pool)));
        Ok(pool)
    }

    /// The same without anybody who looks after it.
    fn empty(connector: Connector, config: &config::Database) -> anyhow::Result<Arc<Self>> {
        let size = usize::try_from(config.pool_size)?;
        Ok(Arc::new(Self {
            seats: Seats::new(size, size.div_ceil(KEPT)),
            held: Mutex::default(),
            ready: Semaphore::new(0),
            growing: AtomicBool::new(false),
            inside: AtomicUsize::new(0),
            room: size.saturating_add(usize::try_from(config.queue)?),
            expected: ArcSwap::default(),
            waiting: AtomicUsize::new(0),
            patience: config.statement_timeout,
            connector,
        }))
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn connections(&self) -> Connections {
        let held = self.held();
        Connections { in_use: held.lent, idle: held.idle.len(), waiting: self.waiting.load(Ordering::SeqCst) }
    }

    /// A connection, after a wait in a queue that is bounded in length and time.
    pub(super) async fn checkout(self: &Arc<Self>) -> Result<Checked<'_>, StoreError> {
        let inside = Place::take(&self.inside, self.room).ok_or(StoreError::Busy)?;
        let until = Instant::now() + self.patience;
        loop {
            let made = match self.turn(until).await? {
                Turn::Take(made) => Some(made),
                Turn::Make(seat) => self.make_or_take(seat).await?,
            };
            if let Some(made) = made {
                let life = Arc::clone(&made.life);
                return Ok(Checked { made: Some(made), life, pool: self, _inside: inside });
            }
        }
    }

    /// Waits for an idle connection, or for the right to make one.
    async fn turn(self: &Arc<Self>, until: Instant) -> Result<Turn, StoreError> {
        loop {
            if let Ok(ready) = self.ready.try_acquire() {
                if let Some(made) = self.lend(ready) {
                    return Ok(Turn::Take(made));
                }
                continue;
            }
            if let Some(seat) = self.seats.try_offered() {
                return Ok(Turn::Make(seat));
            }
            let _place = Place::take(&self.waiting, usize::MAX);
            self.grow();
            tokio::select! {
                biased;
                // The semaphores are never closed.
                Ok(ready) = self.ready.acquire() => if let Some(made) = self.lend(ready) {
                    return Ok(Turn::Take(made));
                },
                Some(seat) = self.seats.offered() => return Ok(Turn::Make(seat)),
                () = tokio::time::sleep_until(until) => return Err(StoreError::Busy),
            }
        }
    }

    /// Makes a connection, or takes one that comes back meanwhile. `None`: there is another turn to wait for.
    async fn make_or_take(self: &Arc<Self>, seat: Seat) -> Result<Option<Made>, StoreError> {
        let mut making = Box::pin(Arc::clone(self).make(seat));
        tokio::select! {
            biased;
            Ok(ready) = self.ready.acquire() => {
                let pool = Arc::clone(self);
                self.connector.runtime().spawn(async move { making.await.map(|made| pool.put(made)) });
                Ok(self.lend(ready))
            }
            made = &mut making => match made {
                Ok(made) => {
                    self.held().lent += 1;
                    Ok(Some(made))
                }
                Err(Failed::Refused) => Ok(None),
                Err(Failed::Otherwise(failed)) => Err(failed),
            },
        }
    }

    /// A new connection.
    async fn make(self: Arc<Self>, seat: Seat) -> Result<Made, Failed> {
        let found = match tokio::time::timeout(CONNECT, self.connector.find()).await {
            Ok(Ok(found)) => found,
            Ok(Err(failed)) => {
                let held = self.held();
                if is_refusal(&failed) && !held.is_empty() {
                    // Under the lock: the last one is lost after this, and its seat is offered then.
                    seat.withhold();
                    return Err(Failed::Refused);
                }
                return Err(Failed::Otherwise(unreachable(&failed)));
            }
            Err(_) => return Err(Failed::Otherwise(StoreError::Unavailable("connecting took too long".into()))),
        };
        let client = ClientWrapper::new(found.client, found.driver);
        Ok(Made { client, life: found.life, ran: Vec::new(), _seat: seat.settle() })
    }

    /// The idle connection that was used last; `None` where it can't be used any more.
    fn lend(&self, ready: SemaphorePermit<'_>) -> Option<Made> {
        ready.forget();
        let mut held = self.held();
        let made = held.idle.pop().filter(|made| self.may_use(made))?;
        held.lent += 1;
        Some(made)
    }

    /// Whether it is there, and leads to where new ones lead: else perhaps to a database that is the primary no more.
    fn may_use(&self, made: &Made) -> bool {
        !made.client.is_closed() && self.connector.leads_to(&made.life)
    }

    /// Gives one to whoever waits first.
    fn put(&self, made: Made) {
        self.held().idle.push(made);
        self.ready.add_permits(1);
    }

    /// Gives up idle connections that have ended, or lead elsewhere.
    fn sort_out(&self) {
        let mut held = self.held();
        let mut index = 0;
        while let Some(made) = held.idle.get(index) {
            if self.may_use(made) {
                index += 1;
                continue;
            }
            // Others are about to take the rest, and will see.
            let Ok(ready) = self.ready.try_acquire() else { break };
            ready.forget();
            held.idle.remove(index);
        }
    }

    /// Gives up a connection that is off the pool, and on which a statement still runs: that is cancelled. Until then its seat
    /// is not another's.
    pub(super) fn cancel(&self, lost: Made) {
        let connector = self.connector.clone();
        self.connector.runtime().spawn(async move {
            let cancel = connector.cancel(&lost.client);
            if tokio::time::timeout(Duration::from_secs(1), cancel).await.is_err() {
                tracing::debug!("a statement could not be cancelled in time");
            }
        });
    }

    /// Opens what is missing of those that are kept, one by one. Whether it could.
    async fn top_up(self: &Arc<Self>) -> bool {
        while let Some(seat) = self.seats.missing() {
            match Arc::clone(self).make(seat).await {
                Ok(made) => self.put(made),
                // Whoever needs one says why there is none.
                Err(_) => return false,
            }
        }
        true
    }

    /// Sees to it that connections are made for those who wait, if nobody does yet.
    fn grow(self: &Arc<Self>) {
        if self.growing.swap(true, Ordering::SeqCst) {
            return;
        }
        let pool = Arc::clone(self);
        self.connector.runtime().spawn(async move {
            loop {
                pool.serve_who_waits().await;
                pool.growing.store(false, Ordering::SeqCst);
                // Whoever came between the last look and this waits for nobody else.
                if pool.waiting.load(Ordering::SeqCst) == 0 || pool.growing.swap(true, Ordering::SeqCst) {
                    return;
                }
            }
        });
    }

    /// Makes connections while somebody waits and there may be more, one by one.
    async fn serve_who_waits(self: &Arc<Self>) {
        loop {
            tokio::time::sleep(COMES_BACK).await;
            if self.waiting.load(Ordering::SeqCst) == 0 {
                return;
            }
            let Some(seat) = self.seats.held_back() else { continue };
            let pool = Arc::clone(self);
            let making = self.connector.runtime().spawn(async move {
                let made = Arc::clone(&pool).make(seat).await;
                made.map(|made| pool.put(made)).is_ok()
            });
            match tokio::time::timeout(HANGS, making).await {
                // It goes on, and the next one is tried beside it.
                Err(_) | Ok(Ok(true)) => {}
                // Those who have a connection go on with what there is.
                Ok(_) => tokio::time::sleep(REFUSED).await,
            }
        }
    }
}

impl Checked<'_> {
    pub(super) fn client(&self) -> Result<&ClientWrapper, StoreError> {
        self.made.as_ref().map(|made| &made.client).ok_or_else(gone)
    }

    pub(super) fn client_mut(&mut self) -> Result<&mut ClientWrapper, StoreError> {
        self.made.as_mut().map(|made| &mut made.client).ok_or_else(gone)
    }

    /// Takes it off the pool. It has its seat until it is dropped.
    pub(super) fn lose(mut self) -> Result<Made, StoreError> {
        let made = self.made.take().ok_or_else(gone)?;
        self.pool.held().lent -= 1;
        Ok(made)
    }
}

impl Drop for Checked<'_> {
    fn drop(&mut self) {
        let Some(made) = self.made.take() else { return };
        let mut held = self.pool.held();
        held.lent -= 1;
        if self.pool.may_use(&made) {
            held.idle.push(made);
            self.pool.ready.add_permits(1);
        }
    }
}

fn gone() -> StoreError {
    StoreError::Unavailable("the connection was lost".into())
}

/// Too many, or whoever we say we are may no longer connect.
fn is_refusal(failed: &Error) -> bool {
    let code = failed.code().map_or("", SqlState::code);
    code == SqlState::TOO_MANY_CONNECTIONS.code() || code.starts_with("28")
}

/// Looks after the connections for as long as the pool is there.
async fn keep(pool: Weak<Pool>) {
    let mut later = Instant::now();
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(pool) = pool.upgrade() else { return };
        pool.sort_out();
        if later <= Instant::now() && !pool.top_up().await {
            later = Instant::now() + LATER;
        }
    }
}

#[cfg(test)]
mod tests;
