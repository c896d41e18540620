//! What all connections of a process to one Redis have in common: how they are made, and what the process owes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use arc_swap::ArcSwap;
use deadpool_redis::{Connection, Manager, Pool};
use redis::aio::MultiplexedConnection;
use redis::io::tcp::TcpSettings;
use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, Pipeline, TlsCertificates, Value,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::sync::Notify;

use super::script::Scripts;
use super::sentinel::{self, Address, Sentinels};
use super::{rights, trouble};
use crate::cache::control::field;
use crate::catalog::Mapping;
use crate::config;

/// Past this many owed invalidations, the whole node is invalidated instead.
const OWED_MAX: usize = 10_000;

/// After a round that the database did not answer, for how long that is taken to be so, in milliseconds. Rounds go on
/// meanwhile and renew it.
const AWAY: u64 = 3_000;

/// Milliseconds of a clock that is never set and that runs on while the machine sleeps.
pub(super) fn now_ms() -> u64 {
    #[cfg(target_os = "linux")]
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    #[cfg(not(target_os = "linux"))]
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1000 + now.tv_nsec.unsigned_abs() / 1_000_000
}

/// What all lanes of a process have in common.
pub(super) struct Shared {
    /// The pool, and which server it leads to where Sentinels name one.
    pool: ArcSwap<(Option<Address>, Pool)>,
    pub(super) sentinels: Option<Sentinels>,
    info: ConnectionInfo,
    connection: AsyncConnectionConfig,
    pub(super) scripts: Scripts,
    /// The key that holds the node's epoch, watermark and generations. No resource can have its name: `-` is no letter of
    /// theirs.
    pub(super) control_key: String,
    /// The stream of what rounds invalidated.
    pub(super) stream_key: String,
    /// How far behind the database a hit may be, in milliseconds; `None`: nobody keeps this memory current.
    pub(super) max_staleness: Option<u64>,
    /// Looks that were sent before this moment count for nothing.
    pub(super) floor: AtomicU64,
    /// Rings when every lane should look at once.
    pub(super) look_now: Notify,
    /// What must be registered before anything is used here, by fingerprint.
    pub(super) mappings: ArcSwap<HashMap<String, Mapping>>,
    /// Until then the database is taken not to answer.
    away: AtomicU64,
    owed: Mutex<Owed>,
    delivering: tokio::sync::Mutex<()>,
    /// Why the last attempt to connect failed.
    pub(super) trouble: Mutex<Option<String>>,
    pub(super) address: String,
    /// The most that one operation may take.
    pub(super) timeout: Duration,
}

#[derive(Default)]
struct Owed {
    /// Each with the number of the failure that it comes from (one that fails again while it is being delivered stays), and
    /// whether a writer may hold it.
    keys: HashMap<String, (u64, bool)>,
    /// All keys, since this failure; zero: not all.
    everything: u64,
    failures: u64,
}

/// Who is at the other end of a connection.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    /// Which process of the server.
    pub(super) run: String,
    /// Where Sentinels named it.
    pub(super) address: Option<Address>,
}

/// A connection that is set up, and what it says of its server.
pub(super) struct Made {
    pub(super) connection: Connection,
    pub(super) conn: MultiplexedConnection,
    pub(super) peer: Peer,
    /// The server knows `SET … NX GET` (Redis 7, Valkey).
    pub(super) set_nx_get: bool,
}

/// Supervisors hold one connection each: the bound is never reached.
fn pool(info: ConnectionInfo, connection: AsyncConnectionConfig) -> anyhow::Result<Pool> {
    let manager = Manager::new_with_config(info, connection)?;
    Ok(Pool::builder(manager).max_size(1024).build()?)
}

