//! Memcached as those who keep it current see it: a connection of its own, over which a round goes from beginning to end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Mutex;

use super::connection::Connection;
use super::look::{self, Seen};
use super::shared::Shared;
use crate::cache::control::field;
use crate::cache::lane::now_ms;
use crate::cache::{CacheError, Looked, Node, Step};

/// One Memcached server.
pub struct MemcachedNode {
    shared: Arc<Shared>,
    state: Mutex<State>,
    connections: AtomicU64,
}

#[derive(Default)]
struct State {
    open: Option<Open>,
    watermark: Watermark,
}

struct Open {
    connection: Connection,
    number: u64,
    /// What the last look found: a round writes that back, changed.
    seen: Option<Seen>,
}

/// What is seen after a longer pause may have moved just before, in milliseconds.
const PAUSE: u64 = 1_000;

/// When the watermark moved last, as far as this process has seen. That decides who runs the next round, and whether others keep
/// up; how old what is cached may be is told in `trust`.
#[derive(Clone, Copy, Default)]
struct Watermark {
    epoch: u64,
    round: u64,
    moved: u64,
    looked: u64,
}

impl Watermark {
    /// A look that was sent at `now` found this one.
    fn learn(&mut self, epoch: u64, round: u64, now: u64) -> u64 {
        if (epoch, round) != (self.epoch, self.round) {
            // Since the last look, but not at the moment at which a round of ours would have.
            let moved = if now.saturating_sub(self.looked) > PAUSE { now } else { self.looked + 1 };
            (self.epoch, self.round, self.moved) = (epoch, round, moved);
        }
        self.looked = now;
        self.moved
    }
}

impl std::fmt::Debug for MemcachedNode {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("MemcachedNode")
    }
}

impl MemcachedNode {
    /// The server's address.
    pub(in crate::cache) fn address(&self) -> &str {
        &self.shared.address
    }

    pub(super) fn new(shared: &Arc<Shared>) -> Self {
        Self { shared: Arc::clone(shared), state: Mutex::default(), connections: AtomicU64::new(0) }
    }

    async fn told(&self, open: &mut Open, step: &Step) -> Result<Option<(u64, u64)>, CacheError> {
        let Some(seen) = open.seen.take() else { return Ok(None) };
        // What writers hold stands beside its entry.
        let keys: Vec<&str> = step.drop.iter().chain(&step.spare).map(String::as_str).collect();
        self.shared.drop_all(&open.connection, &keys).await?;
        let (mut epoch, mut round) = (seen.control.epoch, 0);
        if step.anew {
            epoch = fastrand::u64(1..);
        }
        let written = look::write(&self.shared, &open.connection, &seen, |fields, number| {
            round = number;
            let told = [
                (field::EPOCH, epoch.to_string()),
                (field::POINT, step.point.clone()),
                // No time: the number under which this snapshot came.
                (field::TAKEN, number.to_string()),
                (field::ORIGIN, step.origin.clone()),
                (field::RUN, seen.ids.run.clone()),
                (field::REPLICATION, seen.ids.replication.clone()),
            ];
            fields.extend(told.map(|(name, value)| (name.to_owned(), value)));
            let renewed = step.renew.iter();
            fields.extend(renewed.map(|resource| (field::generation(resource), fastrand::u64(1..).to_string())));
        })
        .await?;
        Ok(written.then_some((epoch, round)))
    }
}

impl Node for MemcachedNode {
    async fn look(&self) -> Result<Looked, CacheError> {
        let mut state = self.state.lock().await;
        if state.open.is_none() {
            let connection = self.shared.connect().await.map_err(|_| CacheError::Disconnected)?;
            let number = self.connections.fetch_add(1, Ordering::Relaxed) + 1;
            state.open = Some(Open { connection, number, seen: None });
        }
        let State { open, watermark } = &mut *state;
        let Some(it) = open else { return Err(CacheError::Disconnected) };
        match look::look(&self.shared, &it.connection).await {
            Ok(seen) => {
                let mut control = seen.control.clone();
                control.taken = watermark.learn(control.epoch, control.taken, seen.sent);
                let (now, ids, connection) = (seen.sent, seen.ids.clone(), it.number);
                it.seen = Some(seen);
                Ok(Looked { control, now, ids, holdings: None, connection, seen: now_ms() })
            }
            Err(error) => {
                *open = None;
                Err(error)
            }
        }
    }

    async fn advance(&self, looked: &Looked, step: &Step) -> Result<bool, CacheError> {
        let mut state = self.state.lock().await;
        let State { open, watermark } = &mut *state;
        let same = |open: &&mut Open| {
            let number = open.seen.as_ref().map(|seen| seen.control.number);
            open.number == looked.connection && number == Some(looked.control.number)
        };
        // Over another connection another server may be at the other end, and it was not told.
        let Some(it) = open.as_mut().filter(same) else { return Ok(false) };
        match self.told(it, step).await {
            Ok(Some((epoch, round))) => {
                (watermark.epoch, watermark.round, watermark.moved) = (epoch, round, looked.now);
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(error) => {
                tracing::debug!(cache = self.shared.address, %error, "a round failed at the cache");
                *open = None;
                Err(error)
            }
        }
    }

    fn database_answers(&self, yes: bool) {
        self.shared.debts.database_answers(yes);
    }
}

#[cfg(test)]
mod tests {
    use super::{PAUSE, Watermark};

    #[test]
    fn a_watermark_moved_when_it_was_first_seen_to_be_another() {
        let mut watermark = Watermark::default();
        let at = |number: u64| 1_000_000 + number;
        assert_eq!(watermark.learn(1, 7, at(0)), at(0), "nobody knows how old it is: not at all");
        assert_eq!(watermark.learn(1, 7, at(300)), at(0));
        assert_eq!(watermark.learn(1, 8, at(400)), at(301));
        assert_eq!(watermark.learn(2, 8, at(500)), at(401));
        // After a pause it may just have moved, and somebody may keep it current.
        let late = at(500) + PAUSE + 1;
        assert_eq!(watermark.learn(2, 9, late), late);
    }
}
