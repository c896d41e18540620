//! Three replicas, the servers behind them, and the crowd that reads and writes.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::app::{App, migrate};
use crate::faults::Proxy;
use crate::ledger::{Ledger, Read};
use crate::nodes::Nodes;
use crate::servers::{Kind, Memcached, Postgres, Redis};

pub const REPLICAS: usize = 3;
const ROWS: usize = 120;
const READERS: usize = 12;
const WRITERS: usize = 3;

/// What speaks Redis' protocol under this name.
pub fn kind(engine: &str) -> Kind {
    if engine == "valkey" { Kind::Valkey } else { Kind::Redis }
}

/// The cache that the replicas share.
pub enum Memory {
    Redis(Redis),
    Memcached(Memcached),
    Cluster(Nodes),
}

impl Memory {
    async fn start(engine: &str) -> Self {
        match engine {
            // What is persisted lags behind by up to a second: after a crash it comes back with old data.
            "redis" | "valkey" => {
                Self::Redis(Redis::start_as(kind(engine), &["--appendonly", "yes", "--appendfsync", "everysec"]).await)
            }
            "memcached" => Self::Memcached(Memcached::start().await),
            "cluster" => Self::Cluster(Nodes::start_with("2000").await),
            other => panic!("no drill knows {other:?}; say redis, valkey, memcached or cluster"),
        }
    }

    pub fn port(&self) -> u16 {
        match self {
            Self::Redis(redis) => redis.port(),
            Self::Memcached(memcached) => memcached.port(),
            Self::Cluster(nodes) => nodes.0[0].port(),
        }
    }

    pub async fn start_again(&mut self) {
        match self {
            Self::Redis(redis) => redis.start_again().await,
            Self::Memcached(memcached) => memcached.start_again().await,
            Self::Cluster(nodes) => nodes.0[0].start_again().await,
        }
    }

    pub fn pause(&self) {
        match self {
            Self::Redis(redis) => redis.pause(),
            Self::Memcached(memcached) => memcached.pause(),
            Self::Cluster(nodes) => nodes.0[0].pause(),
        }
    }

    pub fn resume(&self) {
        match self {
            Self::Redis(redis) => redis.resume(),
            Self::Memcached(memcached) => memcached.resume(),
            Self::Cluster(nodes) => nodes.0[0].resume(),
        }
    }
}

/// Everything that takes part.
pub struct Fleet {
    pub apps: tokio::sync::Mutex<Vec<App>>,
    urls: RwLock<Vec<String>>,
    /// Each replica's own way to the cache and to the database.
    pub to_cache: Vec<Proxy>,
    pub to_database: Vec<Proxy>,
    pub cache: tokio::sync::Mutex<Memory>,
    pub postgres: tokio::sync::Mutex<Postgres>,
    database: String,
    mode: String,
    pub engine: String,
    /// The cache's URL where no proxy can stand before it.
    cluster: Option<String>,
    /// Follows the first primary, in good and in bad days.
    standby: Option<Postgres>,
    /// Where outside writers find the database.
    primary: Mutex<u16>,
    /// Writers share it; whoever needs them to stand still has it alone.
    pub writing: tokio::sync::RwLock<()>,
    pub ledger: Ledger,
}

impl Fleet {
    /// `mode`: how the replicas learn of changes; `engine`: what they cache in; `follows`: fills may read from a standby.
    pub async fn start(mode: String, engine: &str, follows: bool) -> Self {
        let postgres = Postgres::start_with(&["max_wal_senders=10"]).await;
        let cache = Memory::start(engine).await;
        let database = postgres.create_database().await;
        let schema = format!(
            "CREATE TABLE item (id int PRIMARY KEY, kind int, v bigint NOT NULL);
             INSERT INTO item SELECT g, g % 7, 0 FROM generate_series(0, {}) g;",
            ROWS - 1
        );
        database.client().await.batch_execute(&schema).await.expect("the schema is sound");
        let standby = if follows { Some(Postgres::standby(here(postgres.port())).await) } else { None };
        let (mut to_cache, mut to_database) = (Vec::new(), Vec::new());
        for _ in 0..REPLICAS {
            to_cache.push(Proxy::to(here(cache.port())).await);
            to_database.push(Proxy::to(here(postgres.port())).await);
        }
        let cluster = match &cache {
            Memory::Cluster(nodes) => Some(nodes.url()),
            Memory::Redis(_) | Memory::Memcached(_) => None,
        };
        let fleet = Self {
            apps: tokio::sync::Mutex::default(),
            urls: RwLock::default(),
            to_cache,
            to_database,
            primary: Mutex::new(postgres.port()),
            cache: tokio::sync::Mutex::new(cache),
            postgres: tokio::sync::Mutex::new(postgres),
            database: database.name.clone(),
            mode,
            engine: engine.to_owned(),
            cluster,
            standby,
            writing: tokio::sync::RwLock::default(),
            ledger: Ledger::new(ROWS),
        };
        migrate(&fleet.config(0));
        for replica in 0..REPLICAS {
            let app = App::start(&fleet.config(replica)).await;
            fleet.urls.write().unwrap_or_else(PoisonError::into_inner).push(app.url.clone());
            fleet.apps.lock().await.push(app);
        }
        fleet
    }

