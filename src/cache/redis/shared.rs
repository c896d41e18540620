//! What all connections of a process to one Redis have in common: how they are made, and what the process owes.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
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

use super::cluster::Cluster;
use super::script::Scripts;
use super::sentinel::{self, Address, Sentinels};
use super::{rights, trouble, unlink};
use crate::cache::control::{Control, field};
use crate::cache::lane::{Returns, now_ms};
use crate::catalog::Mapping;
use crate::config;

/// Past this many owed invalidations, the whole node is invalidated instead.
pub(super) const OWED_MAX: usize = 10_000;

/// After a round that the database did not answer, for how long that is taken to be so, in milliseconds. Rounds go on
/// meanwhile and renew it.
const AWAY: u64 = 3_000;

/// What all lanes of a process have in common.
pub(super) struct Shared {
    /// The pool, and which server it leads to where Sentinels name one.
    pool: ArcSwap<(Option<Address>, Pool)>,
    pub(super) sentinels: Option<Sentinels>,
    /// What it is in a cluster, if it is in one.
    pub(super) member: Option<Member>,
    door: Door,
    pub(super) scripts: Scripts,
    pub(super) key_prefix: String,
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
    /// Until then the database is taken not to answer. All nodes of a cluster are told by whichever found out.
    away: Arc<AtomicU64>,
    owed: Mutex<Owed>,
    delivering: tokio::sync::Mutex<()>,
    /// What is being given back that was perhaps given to nobody.
    pub(super) returns: Returns,
    /// Why the last attempt to connect failed.
    pub(super) trouble: Mutex<Option<String>>,
    pub(super) address: String,
    /// The most that one operation may take.
    pub(super) timeout: Duration,
    /// What is packed would be at most this large, in bytes.
    pub(super) max_entry: usize,
    /// Larger payloads are packed, in bytes; `None`: none are.
    pub(super) pack_above: Option<usize>,
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

/// What tells a node of a cluster from a server of its own.
pub(super) struct Member {
    /// The slot whose hash tag names the node's own keys: the control key, the stream, and its copies of generations that
    /// others share.
    pub(super) elected: u16,
    pub(super) tag: String,
    pub(super) cluster: Weak<Cluster>,
    /// Until when the database is taken not to answer.
    pub(super) away: Arc<AtomicU64>,
}

/// How the servers of a configuration are connected to.
#[derive(Clone)]
pub(super) struct Door {
    pub(super) info: ConnectionInfo,
    pub(super) connection: AsyncConnectionConfig,
}

impl Door {
    pub(super) fn new(config: &config::Cache, url: &str) -> anyhow::Result<Self> {
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
        let connection = AsyncConnectionConfig::new()
            .set_response_timeout(Some(config.timeout))
            .set_connection_timeout(Some(config.timeout.max(Duration::from_secs(1))));
        Ok(Self { info, connection })
    }

    /// The same for another server.
    pub(super) fn to(&self, (host, port): &Address) -> Self {
        let address = match self.info.addr() {
            ConnectionAddr::TcpTls { insecure, tls_params, .. } => ConnectionAddr::TcpTls {
                host: host.clone(),
                port: *port,
                insecure: *insecure,
                tls_params: tls_params.clone(),
            },
            _ => ConnectionAddr::Tcp(host.clone(), *port),
        };
        Self { info: self.info.clone().set_addr(address), connection: self.connection.clone() }
    }
}

/// Supervisors hold one connection each: the bound is never reached.
fn pool(door: Door) -> anyhow::Result<Pool> {
    let manager = Manager::new_with_config(door.info, door.connection)?;
    Ok(Pool::builder(manager).max_size(1024).build()?)
}

impl Shared {
    pub(super) fn new(config: &config::Cache, max_staleness: Option<Duration>) -> anyhow::Result<Self> {
        let (sentinels, url) = match sentinel::split(config.url.expose())? {
            Some((sentinels, url)) => (Some(sentinels), url),
            None => (None, config.url.expose().to_owned()),
        };
        let door = Door::new(config, &url)?;
        let address = match &sentinels {
            Some(_) => config.url.to_string(),
            None => door.info.addr().to_string(),
        };
        Self::build(config, max_staleness, door, address, sentinels, None)
    }

    /// A node of a cluster.
    pub(super) fn of_cluster(
        config: &config::Cache,
        max_staleness: Option<Duration>,
        door: Door,
        member: Member,
    ) -> anyhow::Result<Self> {
        let address = door.info.addr().to_string();
        Self::build(config, max_staleness, door, address, None, Some(member))
    }

