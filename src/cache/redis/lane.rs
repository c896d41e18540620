//! A lane: one multiplexed connection in one runtime, and the supervisor that makes it, looks at it and replaces it.
//!
//! Every 100 ms the supervisor *looks*: it reads the control key (epoch and generations) and the server's clock.
//! What is read over the lane is trusted until one second after the last look was sent; without looks the lane
//! is of no use, so a hung server is noticed by the same means as changed generations are. A lane whose looks fail is
//! thrown away with its connection, because a dead multiplexed connection never recovers by itself.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use deadpool_redis::{Connection, Manager, Pool};
use redis::aio::MultiplexedConnection;
use redis::io::tcp::TcpSettings;
use redis::{AsyncConnectionConfig, Client, IntoConnectionInfo, Pipeline, TlsCertificates, Value};
use tokio::sync::{Notify, watch};

use super::script::Scripts;
use crate::config;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(100);
/// What was read is trusted for this long after the last look was sent, in milliseconds.
const TRUST_MS: u64 = 1_000;
/// So many looks in a row may fail before the connection is given up.
const STRIKES: u32 = 3;
/// Between two attempts to connect, at most.
const BACKOFF: Duration = Duration::from_millis(500);
/// Past this many owed invalidations, the whole node is invalidated instead.
const OWED_MAX: usize = 10_000;

