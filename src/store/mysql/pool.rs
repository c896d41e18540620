//! Connections that are kept, as many as there may be; whoever wants one waits in a queue of bounded length and time.
//!
//! The driver has a pool of its own. It takes back connections whose last user was cancelled, and waits for what is still
//! under way on them; here such a connection is given up, and what the server does on it is ended.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mysql_async::{Conn, Error};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::error::Elapsed;

use super::close;
use super::connect::{Connector, Made};
use super::refusal::Failure;
use crate::config;
use crate::store::waiters::Place;
use crate::store::{Connections, StoreError};

/// Connections to one server.
pub(super) struct Pool {
    connector: Arc<Connector>,
    idle: Mutex<Vec<Made>>,
    /// One for each connection that there may be.
    permits: Semaphore,
    size: usize,
    waiting: AtomicUsize,
    queue: usize,
    patience: Duration,
}

impl Pool {
    pub(super) fn new(connector: Arc<Connector>, config: &config::Database) -> anyhow::Result<Self> {
        let size = usize::try_from(config.pool_size)?;
        Ok(Self {
            connector,
            idle: Mutex::default(),
            permits: Semaphore::new(size),
            size,
            waiting: AtomicUsize::new(0),
            queue: usize::try_from(config.queue)?,
            patience: config.statement_timeout,
        })
    }

    pub(super) fn connections(&self) -> Connections {
        Connections {
            in_use: self.size.saturating_sub(self.permits.available_permits()),
            idle: self.idle.lock().unwrap_or_else(PoisonError::into_inner).len(),
            waiting: self.waiting.load(Ordering::Relaxed),
        }
    }

    /// A connection, after a wait in a queue that is bounded in length and time.
    pub(super) async fn checkout(&self) -> Result<Checked<'_>, StoreError> {
        let permit = if let Ok(permit) = self.permits.try_acquire() {
            permit
        } else {
            let place = Place::take(&self.waiting, self.queue).ok_or(StoreError::Busy)?;
            let acquired = tokio::time::timeout(self.patience, self.permits.acquire()).await;
            drop(place);
            // The semaphore is never closed.
            acquired.map_err(|_| StoreError::Busy)?.map_err(|_| StoreError::Busy)?
        };
        let kept = loop {
            let Some(kept) = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop() else { break None };
            // One that was made before may lead to a database that is the primary no more.
            if !kept.conn.is_disconnected() && !self.connector.origin().is_former(kept.created) {
                break Some(kept);
            }
            close(kept.conn);
        };
        let was_kept = kept.is_some();
        let made = match kept {
            Some(made) => made,
            None => self.connector.connect().await?,
        };
        Ok(Checked { made: Some(made), state: State::Clean, was_kept, pool: self, _permit: permit })
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
    was_kept: bool,
    pool: &'a Pool,
    _permit: SemaphorePermit<'a>,
}

impl Checked<'_> {
    /// A fingerprint of the database that it leads to.
    pub(super) fn origin(&self) -> u64 {
        self.made.as_ref().map_or(0, |made| made.origin)
    }

    /// Whether it was used before, and may have died since.
    pub(super) fn was_kept(&self) -> bool {
        self.was_kept
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
}

impl Drop for Checked<'_> {
    fn drop(&mut self) {
        let Some(made) = self.made.take() else { return };
        match self.state {
            State::Clean => self.pool.idle.lock().unwrap_or_else(PoisonError::into_inner).push(made),
            State::Lost => close(made.conn),
            State::Busy => {
                let connector = Arc::clone(&self.pool.connector);
                let (id, origin) = (made.conn.id(), made.origin);
                close(made.conn);
                self.pool.connector.runtime().spawn(async move { connector.kill(id, origin).await });
            }
        }
    }
}
