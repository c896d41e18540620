//! Connections that are kept, as many as there may be; whoever wants one waits in a queue of bounded length and time.
//!
//! Half of the pool is kept open though nobody needs it: when a cache dies, its readers come at once, and must not wait for
//! connections first. The other half is made only while somebody waits, and one by one: dozens that are made at the same
//! time keep server and machine busier than the statements that wait for them. So there is one permit for each of the
//! first half, and one more for every connection that was made beside them.
//!
//! The connection that was used last is used next: each is slow when it plans a statement for the first time.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use deadpool_postgres::{Manager, ManagerConfig, Object, PoolError, QueueMode, RecyclingMethod};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;
use tokio_postgres::error::SqlState;

use super::connect::{CONNECT, Connector, Origin};
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
    made: deadpool_postgres::Pool,
    /// One for each connection that may be used: those of [`Self::kept`], and those that were made beside them.
    permits: Semaphore,
    /// How many permits there are, given out or not.
    usable: AtomicUsize,
    /// How many more are being made.
    making: AtomicUsize,
    /// Somebody sees to it that more are made.
    growing: AtomicUsize,
    size: usize,
    /// Who has a connection or waits for one: so many at most as there are connections and places in the queue.
    inside: AtomicUsize,
    queue: usize,
    waiting: AtomicUsize,
    patience: Duration,
}

/// A connection out of the pool, with the right to be on it.
pub(super) struct Checked<'a> {
    pub(super) client: Object,
    /// A fingerprint of the database that it leads to.
    pub(super) origin: u64,
    /// The same in words.
    pub(super) life: Arc<Origin>,
    _permit: SemaphorePermit<'a>,
    _inside: Place<'a>,
}

/// Why there is no connection for a permit.
enum Failed {
    /// The server answers, and gives us no other one.
    Refused(StoreError),
    Otherwise(StoreError),
}

impl Pool {
    /// Prepares it, without connecting yet; the first half is made soon.
    pub(super) fn new(connector: Connector, config: &config::Database) -> anyhow::Result<Arc<Self>> {
        let manager = Manager::from_connect(
            connector.config().clone(),
            connector.clone(),
            ManagerConfig { recycling_method: RecyclingMethod::Fast },
        );
        let size = usize::try_from(config.pool_size)?;
        let made = deadpool_postgres::Pool::builder(manager).max_size(size).queue_mode(QueueMode::Lifo).build()?;
        let kept = kept(size);
        let pool = Arc::new(Self {
            made,
            permits: Semaphore::new(kept),
            usable: AtomicUsize::new(kept),
            making: AtomicUsize::new(0),
            growing: AtomicUsize::new(0),
            size,
            inside: AtomicUsize::new(0),
            queue: usize::try_from(config.queue)?,
            waiting: AtomicUsize::new(0),
            patience: config.statement_timeout,
            connector,
        });
        pool.connector.runtime().spawn(keep(Arc::downgrade(&pool)));
        Ok(pool)
    }

    pub(super) fn connections(&self) -> Connections {
        let (open, in_use) = (self.made.status().size + self.connector.spares(), self.in_use());
        Connections {
            in_use: in_use.min(open),
            idle: open.saturating_sub(in_use),
            waiting: self.waiting.load(Ordering::SeqCst),
        }
    }

    pub(super) fn is_pressed(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > 0
    }

    fn in_use(&self) -> usize {
        self.usable.load(Ordering::SeqCst).saturating_sub(self.permits.available_permits())
    }