static STARTED: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Milliseconds of this process's monotonic clock.
pub(super) fn now_ms() -> u64 {
    u64::try_from(STARTED.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// What all lanes of a process have in common.
pub(super) struct Shared {
    pool: Pool,
    pub(super) scripts: Scripts,
    /// The key that holds the node's epoch and the resources' generations. No resource can have its name: `-` is no
    /// letter of theirs.
    pub(super) control_key: String,
    /// Looks sent before this moment (in terms of the deadlines they gave) count for nothing.
    pub(super) floor: AtomicU64,
    owed: Mutex<Owed>,
    delivering: tokio::sync::Mutex<()>,
    address: String,
    /// The most that one operation may take.
    pub(super) timeout: Duration,
}

#[derive(Default)]
struct Owed {
    /// Each with the number of the failure that it comes from: one that fails again while it is being delivered stays.
    keys: HashMap<String, u64>,
    /// All keys, since this failure; zero: not all.
    everything: u64,
    failures: u64,
}

impl Shared {
    pub(super) fn new(config: &config::Cache) -> anyhow::Result<Self> {
        let url = config.url.expose();
        let client = match &config.ca_file {
            None => Client::open(url)?,
            Some(file) => {
                let root_cert = Some(std::fs::read(file)?);
                Client::build_with_tls(url, TlsCertificates { client_tls: None, root_cert })?
            }
        };
        // Off by default in this client: small replies would wait for the server's delayed acknowledgement.
        let tcp = TcpSettings::default().set_nodelay(true);
        let info = client.get_connection_info().clone().into_connection_info()?.set_tcp_settings(tcp);
        let address = info.addr().to_string();
        let connection = AsyncConnectionConfig::new()
            .set_response_timeout(Some(config.timeout))
            .set_connection_timeout(Some(config.timeout.max(Duration::from_secs(1))));
        let manager = Manager::new_with_config(info, connection)?;
        // Supervisors hold one connection each: the bound is never reached.
        let pool = Pool::builder(manager).max_size(1024).build()?;
        Ok(Self {
            pool,
            scripts: Scripts::new(),
            control_key: format!("{}cache-aside:control", config.key_prefix),
            floor: AtomicU64::new(0),
            owed: Mutex::new(Owed::default()),
            delivering: tokio::sync::Mutex::default(),
            address,
            timeout: config.timeout,
        })
    }

    pub(super) fn connections(&self) -> usize {
        self.pool.status().size
    }

    /// Nothing is trusted before a look that is sent from now on.
    pub(super) fn mistrust(&self) {
        self.floor.fetch_max(now_ms() + TRUST_MS + 1, Ordering::AcqRel);
    }

    /// Remembers invalidations that failed. Until they are delivered this process trusts nothing on the node.
    pub(super) fn owe(&self, keys: &[&str]) {
        let mut owed = self.owed.lock().unwrap_or_else(PoisonError::into_inner);
        owed.failures += 1;
        let failure = owed.failures;
        if owed.everything == 0 && owed.keys.len() + keys.len() <= OWED_MAX {
            owed.keys.extend(keys.iter().map(|key| ((*key).to_owned(), failure)));
        } else {
            *owed = Owed { keys: HashMap::new(), everything: failure, failures: failure };
        }
        self.floor.store(u64::MAX, Ordering::Release);
    }

    /// Whether invalidations wait for delivery.
    pub(super) fn owes(&self) -> bool {
        self.floor.load(Ordering::Acquire) == u64::MAX
    }

    /// Delivers what is owed. Called after a look, over the connection that it went over.
    async fn deliver(&self, conn: &mut MultiplexedConnection) -> redis::RedisResult<()> {
        if !self.owes() {
            return Ok(());
        }
        // One lane at a time: another that finds nothing left to send must not restore trust before this one is done.
        let Ok(_delivering) = self.delivering.try_lock() else { return Ok(()) };
        let (keys, everything) = {
            let owed = self.owed.lock().unwrap_or_else(PoisonError::into_inner);
            (owed.keys.clone(), owed.everything)
        };
        if everything != 0 {
            let mut renew = redis::cmd("HSET");
            renew.arg(&self.control_key).arg("epoch").arg(fastrand::u64(1..));
            let () = renew.query_async(conn).await?;
        }
        let names: Vec<&String> = keys.keys().collect();
        for some in names.chunks(1000) {
            let () = redis::cmd("UNLINK").arg(some).query_async(conn).await?;
        }
        // Only what was sent is forgotten, and only now: whatever came or broke meanwhile is still owed.
        let mut owed = self.owed.lock().unwrap_or_else(PoisonError::into_inner);
        owed.keys.retain(|key, failure| keys.get(key) != Some(failure));
        if owed.everything == everything {
            owed.everything = 0;
        }
        if owed.keys.is_empty() && owed.everything == 0 {
            self.floor.store(now_ms() + TRUST_MS + 1, Ordering::Release);
            tracing::info!(keys = keys.len(), everything = everything != 0, "owed invalidations were delivered");
        }
        Ok(())
    }
}

/// What the control key says.
#[derive(Debug, Default)]
pub(super) struct Control {
    pub(super) epoch: u64,
    generations: HashMap<String, u64>,
}

impl Control {
    /// The field of a resource's generation.
    pub(super) fn field(resource: &str) -> String {
        format!("g:{resource}")
    }

    /// A resource's generation; zero until it was purged for the first time.
    pub(super) fn generation(&self, resource: &str) -> u64 {
        self.generations.get(resource).copied().unwrap_or(0)
    }

    fn read(fields: HashMap<String, String>) -> Self {
        let mut control = Self::default();
        for (field, value) in fields {
            let number = value.parse().unwrap_or(0);
            if field == "epoch" {
                control.epoch = number;
            } else if let Some(resource) = field.strip_prefix("g:") {
                control.generations.insert(resource.to_owned(), number);
            }
        }
        control
    }
}

/// A connection that answers.
pub(super) struct Live {
    pub(super) conn: MultiplexedConnection,
    pub(super) control: ArcSwap<Control>,
    /// Replies are trusted until then, in milliseconds of this process's clock.
    pub(super) trust: AtomicU64,
    /// The server's clock less this process's, in milliseconds.
    clock: AtomicI64,
    /// The server knows `SET … NX GET` (Redis 7, Valkey).
    pub(super) set_nx_get: bool,
}

impl Live {
    /// The server's clock, in milliseconds.
    pub(super) fn cache_now(&self) -> u64 {
        now_ms().saturating_add_signed(self.clock.load(Ordering::Relaxed))
    }
}

/// The place of a connection; empty while there is none.
pub(super) struct Lane {
    pub(super) live: ArcSwapOption<Live>,
    /// Rings when a request finds the connection dead.
    pub(super) wake: Notify,
    /// Whether the first attempt to connect is over.
    tried: watch::Sender<bool>,
}

impl Lane {
    /// The connection, once the first attempt to make it is over.
    pub(super) async fn opened(&self, patience: Duration) -> Option<Arc<Live>> {
        if !*self.tried.borrow() {
            let mut tried = self.tried.subscribe();
            // Either way, what counts is whether there is a connection.
            let _ = tokio::time::timeout(patience, tried.wait_for(|tried| *tried)).await;
        }
        self.live.load_full()
    }

    /// Opens a lane in the current runtime.
    pub(super) fn open(shared: &Arc<Shared>) -> Arc<Self> {
        let lane =
            Arc::new(Self { live: ArcSwapOption::empty(), wake: Notify::new(), tried: watch::Sender::new(false) });
        let (shared, weak) = (Arc::clone(shared), Arc::downgrade(&lane));
        tokio::spawn(async move {
            let mut failures = 0_u32;
            while weak.strong_count() > 0 {
                match connect(&shared).await {
                    Ok((connection, live)) => {
                        let live = Arc::new(live);
                        let Some(lane) = weak.upgrade() else { break };
                        lane.live.store(Some(Arc::clone(&live)));
                        lane.tried.send_replace(true);
                        drop(lane);
                        tracing::info!(cache = shared.address, "connected to the cache");
                        failures = 0;
                        let reason = keep_looking(&shared, &live, &weak).await;
                        if let Some(lane) = weak.upgrade() {
                            lane.live.store(None);
                            tracing::warn!(cache = shared.address, reason, "lost the cache; reads go to the database");
                        }
                        // Out of the pool, or the pool would hand the dead connection out again.
                        drop(Connection::take(connection));
                    }
                    Err(error) => {
                        if failures == 0 {
                            tracing::warn!(cache = shared.address, %error, "can't reach the cache; trying again");
                        }
                        failures += 1;
                        if let Some(lane) = weak.upgrade() {
                            lane.tried.send_replace(true);
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

async fn connect(shared: &Shared) -> anyhow::Result<(Connection, Live)> {
    let connection = shared.pool.get().await?;
    let mut conn: MultiplexedConnection = (*connection).clone();
    let outcome = async {
        let mut pipe = Pipeline::new();
        Scripts::load(&mut pipe);
        pipe.cmd("INFO").arg("server");
        let replies = conn.send_packed_commands(&pipe, 0, pipe.len()).await?;
        if let Some(Value::ServerError(error)) =
            replies.iter().take(pipe.len() - 1).find(|reply| matches!(reply, Value::ServerError(_)))
        {
            anyhow::bail!("the cache refused SCRIPT LOAD: {} {}", error.code(), error.details().unwrap_or(""));
        }
        let set_nx_get = replies.last().is_none_or(|info| major_version(info).is_none_or(|major| major >= 7));
        let live = Live {
            conn: conn.clone(),
            control: ArcSwap::default(),
            trust: AtomicU64::new(0),
            clock: AtomicI64::new(0),
            set_nx_get,
        };
        look(shared, &live).await?;
        Ok(live)
    };
    match outcome.await {
        Ok(live) => Ok((connection, live)),
        Err(error) => {
            drop(Connection::take(connection));
            Err(error)
        }
    }
}

fn major_version(info: &Value) -> Option<u32> {
    let text = match info {
        Value::BulkString(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        Value::VerbatimString { text, .. } | Value::SimpleString(text) => text.clone(),
        _ => return None,
    };
    let version = text.lines().find_map(|line| line.strip_prefix("redis_version:"))?;
    version.split('.').next()?.trim().parse().ok()
}

/// Looks until the connection is of no use any more, and says why.
async fn keep_looking(shared: &Shared, live: &Live, lane: &std::sync::Weak<Lane>) -> &'static str {
    let mut strikes = 0;
    loop {
        let Some(strong) = lane.upgrade() else { return "not needed any more" };
        // Without holding the lane: its last handle ends the watch within one look.
        let woken = tokio::time::timeout(LOOK, strong.wake.notified()).await;
        drop(strong);
        let _ = woken;
        match look(shared, live).await {
            Ok(()) => strikes = 0,
            Err(error) => {
                strikes += 1;
                tracing::debug!(cache = shared.address, %error, strikes, "a look at the cache failed");
                let dead = error
                    .downcast_ref::<redis::RedisError>()
                    .is_some_and(|error| !error.is_timeout() && error.is_unrecoverable_error());
                if dead {
                    return "the connection broke";
                }
                if strikes == STRIKES {
                    return "it does not answer";
                }
            }
        }
    }
}

/// One look: the control key and the server's clock, in one round trip.
async fn look(shared: &Shared, live: &Live) -> anyhow::Result<()> {
    let mut conn = live.conn.clone();
    let mut pipe = Pipeline::new();
    pipe.cmd("HGETALL").arg(&shared.control_key).cmd("TIME");
    // A server that evicts whatever it is given must not keep us here.
    for _ in 0..3 {
        let sent = now_ms();
        let (fields, (seconds, micros)): (HashMap<String, String>, (u64, u64)) = pipe.query_async(&mut conn).await?;
        // Something that is no epoch is replaced; where there is none, whoever comes first makes it.
        let set = if fields.contains_key("epoch") { "HSET" } else { "HSETNX" };
        let control = Control::read(fields);
        if control.epoch == 0 {
            // New, flushed or evicted: whatever generations it had are forgotten, so nothing older may count. The next
            // turn finds what this or another process wrote.
            live.trust.store(0, Ordering::Release);
            let mut renew = redis::cmd(set);
            renew.arg(&shared.control_key).arg("epoch").arg(fastrand::u64(1..));
            let () = renew.query_async(&mut conn).await?;
            continue;
        }
        let server = seconds * 1000 + micros / 1000;
        let middle = sent.midpoint(now_ms());
        live.clock.store(server.cast_signed().wrapping_sub(middle.cast_signed()), Ordering::Relaxed);
        live.control.store(Arc::new(control));
        live.trust.store(sent + TRUST_MS, Ordering::Release);
        shared.deliver(&mut conn).await?;
        return Ok(());
    }
    anyhow::bail!("the control key {} does not stay in the cache", shared.control_key)
}