impl Shared {
    pub(super) fn new(config: &config::Cache, max_staleness: Option<Duration>) -> anyhow::Result<Self> {
        let (sentinels, url) = match sentinel::split(config.url.expose())? {
            Some((sentinels, url)) => (Some(sentinels), url),
            None => (None, config.url.expose().to_owned()),
        };
        let url = url.as_str();
        let client = match &config.ca_file {
            None => Client::open(url)?,
            Some(file) => {
                let read =
                    std::fs::read(file).with_context(|| format!("cache.ca_file {} can't be read", file.display()))?;
                let certificates = CertificateDer::pem_slice_iter(&read).flatten().count();
                anyhow::ensure!(certificates > 0, "cache.ca_file {} holds no certificate", file.display());
                let root_cert = Some(read);
                Client::build_with_tls(url, TlsCertificates { client_tls: None, root_cert })?
            }
        };
        // Off by default in this client: small replies would wait for the server's delayed acknowledgement.
        let tcp = TcpSettings::default().set_nodelay(true);
        let info = client.get_connection_info().clone().into_connection_info()?.set_tcp_settings(tcp);
        let address = match &sentinels {
            Some(_) => config.url.to_string(),
            None => info.addr().to_string(),
        };
        let connection = AsyncConnectionConfig::new()
            .set_response_timeout(Some(config.timeout))
            .set_connection_timeout(Some(config.timeout.max(Duration::from_secs(1))));
        let pool = ArcSwap::from_pointee((None, pool(info.clone(), connection.clone())?));
        Ok(Self {
            pool,
            sentinels,
            info,
            connection,
            scripts: Scripts::new(),
            control_key: format!("{}cache-aside:control", config.key_prefix),
            stream_key: format!("{}cache-aside:changes", config.key_prefix),
            max_staleness: max_staleness.map(|longest| u64::try_from(longest.as_millis()).unwrap_or(u64::MAX)),
            floor: AtomicU64::new(0),
            look_now: Notify::new(),
            mappings: ArcSwap::default(),
            away: AtomicU64::new(0),
            owed: Mutex::new(Owed::default()),
            delivering: tokio::sync::Mutex::default(),
            trouble: Mutex::default(),
            address,
            timeout: config.timeout,
        })
    }

    pub(super) fn connections(&self) -> usize {
        self.pool.load().1.status().size
    }

    /// A new connection with its scripts loaded. Why there is none is remembered.
    pub(super) async fn connect(&self) -> anyhow::Result<Made> {
        let made =
            self.try_connect().await.map_err(|error| anyhow::Error::msg(trouble::words(&error, self.info.addr())));
        let why = made.as_ref().err().map(ToString::to_string);
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = why;
        made
    }

    async fn try_connect(&self) -> anyhow::Result<Made> {
        let address = match &self.sentinels {
            Some(sentinels) => Some(sentinels.master().await?),
            None => None,
        };
        let connection = self.pool_of(address.as_ref())?.get().await?;
        let mut conn: MultiplexedConnection = (*connection).clone();
        let outcome = async {
            let mut pipe = Pipeline::new();
            rights::ask(&mut pipe, &format!("{}-rights", self.control_key));
            if let Some(missing) = rights::missing(&conn.send_packed_commands(&pipe, 0, pipe.len()).await?) {
                anyhow::bail!(missing);
            }
            let mut pipe = Pipeline::new();
            Scripts::load(&mut pipe);
            pipe.cmd("INFO").arg("server");
            let replies = conn.send_packed_commands(&pipe, 0, pipe.len()).await?;
            if let Some(Value::ServerError(error)) =
                replies.iter().take(pipe.len() - 1).find(|reply| matches!(reply, Value::ServerError(_)))
            {
                anyhow::bail!("the cache refused SCRIPT LOAD: {} {}", error.code(), error.details().unwrap_or(""));
            }
            let info = replies.last().and_then(text).unwrap_or_default();
            let major = line(&info, "redis_version").and_then(|version| version.split('.').next()?.parse::<u32>().ok());
            let run = line(&info, "run_id").unwrap_or_default().to_owned();
            Ok((run, major.is_none_or(|major| major >= 7)))
        };
        match outcome.await {
            Ok((run, set_nx_get)) => {
                let peer = Peer { run, address };
                Ok(Made { conn: (*connection).clone(), connection, peer, set_nx_get })
            }
            Err(error) => {
                // Out of the pool, or the pool would hand the dead connection out again.
                drop(Connection::take(connection));
                Err(error)
            }
        }
    }