    fn build(
        config: &config::Cache,
        max_staleness: Option<Duration>,
        door: Door,
        address: String,
        sentinels: Option<Sentinels>,
        member: Option<Member>,
    ) -> anyhow::Result<Self> {
        let own = |name: &str| own(&config.key_prefix, member.as_ref(), name);
        let (control_key, stream_key) = (own("cache-aside:control"), own("cache-aside:changes"));
        let away = member.as_ref().map_or_else(Arc::default, |member| Arc::clone(&member.away));
        Ok(Self {
            pool: ArcSwap::from_pointee((None, pool(door.clone())?)),
            sentinels,
            member,
            door,
            scripts: Scripts::new(),
            key_prefix: config.key_prefix.clone(),
            control_key,
            stream_key,
            max_staleness: max_staleness.map(|longest| u64::try_from(longest.as_millis()).unwrap_or(u64::MAX)),
            floor: AtomicU64::new(0),
            look_now: Notify::new(),
            mappings: ArcSwap::default(),
            away,
            owed: Mutex::new(Owed::default()),
            delivering: tokio::sync::Mutex::default(),
            returns: Returns::default(),
            trouble: Mutex::default(),
            address,
            timeout: config.timeout,
            max_entry: config.max_entry,
            pack_above: config.packs_above(),
        })
    }

    /// How a key is spelled here. A node of a cluster has copies of its own of what many entries share: they are read in
    /// one breath with those entries.
    pub(super) fn spell<'a>(&self, key: &'a str) -> Cow<'a, str> {
        match (&self.member, shared_by_many(&self.key_prefix, key)) {
            (Some(_), Some(name)) => Cow::Owned(own(&self.key_prefix, self.member.as_ref(), name)),
            _ => Cow::Borrowed(key),
        }
    }

    /// The cluster that it is in.
    pub(super) fn cluster(&self) -> Option<Arc<Cluster>> {
        self.member.as_ref()?.cluster.upgrade()
    }

    /// Takes over or hands on what is owed for keys that `mine` says are another node's now; `None`: everything is.
    pub(super) fn disown(&self, mine: impl Fn(&str) -> bool) -> Disowned {
        let mut owed = self.owed.lock().unwrap_or_else(PoisonError::into_inner);
        let everything = owed.everything != 0;
        let gone: Vec<String> = owed.keys.keys().filter(|key| !mine(key)).cloned().collect();
        let keys = gone.into_iter().filter_map(|key| owed.keys.remove(&key).map(|(_, spare)| (key, spare))).collect();
        Disowned { keys, everything }
    }

    /// Everything here counts for nothing until it was told so.
    pub(super) fn owe_everything(&self) {
        let mut owed = self.owed.lock().unwrap_or_else(PoisonError::into_inner);
        let failures = owed.failures + 1;
        *owed = Owed { keys: HashMap::new(), everything: failures, failures };
        self.floor.store(u64::MAX, Ordering::Release);
    }

    pub(super) fn connections(&self) -> usize {
        self.pool.load().1.status().size
    }

    /// A new connection with its scripts loaded. Why there is none is remembered.
    pub(super) async fn connect(&self) -> anyhow::Result<Made> {
        let made =
            self.try_connect().await.map_err(|error| anyhow::Error::msg(trouble::words(&error, self.door.info.addr())));
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
            rights::ask(&mut pipe, &format!("{}-rights", self.control_key), self.member.is_some());
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
        let made = pool(address.map_or_else(|| self.door.clone(), |address| self.door.to(address)))?;
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
    pub(super) async fn deliver(&self, conn: &mut MultiplexedConnection, control: &Control) -> redis::RedisResult<()> {
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
        let names = |held: bool| {
            keys.iter().filter(move |(_, (_, spare))| *spare == held).map(|(key, _)| key).collect::<Vec<_>>()
        };
        let (dropped, spared) = (names(false), names(true));
        let not_here = [unlink::unlink(self, conn, &dropped).await?, unlink::spare(self, conn, &spared, &[]).await?];
        let mut elsewhere: HashSet<&str> = HashSet::new();
        for not_here in not_here.iter().filter(|not_here| !not_here.is_harmless(control)) {
            elsewhere.extend(not_here.moved.iter().chain(&not_here.left));
        }
        // Only what was sent is forgotten, and only now: whatever came or broke meanwhile is still owed.
        let mut owed = self.owed.lock().unwrap_or_else(PoisonError::into_inner);
        owed.keys.retain(|key, failure| keys.get(key) != Some(&*failure) || elsewhere.contains(key.as_str()));
        if let Some(cluster) = self.cluster().filter(|_| !elsewhere.is_empty()) {
            // Whoever has them now will owe them.
            cluster.look_again();
        }
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

/// Invalidations that another node owes from now on.
pub(super) struct Disowned {
    /// Each with whether a writer may hold it.
    pub(super) keys: Vec<(String, bool)>,
    /// Whatever it held.
    pub(super) everything: bool,
}

/// The name of what many entries share, such as the generation of a group. No resource can have such a name: `-` is no
/// letter of theirs.
pub(super) fn shared_by_many<'a>(key_prefix: &str, key: &'a str) -> Option<&'a str> {
    key.strip_prefix(key_prefix).filter(|name| name.starts_with("cache-aside:"))
}

/// The key of something that a node has to itself.
fn own(key_prefix: &str, member: Option<&Member>, name: &str) -> String {
    match member {
        Some(member) => format!("{key_prefix}{{{}}}{name}", member.tag),
        None => format!("{key_prefix}{name}"),
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