    fn config(&self, replica: usize) -> String {
        let follower = self.standby.as_ref().map_or_else(String::new, |standby| {
            format!(", replica_url: \"postgres://postgres@{}/{}\"", here(standby.port()), self.database)
        });
        format!(
            "database: {{ url: \"postgres://postgres@{}/{}\"{follower} }}\ncache: {{ url: \"{}\" }}\n\
             access: {{ write: public }}\ninvalidation: {{ mode: {} }}\nresources: {{ item: {{ write: [update], ttl: 5s }} }}\n",
            self.to_database[replica].addr(),
            self.database,
            self.cluster.clone().unwrap_or_else(|| format!("{}://{}", self.engine, self.to_cache[replica].addr())),
            self.mode,
        )
    }

    /// How many loads went to the standby, at those replicas that are there now.
    pub async fn read_from_standby(&self) -> u64 {
        let mut sum = 0;
        for app in &*self.apps.lock().await {
            sum += app.metric("cache_aside_replica_reads_total{outcome=\"used\"}").await;
        }
        sum
    }

    /// Kills a replica and starts another in its place.
    pub async fn replace(&self, replica: usize) {
        let mut apps = self.apps.lock().await;
        apps[replica].signal("KILL");
        apps[replica].ended().await;
        let app = App::launch(&self.config(replica)).await;
        self.urls.write().unwrap_or_else(PoisonError::into_inner)[replica].clone_from(&app.url);
        apps[replica] = app;
    }

    pub async fn signal(&self, replica: usize, signal: &str) {
        self.apps.lock().await[replica].signal(signal);
    }

    fn url(&self, replica: usize) -> String {
        self.urls.read().unwrap_or_else(PoisonError::into_inner)[replica].clone()
    }

    pub fn set_primary(&self, port: u16) {
        *self.primary.lock().unwrap_or_else(PoisonError::into_inner) = port;
        for way in &self.to_database {
            way.lead_to(here(port));
            way.cut();
            way.restore();
        }
    }

    fn primary(&self) -> String {
        let port = *self.primary.lock().unwrap_or_else(PoisonError::into_inner);
        format!("postgres://postgres@127.0.0.1:{port}/{}?connect_timeout=1", self.database)
    }

    pub async fn outside(&self) -> Option<tokio_postgres::Client> {
        let primary = self.primary();
        let connecting = tokio_postgres::connect(&primary, tokio_postgres::NoTls);
        let (client, connection) = tokio::time::timeout(Duration::from_secs(1), connecting).await.ok()?.ok()?;
        tokio::spawn(connection);
        Some(client)
    }

    /// Gives every row a version that nothing that was lost can have.
    pub async fn overwrite(&self) {
        let client = self.outside().await.expect("the primary accepts connections");
        self.ledger.forgive();
        for row in 0..ROWS {
            let version = self.ledger.next(row);
            client
                .batch_execute(&format!("UPDATE item SET v = {version} WHERE id = {row}"))
                .await
                .expect("it is sound");
            self.ledger.acknowledged(row, version, false);
        }
    }

    /// Everybody who reads and writes.
    pub fn crowd(self: &Arc<Self>) -> Crowd {
        self.ledger.begin("start", crate::ledger::Expect::Bounded);
        let stop = Arc::new(AtomicBool::new(false));
        let mut people = JoinSet::new();
        for number in 0..READERS {
            people.spawn(reader(Arc::clone(self), Arc::clone(&stop), number));
        }
        for number in 0..WRITERS {
            people.spawn(writer(Arc::clone(self), Arc::clone(&stop), number));
            people.spawn(outsider(Arc::clone(self), Arc::clone(&stop), number));
        }
        Crowd { stop, people }
    }
}