    /// A connection, after a wait in a queue that is bounded in length and time. Where the server gives us no other one,
    /// one of those that there are is waited for.
    pub(super) async fn checkout(self: &Arc<Self>) -> Result<Checked<'_>, StoreError> {
        let inside = Place::take(&self.inside, self.size + self.queue).ok_or(StoreError::Busy)?;
        let until = Instant::now() + self.patience;
        loop {
            let permit = self.permit(until).await?;
            let failed = match self.connection().await {
                Ok((client, life)) => {
                    return Ok(Checked { client, origin: life.fingerprint, life, _permit: permit, _inside: inside });
                }
                Err(Failed::Otherwise(failed)) => return Err(failed),
                Err(Failed::Refused(failed)) => failed,
            };
            // Whoever finds no idle one and has none himself knows that all that there are belong to others, with permits.
            if self.made.status().size == 0 {
                return Err(failed);
            }
            permit.forget();
            self.usable.fetch_sub(1, Ordering::SeqCst);
        }
    }

    async fn permit(self: &Arc<Self>, until: Instant) -> Result<SemaphorePermit<'_>, StoreError> {
        if let Ok(permit) = self.permits.try_acquire() {
            return Ok(permit);
        }
        let _place = Place::take(&self.waiting, usize::MAX);
        self.grow();
        let acquired = tokio::time::timeout_at(until, self.permits.acquire()).await;
        // The semaphore is never closed.
        acquired.map_err(|_| StoreError::Busy)?.map_err(|_| StoreError::Busy)
    }

    /// The connection that was used last, or a new one, for somebody who has a permit.
    async fn connection(&self) -> Result<(Object, Arc<Origin>), Failed> {
        loop {
            let client = match tokio::time::timeout(CONNECT, self.made.get()).await {
                Ok(Ok(client)) => client,
                Ok(Err(PoolError::Backend(refused))) => {
                    // Too many, or whoever we say we are may no longer connect.
                    let code = refused.code().map_or("", SqlState::code);
                    let is_refused = code == SqlState::TOO_MANY_CONNECTIONS.code() || code.starts_with("28");
                    let failed = unreachable(&refused);
                    return Err(if is_refused { Failed::Refused(failed) } else { Failed::Otherwise(failed) });
                }
                Ok(Err(other)) => return Err(Failed::Otherwise(StoreError::Unavailable(other.to_string()))),
                Err(_) => return Err(Failed::Otherwise(StoreError::Unavailable("connecting took too long".into()))),
            };
            // Loaded once: a later one is not this connection's.
            let life = self.connector.origin();
            if !life.is_former(Object::metrics(&client).created) {
                return Ok((client, life));
            }
            // It may lead to a database that is the primary no more.
            drop(Object::take(client));
        }
    }

    /// Sees to it that connections are made for those who wait, if nobody does yet.
    fn grow(self: &Arc<Self>) {
        if self.usable.load(Ordering::SeqCst) >= self.size || self.growing.swap(1, Ordering::SeqCst) == 1 {
            return;
        }
        let pool = Arc::clone(self);
        self.connector.runtime().spawn(async move {
            loop {
                pool.serve_who_waits().await;
                pool.growing.store(0, Ordering::SeqCst);
                // Whoever came between the last look and this waits for nobody else.
                let missed = pool.waiting.load(Ordering::SeqCst) > 0 && pool.usable.load(Ordering::SeqCst) < pool.size;
                if !missed || pool.growing.swap(1, Ordering::SeqCst) == 1 {
                    return;
                }
            }
        });
    }

    /// Makes connections while somebody waits and there may be more, one by one.
    async fn serve_who_waits(self: &Arc<Self>) {
        loop {
            tokio::time::sleep(COMES_BACK).await;
            if self.waiting.load(Ordering::SeqCst) == 0 || self.usable.load(Ordering::SeqCst) >= self.size {
                return;
            }
            let Some(attempt) = Attempt::begin(self) else { continue };
            let pool = Arc::clone(self);
            let attempt = self.connector.runtime().spawn(async move { pool.make(attempt).await });
            match tokio::time::timeout(HANGS, attempt).await {
                // It goes on, and the next one is tried beside it.
                Err(_) | Ok(Ok(true)) => {}
                // Those who have a connection go on with what there is.
                Ok(_) => tokio::time::sleep(REFUSED).await,
            }
        }
    }

    /// One more connection, for whoever waits first. Whether it could be made.
    async fn make(&self, attempt: Attempt) -> bool {
        let stocked = tokio::time::timeout(CONNECT, self.connector.stock()).await;
        let Ok(Ok(())) = stocked else { return false };
        self.usable.fetch_add(1, Ordering::SeqCst);
        self.permits.add_permits(1);
        drop(attempt);
        true
    }

    /// Opens what is missing of those that are kept; not while all that may be used are. Whether it could.
    async fn top_up(self: &Arc<Self>) -> bool {
        // There was no room for them.
        while self.usable.load(Ordering::SeqCst) < kept(self.size) {
            let Some(attempt) = Attempt::begin(self) else { return true };
            if !self.make(attempt).await {
                return false;
            }
        }
        while let Ok(permit) = self.permits.try_acquire() {
            // Its own permit counts for nothing but the connection that is to be made.
            if self.taken() > kept(self.size) {
                break;
            }
            if !matches!(tokio::time::timeout(CONNECT, self.connector.stock()).await, Ok(Ok(()))) {
                // Whoever needs one says why there is none.
                return false;
            }
            drop(permit);
        }
        true
    }

    /// Takes back the permits of connections that have ended: those beside the kept ones are made anew as they were made
    /// before, while somebody waits and one by one.
    fn let_go(&self) {
        while self.waiting.load(Ordering::SeqCst) == 0 {
            let Ok(permit) = self.permits.try_acquire() else { return };
            // This one is taken too.
            if self.usable.load(Ordering::SeqCst) < self.taken().max(kept(self.size) + 1) {
                return;
            }
            permit.forget();
            self.usable.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// The permits that are given out, and the connections that wait for one. All connections that there are, or are being
    /// made for somebody who has a permit, are among these. Those that have ended are forgotten.
    fn taken(&self) -> usize {
        let before = self.in_use();
        let waiting = self.made.retain(|client, _| !client.is_closed()).retained + self.connector.spares();
        // Whoever took one of those meanwhile counts as well.
        waiting + before.max(self.in_use())
    }
}

/// How many of so many are kept open.
fn kept(size: usize) -> usize {
    size.div_ceil(KEPT)
}

/// A connection that is being made beside those that may be used; together they are no more than there may be.
struct Attempt(Arc<Pool>);

impl Attempt {
    fn begin(pool: &Arc<Pool>) -> Option<Self> {
        let before = pool.making.fetch_add(1, Ordering::SeqCst);
        let attempt = Self(Arc::clone(pool));
        (before + pool.usable.load(Ordering::SeqCst) < pool.size).then_some(attempt)
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        self.0.making.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Looks after the connections for as long as the pool is there.
async fn keep(pool: Weak<Pool>) {
    let mut later = Instant::now();
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(pool) = pool.upgrade() else { return };
        pool.let_go();
        if pool.waiting.load(Ordering::SeqCst) > 0 {
            // Who came while permits were taken back may have found that there were enough.
            pool.grow();
        }
        if later <= Instant::now() && !pool.top_up().await {
            later = Instant::now() + LATER;
        }
    }
}