    /// The pool that leads to this server; another one where Sentinels have named another.
    fn pool_of(&self, address: Option<&Address>) -> anyhow::Result<Pool> {
        let current = self.pool.load_full();
        if current.0.as_ref() == address {
            return Ok(current.1.clone());
        }
        let named = address.map(|(host, port)| ConnectionAddr::Tcp(host.clone(), *port));
        let info = named.map_or_else(|| self.info.clone(), |named| self.info.clone().set_addr(named));
        let made = pool(info, self.connection.clone())?;
        self.pool.store(Arc::new((address.cloned(), made.clone())));
        Ok(made)
    }

    /// Whether this is still the server that is to be used.
    pub(super) fn leads(&self, peer: &Peer) -> bool {
        match (&self.sentinels, &peer.address) {
            (Some(sentinels), Some(address)) => sentinels.name(address),
            _ => true,
        }
    }

    /// Nothing is trusted before a look that is sent from now on.
    pub(super) fn mistrust(&self) {
        self.floor.fetch_max(now_ms() + 1, Ordering::AcqRel);
        self.look_now.notify_waiters();
    }

    /// Whether the last round found that the database does not answer.
    pub(super) fn database_is_away(&self) -> bool {
        now_ms() < self.away.load(Ordering::Acquire)
    }

    pub(super) fn database_answers(&self, yes: bool) {
        self.away.store(if yes { 0 } else { now_ms() + AWAY }, Ordering::Release);
    }

    /// Remembers invalidations that failed. Until they are delivered this process trusts nothing on the node.
    pub(super) fn owe(&self, keys: &[&str], spare: bool) {
        let mut owed = self.owed.lock().unwrap_or_else(PoisonError::into_inner);
        owed.failures += 1;
        let failure = owed.failures;
        if owed.everything == 0 && owed.keys.len() + keys.len() <= OWED_MAX {
            owed.keys.extend(keys.iter().map(|key| ((*key).to_owned(), (failure, spare))));
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
    pub(super) async fn deliver(&self, conn: &mut MultiplexedConnection) -> redis::RedisResult<()> {
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
            renew.arg(&self.control_key).arg(field::EPOCH).arg(fastrand::u64(1..));
            let () = renew.query_async(conn).await?;
        }
        let names = |spare: bool| keys.iter().filter(move |(_, (_, held))| *held == spare).map(|(key, _)| key);
        for some in names(false).collect::<Vec<_>>().chunks(1000) {
            let () = redis::cmd("UNLINK").arg(some).query_async(conn).await?;
        }
        for key in names(true) {
            let () = self.scripts.spare(key, &[]).query_async(conn).await?;
        }
        // Only what was sent is forgotten, and only now: whatever came or broke meanwhile is still owed.
        let mut owed = self.owed.lock().unwrap_or_else(PoisonError::into_inner);
        owed.keys.retain(|key, failure| keys.get(key) != Some(&*failure));
        if owed.everything == everything {
            owed.everything = 0;
        }
        if owed.keys.is_empty() && owed.everything == 0 {
            self.floor.store(now_ms() + 1, Ordering::Release);
            self.look_now.notify_waiters();
            tracing::info!(keys = keys.len(), everything = everything != 0, "owed invalidations were delivered");
        }
        Ok(())
    }

    /// Declares what is cached here and which changes concern it. Nothing is trusted before it is registered.
    pub(super) fn declare(&self, mappings: HashMap<String, Mapping>) {
        let before = self.mappings.swap(Arc::new(mappings));
        if *before != **self.mappings.load() {
            self.mistrust();
        }
    }
}

/// A reply that is a text, such as that of `INFO`.
pub(super) fn text(reply: &Value) -> Option<String> {
    match reply {
        Value::BulkString(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
        Value::VerbatimString { text, .. } | Value::SimpleString(text) => Some(text.clone()),
        _ => None,
    }
}

/// A value of `INFO`.
pub(super) fn line<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}
