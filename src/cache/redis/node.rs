//! Redis as those who keep it current see it: a connection of its own, over which a round goes from beginning to end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use deadpool_redis::Connection;
use redis::aio::MultiplexedConnection;
use tokio::sync::Mutex;

use super::look::{self, Seen};
use super::shared::{Made, Peer, Shared, shared_by_many};
use super::unlink;
use crate::cache::control::field;
use crate::cache::lane::{Wait, now_ms};
use crate::cache::slots::{self, Tenure};
use crate::cache::{CacheError, Looked, Node, Step};

/// Two clocks that run alike may differ by this much during a round, in milliseconds.
const DRIFT: u64 = 5;
/// A batch with more keys is told as "anything".
const BATCH: usize = 1_000;

/// One Redis server.
pub struct RedisNode {
    shared: Arc<Shared>,
    open: Mutex<Option<Open>>,
    connections: AtomicU64,
}

struct Open {
    made: Made,
    number: u64,
}

impl std::fmt::Debug for RedisNode {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("RedisNode")
    }
}

impl RedisNode {
    pub(super) fn new(shared: &Arc<Shared>) -> Self {
        Self { shared: Arc::clone(shared), open: Mutex::default(), connections: AtomicU64::new(0) }
    }

    /// The server's address.
    pub(in crate::cache) fn address(&self) -> &str {
        &self.shared.address
    }

    /// Runs something over the connection; one that fails is not used again.
    async fn over<T>(
        &self,
        open: &mut Option<Open>,
        run: impl AsyncFnOnce(&mut MultiplexedConnection, &Peer) -> anyhow::Result<T>,
    ) -> Result<T, CacheError> {
        let Some(it) = open else { return Err(CacheError::Disconnected) };
        let mut conn = it.made.conn.clone();
        match run(&mut conn, &it.made.peer).await {
            Ok(done) => Ok(done),
            Err(error) => {
                tracing::debug!(cache = self.shared.address, %error, "a round failed at the cache");
                if let Some(broken) = open.take() {
                    drop(Connection::take(broken.made.connection));
                }
                let timed_out = error.downcast_ref::<redis::RedisError>().is_some_and(redis::RedisError::is_timeout);
                Err(if timed_out { CacheError::TimedOut } else { CacheError::Refused })
            }
        }
    }
}

impl Node for RedisNode {
    async fn look(&self) -> Result<Looked, CacheError> {
        let mut open = self.open.lock().await;
        if open.is_none() {
            let made = self.shared.connect().await.map_err(|_| CacheError::Disconnected)?;
            *open = Some(Open { made, number: self.connections.fetch_add(1, Ordering::Relaxed) + 1 });
        }
        let shared = &self.shared;
        let seen = self.over(&mut open, async |conn, peer| look::look(shared, conn, peer).await).await?;
        let connection = open.as_ref().map_or(0, |open| open.number);
        let Seen { control, now, ids, holdings, .. } = seen;
        Ok(Looked { control, now, ids, holdings, connection, seen: now_ms() })
    }

    async fn advance(&self, looked: &Looked, step: &Step) -> Result<bool, CacheError> {
        let mut open = self.open.lock().await;
        if open.as_ref().is_none_or(|open| open.number != looked.connection) {
            // Another server may be at the other end by now, and it was not told.
            return Ok(false);
        }
        let shared = &self.shared;
        let mut fields: Vec<(String, String)> = [
            (field::POINT, step.point.clone()),
            (field::TAKEN, looked.now.to_string()),
            (field::ORIGIN, step.origin.clone()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        let mut anew = step.anew;
        if let Some(now) = &looked.holdings {
            let kept = Tenure::next(looked.control.tenure.as_ref(), now).filter(|_| !anew);
            anew |= kept.is_none();
            let tenure = kept.unwrap_or_else(|| Tenure::fresh(now));
            fields.push((field::HELD.to_owned(), tenure.held.to_string()));
            fields.push((field::LOST.to_owned(), tenure.lost.to_string()));
        }
        if anew {
            fields.push((field::EPOCH.to_owned(), fastrand::u64(1..).to_string()));
        }
        let renewed = step.renew.iter().map(|resource| (field::generation(resource), fastrand::u64(1..).to_string()));
        fields.extend(renewed);
        // What writers hold is told too: another deployment may declare the same resource without `hold`, and keep it in
        // process.
        let told: Vec<&String> = step.drop.iter().chain(&step.spare).collect();
        let batch = if anew || !step.renew.is_empty() || told.len() > BATCH {
            "*".to_owned()
        } else if told.is_empty() {
            String::new()
        } else {
            serde_json::to_string(&told).unwrap_or_else(|_| "*".to_owned())
        };
        let (drop, spare) = (&step.drop, &step.spare);
        let verdict: String = self
            .over(&mut open, async |conn, _| {
                // A slot that left or began to after the look: the next one will know.
                let known =
                    |key: &&str| looked.holdings.as_ref().is_some_and(|now| now.leaving.contains(slots::slot(key)));
                let mut wait = Wait::new(shared.timeout);
                for not_here in [
                    unlink::unlink(shared, conn, drop, &mut wait).await?,
                    unlink::spare(shared, conn, spare, &[], &mut wait).await?,
                ] {
                    let as_seen = not_here.moved.is_empty() && not_here.left.iter().all(known);
                    anyhow::ensure!(as_seen, "keys have left since the look");
                }
                // Less than what may be lost by rounding and drift.
                let elapsed = now_ms().saturating_sub(looked.seen).saturating_sub(DRIFT);
                let script = shared.scripts.round(
                    [&shared.control_key, &shared.stream_key],
                    [
                        &looked.control.number.to_string(),
                        &looked.ids.run,
                        &looked.ids.replication,
                        &batch,
                        &looked.control.epoch.to_string(),
                        &looked.now.to_string(),
                        &elapsed.to_string(),
                    ],
                    &fields,
                );
                Ok(script.query_async(conn).await?)
            })
            .await?;
        Ok(verdict == "moved")
    }

    fn concerns(&self, looked: &Looked, key: &str) -> bool {
        // What other nodes hold is told to them by rounds of theirs.
        looked.holdings.as_ref().is_none_or(|now| {
            shared_by_many(&self.shared.key_prefix, key).is_some() || now.owned.contains(slots::slot(key))
        })
    }

    fn database_answers(&self, yes: bool) {
        self.shared.debts.database_answers(yes);
    }
}
