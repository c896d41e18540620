//! What all connections of a process to one Redis have in common: how they are made, and what the process owes.

use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::Deref;
use std::sync::atomic::AtomicU64;
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

use super::cluster::Cluster;
use super::script::Scripts;
use super::sentinel::{self, Address, Sentinels};
use super::{rights, trouble, unlink};
use crate::cache::control::{Control, field};
use crate::cache::lane::{Common, Debts, Wait};
use crate::config;

/// What all lanes of a process have in common.
pub(super) struct Shared {
    common: Common,
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
    /// Why the last attempt to connect failed.
    pub(super) trouble: Mutex<Option<String>>,
}

impl Deref for Shared {
    type Target = Common;

    fn deref(&self) -> &Common {
        &self.common
    }
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
            common: Common::new(config, max_staleness, address, Debts::beside(away)),
            pool: ArcSwap::from_pointee((None, pool(door.clone())?)),
            sentinels,
            member,
            door,
            scripts: Scripts::new(),
            key_prefix: config.key_prefix.clone(),
            control_key,
            stream_key,
            trouble: Mutex::default(),
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

    /// Delivers what is owed. Called after a look, over the connection that it went over. `wait` begins anew with each
    /// round trip.
    pub(super) async fn deliver(
        &self,
        conn: &mut MultiplexedConnection,
        control: &Control,
        wait: &mut Wait,
    ) -> redis::RedisResult<()> {
        let Some(due) = self.debts.due() else { return Ok(()) };
        if due.is_everything() {
            let mut renew = redis::cmd("HSET");
            renew.arg(&self.control_key).arg(field::EPOCH).arg(fastrand::u64(1..));
            let () = renew.query_async(conn).await?;
        }
        let (dropped, spared) = (due.spared(false), due.spared(true));
        let not_here =
            [unlink::unlink(self, conn, &dropped, wait).await?, unlink::spare(self, conn, &spared, &[], wait).await?];
        let mut elsewhere: HashSet<String> = HashSet::new();
        for not_here in not_here.iter().filter(|not_here| !not_here.is_harmless(control)) {
            elsewhere.extend(not_here.moved.iter().chain(&not_here.left).map(|key| (*key).to_owned()));
        }
        due.done_except(&elsewhere);
        if let Some(cluster) = self.cluster().filter(|_| !elsewhere.is_empty()) {
            // Whoever has them now will owe them.
            cluster.look_again();
        }
        Ok(())
    }
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