pub fn here(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

/// Readers and writers at work.
pub struct Crowd {
    stop: Arc<AtomicBool>,
    people: JoinSet<()>,
}

impl Crowd {
    pub async fn disperse(mut self) {
        self.stop.store(true, Ordering::SeqCst);
        while let Some(ended) = self.people.join_next().await {
            ended.expect("nobody panics");
        }
    }
}

/// Rows of an even number are written through the API, the others by outsiders; each by one writer alone.
fn written_by_api(row: usize) -> bool {
    row.is_multiple_of(2)
}

async fn reader(fleet: Arc<Fleet>, stop: Arc<AtomicBool>, number: usize) {
    let client = reqwest::Client::builder().timeout(Duration::from_secs(15)).build().expect("a client can be made");
    while !stop.load(Ordering::Relaxed) {
        let replica = (number + fastrand::usize(..2)) % REPLICAS;
        let row = fastrand::usize(..ROWS).min(fastrand::usize(..ROWS));
        let phase = fleet.ledger.phase();
        let started = Instant::now();
        let asked = client.get(format!("{}/api/item/{row}", fleet.url(replica))).send().await;
        let Ok(reply) = asked else {
            fleet.ledger.failed(phase);
            // It is dead or stopped: somebody else is asked.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let (status, headers) = (reply.status(), reply.headers().clone());
        let Ok(body) = reply.text().await else {
            fleet.ledger.failed(phase);
            continue;
        };
        if status != 200 {
            fleet.ledger.failed(phase);
            tokio::time::sleep(Duration::from_millis(5)).await;
            continue;
        }
        let digits = body.split_once("\"v\":").map(|(_, rest)| rest.split('}').next().unwrap_or_default());
        let version = digits.and_then(|digits| digits.parse().ok()).unwrap_or_else(|| panic!("no version in {body}"));
        let hit = body.ends_with("\"source\":\"cache\"}");
        let told = headers.get("cache-status").and_then(|value| value.to_str().ok()).unwrap_or_default();
        let read = Read {
            row,
            started,
            version,
            hit,
            unverified: told.contains("unverified"),
            stale: told.contains("fwd=stale") && hit,
            headers: &|| format!("replica {replica}, row {row}, version {version}: {told}"),
        };
        fleet.ledger.judge(phase, &read, written_by_api(row));
    }
}

async fn writer(fleet: Arc<Fleet>, stop: Arc<AtomicBool>, number: usize) {
    let client = reqwest::Client::builder().timeout(Duration::from_secs(15)).build().expect("a client can be made");
    while !stop.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(5 + fastrand::u64(..10))).await;
        let _share = fleet.writing.read().await;
        let row = fastrand::usize(..ROWS / 2 / WRITERS) * 2 * WRITERS + 2 * number;
        let version = fleet.ledger.next(row);
        let url = format!("{}/api/item/{row}", fleet.url(fastrand::usize(..REPLICAS)));
        let request =
            client.patch(url).header("content-type", "application/json").body(format!(r#"{{"v":{version}}}"#));
        let phase = fleet.ledger.phase();
        match request.send().await {
            Ok(reply) if reply.status() == 200 => {
                let told = reply.headers().get("cache-status").and_then(|value| value.to_str().ok());
                let told = !told.unwrap_or_default().contains("invalidation-pending");
                fleet.ledger.acknowledged(row, version, told);
            }
            // It may have been written or not; the next version settles it.
            _ => {
                fleet.ledger.failed(phase);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

async fn outsider(fleet: Arc<Fleet>, stop: Arc<AtomicBool>, number: usize) {
    let mut client = None;
    while !stop.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(5 + fastrand::u64(..10))).await;
        if client.is_none() {
            client = fleet.outside().await;
        }
        let Some(connected) = &client else { continue };
        let _share = fleet.writing.read().await;
        let row = fastrand::usize(..ROWS / 2 / WRITERS) * 2 * WRITERS + 2 * number + 1;
        let version = fleet.ledger.next(row);
        let update = format!("UPDATE item SET v = {version} WHERE id = {row}");
        match tokio::time::timeout(Duration::from_secs(3), connected.batch_execute(&update)).await {
            Ok(Ok(())) => fleet.ledger.acknowledged(row, version, false),
            _ => client = None,
        }
    }
}
